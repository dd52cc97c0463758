"""Reading what a request asked for: its model, whether it streams, whether it asks for caching.

Bodies come in any size up to the capture bound, and the event loop must not stand still for
them. Up to `_WHOLE_BYTES`, which a C decoder goes through in 1 to 4 ms, a body is kept and
decoded at its end. A larger one, or one of unknown length, is never kept: it is scanned as it
passes, and only the members of its top level remain, with every object and array in them
replaced by `0`.

Whatever a body is, no step takes more than 5 ms: no piece of 64 KB that is fed, and nothing
between two yields of `finish` (`make bench-hostile`). A body of up to 64 KB is one step.

No I/O, no clock; nothing raises.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from itertools import accumulate

import msgspec
from msgspec import Raw

from sidecar.exchange import Dialect, RawHeaders, RequestFacts, first_values
from sidecar.observe.asking import Asked, Asking, Mark, mark_of
from sidecar.observe.decoding import codings_of
from sidecar.observe.members import EVERY, SHALLOW, MemberReader
from sidecar.observe.prefix import PrefixReader, Prompt

__all__ = ["BodyReader"]

_WHOLE_BYTES = 4 * 1024 * 1024
_STEP_BYTES = 64 * 1024
"""From this size on, what is done with a whole body is done in more than one step."""
_DENSE_STEP_BYTES = 8 * 1024
"""How much of a whole body is scanned between two chances for the loop to do other work."""
_MAX_TOP_BYTES = 1024 * 1024
"""Longest top level that is kept, in bytes. A system prompt given as a string belongs to it."""
_MAX_TOP_VALUES = 1024
"""So many objects and arrays the top level may have: each costs a step of Python's."""
_MAX_TOP_QUOTES = 64 * 1024
"""So many quotes it may have: each member has two, and takes Python's decoder a moment."""
_PATIENCE = 64
"""After so many brackets in a piece that are too deep for the pattern the others are counted."""
_DENSE = 16
"""Where of so many bytes one begins an object or array, all brackets are counted."""
_MAX_VALUE_BYTES = 4096
"""What is longer is no model's name."""


_COUNTED_FROM_BYTES = 1024 * 1024
_MAX_TOKENS = 128 * 1024
"""A body with more values than the decoder surely goes through in one step is scanned."""

# Whole strings and everything else that is neither a bracket nor an unfinished string. The
# possessive quantifiers keep the matcher from saving places to come back to.
_FLAT = re.compile(rb'(?:[^"{}\[\]\\]++|"[^"\\]*+(?:\\.[^"\\]*+)%b")%b' % (EVERY, EVERY), re.DOTALL)
_KINDS = bytes(
    1 if byte in b"{[" else 255 if byte in b"}]" else byte if byte in b'"\\' else 0
    for byte in range(256)
)
"""What each byte does to the depth, as a signed one; quotes and backslashes stay."""
_ESCAPE = re.compile(rb"[\2\\]")
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)%b' % EVERY, re.DOTALL)


class _Request(msgspec.Struct):
    # Not decoded with the rest: a client may put millions of values here.
    model: Raw = Raw()
    stream: Raw = Raw()


_members = MemberReader(_Request, numbers=False)
_string = msgspec.json.Decoder(str).decode
_BOOLEANS = {b"true": True, b"false": False}


class BodyReader:
    """Reads one request body.

    Args:
        headers: the request's headers.
        max_bytes: the capture bound; of a longer body nothing is learned.
        ttls: whether to learn if caching is asked for an hour: for that a body has to be searched
            to its end.
        dialect: how its answer spells usage, and it asks for caching.
        prefixes: digests what can be cached; None where nobody wants to know.
    """

    def __init__(
        self,
        headers: RawHeaders,
        max_bytes: int,
        *,
        ttls: bool = False,
        dialect: Dialect = Dialect.ANTHROPIC,
        prefixes: PrefixReader | None = None,
    ) -> None:
        self._prefixes = prefixes
        self._ttls = ttls
        self._mark = mark_of(dialect)
        self._max_bytes = max_bytes
        self._size = 0
        self._tokens: int | None = None
        """How many values a large body may have; None for one that is not so large."""
        self._facts: RequestFacts | None = None
        self._chunks: list[bytes] = []
        self._scanner: _Scanner | None = None
        fields = first_values(headers)
        if b"content-encoding" in fields and codings_of(headers):
            # LiteLLM decodes no request coding either: it answers 400.
            self._facts = RequestFacts()
            return
        length = fields.get(b"content-length", b"").strip()
        if not length.isdigit() or int(length) > _WHOLE_BYTES:
            self._scanner = _Scanner(self._ttls, self._mark)
        elif int(length) > _COUNTED_FROM_BYTES:
            self._tokens = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        if self._facts is not None:
            return
        self._size += len(chunk)
        if self._size > self._max_bytes:
            self._facts = RequestFacts()
            self._chunks.clear()
            self._scanner = None
        elif self._scanner is not None:
            self._scanner.feed(chunk)
        else:
            self._chunks.append(chunk)
            if self._tokens is not None:
                self._tokens += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")

    def finish(self) -> Iterator[None]:
        """Work off what is left, in steps between which the loop may run."""
        if self._facts is not None:
            return
        if self._scanner is None:
            body = b"".join(self._chunks)
            self._chunks.clear()
            large = len(body) > _STEP_BYTES
            if (self._tokens or 0) <= _MAX_TOKENS:
                prefixes, prompt = self._prefixes, None
                if prefixes is not None and prefixes.fits(body):
                    if large:
                        yield
                    prompt = prefixes.read(body)
                if large:
                    yield
                request = prompt or _members.strict(body)
                if request is not None:
                    if large and prompt is None:
                        yield
                    asking = Asking(self._ttls, self._mark)
                    plan = None
                    if prefixes is not None and prompt is not None:
                        plan = prefixes.plan(prompt)
                        if large:
                            yield
                    if prefixes is not None and plan is not None:
                        marks = prefixes.search(prompt, plan, asking)
                    else:
                        marks = asking.count(body)
                    self._facts = facts = _facts(request, asking.found)
                    wanted = facts.caching_asked or (prefixes is not None and prefixes.automatic)
                    if prefixes is not None and prompt is not None and wanted:
                        if large:
                            yield
                        prefix = yield from prefixes.prefix(prompt, plan, marks, in_steps=large)
                        self._facts = facts._replace(prefix=prefix)
                    return
            # Too much for one step, or perhaps text that was cut inside an emoji, which
            # LiteLLM's decoder takes.
            if large:
                yield
            self._scanner = _Scanner(self._ttls, self._mark)
            for start in range(0, len(body), _DENSE_STEP_BYTES):
                self._scanner.feed(body[start : start + _DENSE_STEP_BYTES])
                if large:
                    yield
        elif self._size > _STEP_BYTES:
            yield
        self._facts = self._scanner.facts()

    def facts(self) -> RequestFacts:
        """Say what was learned; all fields are None before `finish` was exhausted."""
        return self._facts or RequestFacts()


class _Scanner:
    """Goes through a JSON object in chunks and keeps its top level.

    `_depth` is 0 before the body's own brace and after it, 1 within it. What cannot be JSON, or
    has too much at its top, is lost: it is looked at no further.
    """

    __slots__ = (
        "_asking",
        "_depth",
        "_escaped",
        "_in_string",
        "_lost",
        "_quotes",
        "_top",
        "_values",
    )

    def __init__(self, ttls: bool, mark: Mark) -> None:
        self._asking = Asking(ttls, mark)
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._top = bytearray()
        self._quotes = self._values = 0
        self._lost = False

    def feed(self, chunk: bytes) -> None:
        if self._lost:
            return
        self._asking.feed(chunk)
        at = 0
        if self._in_string:
            at = self._rest_of_string(chunk)
            self._keep(chunk[:at])
        dense = chunk.count(b"[") + chunk.count(b"{") > len(chunk) // _DENSE
        patience, begin, depths = 0 if dense else _PATIENCE, 0, _NO_DEPTHS
        while at < len(chunk) and not self._lost:
            # Below the top level nothing is kept: there brackets go in pairs.
            if self._depth > 1 and not patience:
                if depths is _NO_DEPTHS:
                    begin, depths = at, _depths(chunk, at, self._depth)
                at, self._depth = _up(depths, at - begin)
                at += begin
                if self._depth == 1:
                    continue
            elif self._depth > 1:
                patience -= 1
                match = SHALLOW.match(chunk, at)
                assert match is not None  # the pattern takes the empty string
                at = match.end()
            else:
                match = _FLAT.match(chunk, at)
                assert match is not None  # the pattern takes the empty string
                self._keep(chunk[at : match.end()])
                at = match.end()
            if at == len(chunk):
                return
            byte = chunk[at]
            at += 1
            if byte == 0x22:  # a string that this chunk does not end
                self._in_string = True
                self._keep(b'"')
                end = at + self._rest_of_string(chunk[at:])
                self._keep(chunk[at:end])
                at = end
            elif byte == 0x5C:
                self._lose()  # JSON has backslashes in strings alone
            elif byte in b"{[":
                self._open(byte)
            else:
                self._close(byte)

    def _open(self, byte: int) -> None:
        if self._depth == 1:
            self._keep(b"0")
            self._values += 1
        self._depth += 1
        if self._depth == 1:
            # There is no second value behind the first.
            if self._top:
                self._lose()
            self._keep(b"{" if byte == 0x7B else b"[")
        if self._values > _MAX_TOP_VALUES:
            self._lose()

    def _close(self, byte: int) -> None:
        if self._depth == 1:
            self._keep(b"}" if byte == 0x7D else b"]")
        self._depth -= 1
        if self._depth < 0:
            self._lose()

    def facts(self) -> RequestFacts:
        if self._lost or self._depth or self._in_string:
            return RequestFacts()
        request = _members.lenient(bytes(self._top))
        return RequestFacts() if request is None else _facts(request, self._asking.finish())

    def _rest_of_string(self, chunk: bytes) -> int:
        """Return where in the chunk the open string ends; the chunk's length if it does not."""
        start = 1 if self._escaped and chunk else 0
        match = _STRING_REST.match(chunk, start)
        assert match is not None  # the pattern takes the empty string
        end = match.end()
        if end < len(chunk) and chunk[end] == 0x22:
            self._in_string = self._escaped = False
            return end + 1
        # What stopped the match short of the end is a backslash, the chunk's last byte.
        self._escaped = end < len(chunk) if chunk else self._escaped
        return len(chunk)

    def _keep(self, piece: bytes) -> None:
        if self._depth != 1 or self._lost:
            return
        self._top += piece
        self._quotes += piece.count(b'"')
        if len(self._top) > _MAX_TOP_BYTES or self._quotes > _MAX_TOP_QUOTES:
            self._lose()

    def _lose(self) -> None:
        self._lost = True
        self._top.clear()


_NO_DEPTHS: list[int] = []


def _depths(chunk: bytes, begin: int, depth: int) -> list[int]:
    """Say how deep each place of a chunk is, from one outside of strings on.

    For a bracket this takes a twentieth of the time that a match takes.

    Returns:
        How deep it is before each byte, and at the end, which may be a string that does not end,
        or a backslash outside of strings.
    """
    text = chunk[begin:].translate(_KINDS)
    # All steps keep the length: a place in `text` is one in the chunk.
    if b"\\" in text:
        text = text.replace(b"\\\\", b"\2\2").replace(b'\\"', b"\2\2")
    parts = text.split(b'"')
    if len(parts) % 2 == 0:
        parts.pop()
    parts[1::2] = [bytes(len(part)) for part in parts[1::2]]
    text = b"\0".join(parts)
    stop = _ESCAPE.search(text)
    if stop is not None:
        text = text[: stop.start()]
    ends = text.count(b"\xff")
    if depth - ends > 1:
        # The top level is not reached, and how deep it is in between nobody asks.
        return [depth] * len(text) + [depth + text.count(b"\1") - ends]
    return list(accumulate(array("b", text), initial=depth))


def _up(depths: list[int], at: int) -> tuple[int, int]:
    """Return the next place at the top level, or the end, and how deep that is."""
    try:
        return depths.index(1, at), 1
    except ValueError:
        return len(depths) - 1, depths[-1]


def _facts(request: _Request | Prompt, asked: Asked) -> RequestFacts:
    return RequestFacts(_text(request.model), _boolean(request.stream), asked.asked, asked.hour)


def _text(value: object) -> str | None:
    """Read a short string, of which one decoder leaves the JSON and the other makes a `str`."""
    if isinstance(value, Raw):
        text = bytes(value)
        if not text.startswith(b'"') or len(text) > _MAX_VALUE_BYTES:
            return None
        try:
            return _string(text)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # it is not UTF-8
            value = json.loads(text.decode("utf-8", "replace"))
    return value if isinstance(value, str) and len(value) <= _MAX_VALUE_BYTES else None


def _boolean(value: object) -> bool | None:
    if isinstance(value, Raw):
        return _BOOLEANS.get(bytes(value))
    return value if isinstance(value, bool) else None
