"""Whether a request asks for caching, and for how long, wherever it does."""

from __future__ import annotations

import re
from typing import NamedTuple

from sidecar.exchange import Dialect
from sidecar.observe.members import find_in_windows

__all__ = ["CACHE_CONTROL", "CACHE_POINT", "Asked", "Asking", "Mark", "mark_of"]


class Mark(NamedTuple):
    """How a dialect asks for caching."""

    key: bytes
    whole: re.Pattern[bytes]
    """The value tells a real breakpoint from a tool parameter that happens to have this name."""


CACHE_CONTROL = Mark(
    b'"cache_control"', re.compile(rb'"cache_control"\s*:\s*\{[^{}]*"ephemeral"[^{}]*')
)
CACHE_POINT = Mark(b'"cachePoint"', re.compile(rb'"cachePoint"\s*:\s*\{[^{}]*"default"[^{}]*'))
_MARK_BYTES = 256
"""How much of the text is looked at from a key on: a whole one without blanks has 65 bytes."""
_MAX_KEYS = 1024
"""So many keys are looked at; if none of them asks, whether the request does is not known."""


def mark_of(dialect: Dialect) -> Mark:
    """Say how a dialect asks; LiteLLM takes Anthropic's breakpoints on OpenAI's routes, too."""
    return CACHE_POINT if dialect is Dialect.BEDROCK_CONVERSE else CACHE_CONTROL


class Asked(NamedTuple):
    """What a text asks for."""

    asked: bool | None
    hour: bool | None


class Asking:
    """Looks for what asks for caching in a text that comes in pieces.

    Each key is judged by itself and the bytes behind it, the same ones however the text is cut.

    Args:
        ttls: whether to look for one that asks for an hour, too.
    """

    __slots__ = ("_asked", "_hour", "_tail", "_ttls", "keys", "mark")

    def __init__(self, ttls: bool, mark: Mark) -> None:
        self._ttls = ttls
        self.mark = mark
        self._asked = self._hour = False
        self._tail = b""
        self.keys = 0
        """How many were looked at."""

    def count(self, text: bytes | memoryview) -> int:
        """Look at the keys of a whole text; returns how many there are, looked at or not."""
        text = bytes(text)
        before = self.keys
        searched = self.search(text, len(text))
        return self.keys - before + text.count(self.mark.key, searched)

    def add(self, asked: bool, hour: bool, keys: int) -> None:
        """Take what is known of a text."""
        self._asked = self._asked or asked
        self._hour = self._hour or hour
        self.keys += keys

    def feed(self, piece: bytes) -> None:
        """Look at the keys that have enough bytes behind them."""
        if self._known:
            return
        text = self._tail + piece if self._tail else piece
        self.search(text, len(text) - _MARK_BYTES + 1)
        self._tail = text[1 - _MARK_BYTES :]

    def finish(self) -> Asked:
        """Look at the others."""
        self.search(self._tail, len(self._tail))
        return self.found

    def search(self, text: bytes, end: int) -> int:
        """Look at the keys that begin before `end`; returns up to where that was needed."""
        # To find a constant is ten times as quick as to search for a pattern.
        key, whole = self.mark
        at = find_in_windows(text, key, 0)
        while 0 <= at < end and not self._known:
            self.keys += 1
            found = whole.match(text, at, at + _MARK_BYTES)
            if found is not None:
                self._asked = True
                self._hour = b'"1h"' in found[0]
            at += 1
            if not self._known:
                at = find_in_windows(text, key, at)
        return at if at >= 0 else len(text)

    @property
    def _known(self) -> bool:
        """Whether the rest tells no more, or too much was looked at."""
        return (self._asked and (self._hour or not self._ttls)) or self.keys >= _MAX_KEYS

    @property
    def found(self) -> Asked:
        """What was found."""
        if self.keys >= _MAX_KEYS and not (self._asked and (self._hour or not self._ttls)):
            return Asked(self._asked or None, None)
        return Asked(self._asked, self._hour if self._ttls else None)
