"""What was digested before and need not be gone through again: a conversation says most of its
last request once more.

A stretch of messages is found by a digest of its text alone, up to a place between two messages
that depends on nothing but the text: so it is found in whatever request it comes. One pass of a
fast hash tells that it is the same, where to take it apart costs a step of Python's for each
message.

What is held are digests under the salt of the prompts', counts and sizes, in tables whose least
recently used entries leave. No part of a prompt is held, and no digest of so little that it could
be turned back into it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import NamedTuple

from msgspec import Raw
from xxhash import xxh3_128_digest

from sidecar.exchange import Breakpoint

__all__ = ["MAX_HELD_BYTES", "MIN_BYTES", "Beginning", "Recall", "Stretch"]

MIN_BYTES = 32
"""The quick digest of less than 16 bytes could be turned back into them."""
MAX_HELD_BYTES = 3 * 1024 * 1024
"""What all stretches may take."""
_MAX_BEGINNINGS = 512
_ENTRY_BYTES = 512
"""What a stretch takes beside the digests of its messages, about."""
_PLACES = [4096 * 5**step // 4**step for step in range(32)]
"""Behind each of these a stretch may end, in bytes: the last fifth is gone through at most."""
_TRIES = 4
"""So many places are tried: a request may add more than a fifth."""
_MESSAGE_BYTES = (4096, 64 * 1024)
"""So far behind a place the next message is looked for."""
_BETWEEN = (b'},{"role":', b'}, {"role":')


class Beginning(NamedTuple):
    """Tools and system prompt."""

    digest: bytes
    """Of both, 16 bytes each."""
    size: int
    breakpoints: tuple[Breakpoint, ...]
    marks: int
    """How many were found that look like one, where they mostly are."""
    keys: int
    """How many there are."""
    asked: bool
    """Whether one of them asks for caching."""
    hour: bool
    """Whether one does for an hour."""
    walked: tuple[int, int]
    """What of the bounds for all parts was used up: bytes and brackets."""


class Stretch(NamedTuple):
    """The messages up to a place; none of them has a mark."""

    length: int
    """How many, without those that are the system prompt."""
    system_length: int
    """How many are."""
    ends: bytes
    """The digest up to the end of each, 16 bytes each."""
    size: int
    """Of their bytes."""
    second: bytes
    """The digest of the second alone, if it tells."""
    system: bytes
    """The digest of those that are the system prompt; empty if there are none."""
    system_size: int


class Recall:
    """Remembers beginnings and stretches.

    What a `kind` is given for is found again for the same one alone.

    Args:
        salt: of the digests, 64 bits.
    """

    def __init__(self, salt: int) -> None:
        self._salt = salt
        self._beginnings: OrderedDict[int, Beginning] = OrderedDict()
        self._stretches: OrderedDict[int, Stretch] = OrderedDict()
        self._held_bytes = 0

    def name(self, kind: bytes, tools: Raw, system: Raw) -> int:
        """Name a beginning, by its text."""
        salt = self._salt
        return hash(kind + xxh3_128_digest(tools, salt) + xxh3_128_digest(system, salt))

    def beginning(self, name: int) -> Beginning | None:
        """Look a beginning up."""
        found = self._beginnings.get(name)
        if found is not None:
            self._beginnings.move_to_end(name)
        return found

    def keep_beginning(self, name: int, beginning: Beginning) -> None:
        """Remember a beginning, if nothing of it can be found out."""
        if all(each.size >= MIN_BYTES for each in beginning.breakpoints):
            self._beginnings[name] = beginning
            if len(self._beginnings) > _MAX_BEGINNINGS:
                self._beginnings.popitem(last=False)

    def stretch(self, kind: bytes, text: memoryview) -> tuple[Stretch | None, int]:
        """Find the longest stretch that is known of a list of messages.

        Returns:
            it, and where it ends: at the comma before the next message.
        """
        top = bisect_right(_PLACES, len(text)) - 1
        for step in range(top, max(top - _TRIES, -1), -1):
            end = _between(text, _PLACES[step])
            if end > 0:
                name = self._name(kind, text, end)
                found = self._stretches.get(name)
                if found is not None:
                    self._stretches.move_to_end(name)
                    return found, end
        return None, 0

    def place(self, text: memoryview, known: int, mark: int) -> int:
        """Say where a stretch of a list of messages ends that is to be remembered.

        Args:
            known: how far it is known.
            mark: where the first mark behind that is; the list's length if there is none.

        Returns:
            the place of a comma; 0 where there is none that is farther.
        """
        top = bisect_right(_PLACES, len(text)) - 1
        if top < 0 or _PLACES[top] <= known:
            return 0
        # What is farther from the end would not be looked for.
        for step in range(top, max(top - _TRIES, -1), -1):
            if known < _PLACES[step] < mark:
                end = _between(text, _PLACES[step])
                if known < end < mark:
                    return end
        return 0

    def keep_stretch(self, kind: bytes, text: memoryview, end: int, stretch: Stretch) -> None:
        """Remember a stretch."""
        name = self._name(kind, text, end)
        before = self._stretches.pop(name, None)
        if before is not None:
            self._held_bytes -= _ENTRY_BYTES + len(before.ends)
        self._stretches[name] = stretch
        self._held_bytes += _ENTRY_BYTES + len(stretch.ends)
        while self._held_bytes > MAX_HELD_BYTES:
            _, gone = self._stretches.popitem(last=False)
            self._held_bytes -= _ENTRY_BYTES + len(gone.ends)

    def _name(self, kind: bytes, text: memoryview, end: int) -> int:
        return hash(kind + xxh3_128_digest(text[:end], self._salt))


def _between(text: memoryview, at: int) -> int:
    """Return the place of the next comma between messages; 0 if there is none, or it is far.

    It may be one within a message: whoever goes on from it finds that out.
    """
    for size in _MESSAGE_BYTES:
        window = bytes(text[at : at + size])
        for needle in _BETWEEN:
            found = window.find(needle)
            if found >= 0:
                return at + found + 1
    return 0
