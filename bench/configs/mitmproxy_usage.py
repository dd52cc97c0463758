"""A mitmproxy add-on that reads the usage out of each answer as it passes, and counts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_USAGE = re.compile(rb'"cache_read_input_tokens"\s*:\s*(\d+)')

responses = 0
read = 0


def _reader(find_at_end: bool) -> Callable[[bytes], bytes]:
    kept = b""
    found: int | None = None

    def read_chunk(chunk: bytes) -> bytes:
        nonlocal kept, found
        global responses, read  # noqa: PLW0603 (mitmproxy loads the file as a module)
        window = kept + chunk
        if not find_at_end or not chunk:
            for match in _USAGE.finditer(window):
                found = int(match[1])
        # JSON is kept until it is whole; of a stream the line that the chunk does not end.
        kept = window if find_at_end else window[window.rfind(b"\n") + 1 :]
        if not chunk and found is not None:
            responses += 1
            read += found
        return chunk

    return read_chunk


def responseheaders(flow: Any) -> None:
    kind = flow.response.headers.get("content-type", "")
    flow.response.stream = _reader(find_at_end=not kind.startswith("text/event-stream"))
