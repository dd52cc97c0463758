"""Showing a person what somebody else has written.

A client chooses the name of a model, and an upstream what it answers. The log escapes what a
terminal would obey; reading a line of it as JSON undoes that.
"""

from __future__ import annotations

import re

__all__ = ["shown"]

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def shown(text: str) -> str:
    """Write control characters and line ends as escapes."""
    return _CONTROLS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
