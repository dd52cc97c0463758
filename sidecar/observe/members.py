"""Reading a few members of a JSON object, and finding where they stand in its text.

Reading goes at a C decoder's speed and with Python's leniency: msgspec skips what is not asked
for, but refuses a whole document for a lone surrogate (text that was cut inside an emoji), for
invalid UTF-8 and for NaN. Providers and clients send these, and the standard library's decoder
takes them.

Finding is for texts that a decoder has taken: it goes through the text once, builds none of
its values, and of what is no JSON it says nothing useful, without raising.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

__all__ = [
    "EVERY",
    "SHALLOW",
    "MemberReader",
    "end_of_item",
    "find_in_windows",
    "find_member",
    "member_of",
    "members_of",
]

_BOM = b"\xef\xbb\xbf"

# The possessive quantifiers keep the matcher from saving places to come back to. Without them the
# patterns match the same. Before 3.11.5 those of a group take in what the group did not match
# (python/cpython#106052), such as a string that does not end.
EVERY = b"*+" if sys.version_info >= (3, 11, 5) else b"*"
_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)%b"' % EVERY
_FLAT = rb'[^"{}\[\]\\]++|' + _STRING
# Brackets are taken in pairs to a depth of two: what is deeper costs a step of Python's for each.
SHALLOW = re.compile(
    rb"(?:%b|[{\[](?:%b|[{\[](?:%b)%b[}\]])%b[}\]])%b" % (_FLAT, _FLAT, _FLAT, *[EVERY] * 3),
    re.DOTALL,
)
_BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?" + _SPACE)
_KEY = re.compile(_SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE, re.DOTALL)
_SCALAR = re.compile(_STRING + rb'|[^"{}\[\],\s]++', re.DOTALL)
_COMMA = re.compile(_SPACE + rb",")

# One number of thousands of digits takes a while to make.
_decode_without_numbers = json.JSONDecoder(parse_int=len, parse_float=len).decode

_WINDOW_BYTES = 24 * 1024

StructT = TypeVar("StructT", bound=msgspec.Struct)


class MemberReader(Generic[StructT]):
    """Reads the members that a struct names; all of them must have defaults.

    Args:
        numbers: whether numbers are wanted; without, the lenient decoder may put others for them.
    """

    def __init__(self, struct: type[StructT], *, numbers: bool = True) -> None:
        self._struct = struct
        self._decode = msgspec.json.Decoder(struct).decode
        self._decode_slowly = json.loads if numbers else _decode_without_numbers

    def strict(self, data: bytes) -> StructT | None:
        """Decode fast; None for anything that is not plain JSON with an object at its top."""
        try:
            return self._decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def lenient(self, data: bytes) -> StructT | None:
        """Decode, slowly if need be; None for what Python's own decoder refuses as well."""
        data = data.removeprefix(_BOM)
        found = self.strict(data)
        if found is not None:
            return found
        try:
            decoded = self._decode_slowly(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
        if not isinstance(decoded, dict):
            return None
        return self._struct(**{name: decoded.get(name) for name in self._struct.__struct_fields__})


def member_of(value: object, name: str) -> object:
    """Look a member up in what either decoder made of an object; None for anything else."""
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def find_in_windows(text: bytes, key: bytes, at: int) -> int:
    """Find a short key from a place on; -1 without one.

    In windows that are short enough for CPython to search them by skipping (`fastsearch.h`; from
    30,000 bytes on it takes another way), this is two to three times as quick.
    """
    while True:
        found = text.find(key, at, at + _WINDOW_BYTES)
        at += _WINDOW_BYTES - len(key) + 1
        if found >= 0 or at + len(key) > len(text):
            return found


_raw_values = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def members_of(text: bytes, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield the members of the object whose brace is at `begin`, in their order, repeats too.

    Args:
        end: where the object ends; white space may follow it there.

    Yields:
        The key, its escapes undone, and where its value begins and ends.
    """
    view = memoryview(text)
    try:
        values = _raw_values(view[begin:end])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        values = {}
    at = begin + 1
    while (match := _KEY.match(text, at)) is not None:
        key, at = _unescaped(match[1]), match.end()
        # Of a name that comes twice the decoder has the last value, which may be another one. No
        # array, object or string is the beginning of another one, as a number can be.
        value = memoryview(values.get(key, b""))
        end_of_value = at + len(value)
        if bytes(value[:1]) not in (b"[", b"{", b'"') or view[at:end_of_value] != value:
            end_of_value = _end_of_value(text, at)
            if end_of_value < 0:
                return
        yield key, at, end_of_value
        comma = _COMMA.match(text, end_of_value)
        if comma is None:
            return
        at = comma.end()


def find_member(text: bytes, path: Sequence[str]) -> tuple[int, int] | None:
    """Find where the value of a member begins and ends.

    Args:
        text: with an object at its top.
        path: the names from the top on. Of a name that comes twice in an object the last
            counts, as it does for decoders.
    """
    match = _BEGIN.match(text)
    assert match is not None  # the pattern takes the empty string
    place = match.end(), len(text)
    for name in path:
        if not text.startswith(b"{", place[0]):
            return None
        found = [(begin, end) for key, begin, end in members_of(text, *place) if key == name]
        if not found:
            return None
        place = found[-1]
    return place


def end_of_item(text: bytes, position: int, begin: int = 1) -> int:
    """Return where that item of an array ends in which a position stands.

    Args:
        text: an array, without blanks before it.
        position: of no place within a string. Where it is between two items, it is returned.
        begin: where to look from, between two items.
    """
    at = begin
    while True:
        match = SHALLOW.match(text, at, position)
        assert match is not None  # the pattern takes the empty string
        at = match.end()
        if at >= position:
            return position
        end = _end_of_value(text, at)
        if end < 0 or end >= position:
            return end if end >= 0 else len(text)
        at = end


def _end_of_value(text: bytes, begin: int) -> int:
    """Return where the value that begins here ends; -1 where it does not."""
    if text[begin : begin + 1] not in (b"{", b"["):
        scalar = _SCALAR.match(text, begin)
        return -1 if scalar is None else scalar.end()
    at, depth = begin + 1, 1
    while depth:
        match = SHALLOW.match(text, at)
        assert match is not None  # the pattern takes the empty string
        at = match.end() + 1
        if at > len(text) or text[at - 1] == 0x22:  # a quote: a string that does not end
            return -1
        depth += 1 if text[at - 1] in b"{[" else -1
    return at


def _unescaped(key: bytes) -> str:
    text = key[1:-1].decode("utf-8", "replace")
    if "\\" in text:
        try:
            text = str(json.loads(f'"{text}"', strict=False))
        except ValueError:
            pass
    return text
