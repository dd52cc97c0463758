"""Reading what a request asked for: its model, whether it streams, whether it asks for caching.

Bodies come in any size up to the capture bound, and the event loop must not stand still for
them. Up to `_WHOLE_BYTES`, which a C decoder goes through in about 2 ms, a body is kept and
decoded at its end. A larger one, or one of unknown length, is never kept: it is scanned as it
passes, and only the members of its top level remain, with every object and array in them
replaced by `0`.

No I/O, no clock; nothing raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from sidecar.exchange import Dialect, RawHeaders, RequestFacts, first_values
from sidecar.observe.decoding import codings_of
from sidecar.observe.members import EVERY, SHALLOW, MemberReader
from sidecar.observe.prefix import PrefixReader, Prompt

__all__ = ["BodyReader"]

_WHOLE_BYTES = 4 * 1024 * 1024
_STEP_BYTES = 64 * 1024
"""From this size on, what is done with a whole body is done in more than one step."""
_DENSE_STEP_BYTES = 8 * 1024
"""How much is scanned between two chances for the loop to do other work: 3 ms, if all of it are
brackets."""
_MAX_TOP_BYTES = 1024 * 1024
"""Longest top level that is kept, in bytes. A system prompt given as a string belongs to it."""


class _Mark(NamedTuple):
    """How a dialect asks for caching."""

    key: bytes
    whole: re.Pattern[bytes]
    """The value tells a real breakpoint from a tool parameter that happens to have this name."""


_CACHE_CONTROL = _Mark(
    b'"cache_control"', re.compile(rb'"cache_control"\s*:\s*\{[^{}]*"ephemeral"[^{}]*')
)
_CACHE_POINT = _Mark(b'"cachePoint"', re.compile(rb'"cachePoint"\s*:\s*\{[^{}]*"default"[^{}]*'))
_WINDOW_BYTES = 24 * 1024
_MARK_BYTES = 256
"""How much of the text is looked at from a key on: a whole one without blanks has 65 bytes."""
_MAX_KEYS = 1024
"""So many keys are looked at; if none of them asks, whether the request does is not known."""
_COUNTED_FROM_BYTES = 1024 * 1024
_MAX_TOKENS = 256 * 1024
"""A body with more values than the decoder goes through in about 2 ms is scanned in steps."""

# Whole strings and everything else that is neither a bracket nor an unfinished string. The
# possessive quantifiers keep the matcher from saving places to come back to.
_FLAT = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)%b")%b' % (EVERY, EVERY), re.DOTALL)
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)%b' % EVERY, re.DOTALL)


class _Asked(NamedTuple):
    """What a text asks for."""

    asked: bool | None
    hour: bool | None


class _Asking:
    """Looks for what asks for caching in a text that comes in pieces.

    Each key is judged by itself and the bytes behind it, the same ones however the text is cut.

    Args:
        ttls: whether to look for one that asks for an hour, too.
    """

    __slots__ = ("_asked", "_hour", "_mark", "_tail", "_ttls", "keys")

    def __init__(self, ttls: bool, mark: _Mark) -> None:
        self._ttls = ttls
        self._mark = mark
        self._asked = self._hour = False
        self._tail = b""
        self.keys = 0
        """How many were looked at."""

    def feed(self, piece: bytes) -> None:
        """Look at the keys that have enough bytes behind them."""
        if self._known:
            return
        text = self._tail + piece if self._tail else piece
        self.search(text, len(text) - _MARK_BYTES + 1)
        self._tail = text[1 - _MARK_BYTES :]

    def finish(self) -> _Asked:
        """Look at the others."""
        self.search(self._tail, len(self._tail))
        return self.found

    def search(self, text: bytes, end: int) -> int:
        """Look at the keys that begin before `end`; returns up to where that was needed."""
        # To find a constant is ten times as quick as to search for a pattern.
        key, whole = self._mark
        at = _found(text, key, 0)
        while 0 <= at < end and not self._known:
            self.keys += 1
            found = whole.match(text, at, at + _MARK_BYTES)
            if found is not None:
                self._asked = True
                self._hour = b'"1h"' in found[0]
            at += 1
            if not self._known:
                at = _found(text, key, at)
        return at if at >= 0 else len(text)

    @property
    def _known(self) -> bool:
        """Whether the rest tells no more, or too much was looked at."""
        return (self._asked and (self._hour or not self._ttls)) or self.keys >= _MAX_KEYS

    @property
    def found(self) -> _Asked:
        """What was found."""
        if self.keys >= _MAX_KEYS and not (self._asked and (self._hour or not self._ttls)):
            return _Asked(self._asked or None, None)
        return _Asked(self._asked, self._hour if self._ttls else None)


class _Request(msgspec.Struct):
    model: Any = None
    stream: Any = None


_members = MemberReader(_Request)


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
        # LiteLLM takes Anthropic's breakpoints on OpenAI's routes, too.
        converse = dialect is Dialect.BEDROCK_CONVERSE
        self._mark = _CACHE_POINT if converse else _CACHE_CONTROL
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
            if (self._tokens or 0) <= _MAX_TOKENS:
                prefixes = self._prefixes
                prompt = prefixes.read(body) if prefixes is not None else None
                request = prompt or _members.strict(body)
                if request is not None:
                    if len(body) > _STEP_BYTES:
                        yield
                    asking = _Asking(self._ttls, self._mark)
                    searched = asking.search(body, len(body))
                    self._facts = facts = _facts(request, asking.found)
                    wanted = facts.caching_asked or (prefixes is not None and prefixes.automatic)
                    if prefixes is not None and prompt is not None and wanted:
                        marks = asking.keys + body.count(self._mark.key, searched)
                        if len(body) > _STEP_BYTES:
                            yield
                        self._facts = facts._replace(prefix=prefixes.prefix(prompt, marks))
                    return
            # Too much for one step, or perhaps text that was cut inside an emoji, which
            # LiteLLM's decoder takes.
            self._scanner = _Scanner(self._ttls, self._mark)
            for start in range(0, len(body), _DENSE_STEP_BYTES):
                self._scanner.feed(body[start : start + _DENSE_STEP_BYTES])
                yield
        self._facts = self._scanner.facts()

    def facts(self) -> RequestFacts:
        """Say what was learned; all fields are None before `finish` was exhausted."""
        return self._facts or RequestFacts()


class _Scanner:
    """Goes through a JSON object in chunks and keeps its top level.

    `_depth` is 0 before the body's own brace and after it, 1 within it.
    """

    __slots__ = (
        "_asking",
        "_depth",
        "_escaped",
        "_in_string",
        "_overflow",
        "_top",
    )

    def __init__(self, ttls: bool, mark: _Mark) -> None:
        self._asking = _Asking(ttls, mark)
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._top = bytearray()
        self._overflow = False

    def feed(self, chunk: bytes) -> None:
        self._asking.feed(chunk)
        at = 0
        if self._in_string:
            at = self._rest_of_string(chunk)
            self._keep(chunk[:at])
        while at < len(chunk):
            # Below the top level nothing is kept: there brackets go in pairs.
            match = (SHALLOW if self._depth > 1 else _FLAT).match(chunk, at)
            assert match is not None  # the pattern takes the empty string
            flat_end = match.end()
            self._keep(chunk[at:flat_end])
            if flat_end == len(chunk):
                return
            byte = chunk[flat_end]
            at = flat_end + 1
            if byte == 0x22:  # a string that this chunk does not end
                self._in_string = True
                self._keep(b'"')
                end = at + self._rest_of_string(chunk[at:])
                self._keep(chunk[at:end])
                at = end
            elif byte in b"{[":
                if self._depth == 1:
                    self._keep(b"0")
                self._depth += 1
                if self._depth == 1:
                    self._keep(b"{" if byte == 0x7B else b"[")
            else:
                if self._depth == 1:
                    self._keep(b"}" if byte == 0x7D else b"]")
                self._depth -= 1

    def facts(self) -> RequestFacts:
        if self._overflow or self._depth or self._in_string:
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
        if self._depth != 1 or self._overflow:
            return
        self._top += piece
        if len(self._top) > _MAX_TOP_BYTES:
            self._overflow = True
            self._top.clear()


def _found(text: bytes, key: bytes, at: int) -> int:
    """Find a short key from a place on; -1 without one.

    In windows that are short enough for CPython to search them by skipping (`fastsearch.h`; from
    30,000 bytes on it takes another way), this is two to three times as quick.
    """
    while True:
        found = text.find(key, at, at + _WINDOW_BYTES)
        at += _WINDOW_BYTES - len(key) + 1
        if found >= 0 or at + len(key) > len(text):
            return found


def _facts(request: _Request | Prompt, asked: _Asked) -> RequestFacts:
    return RequestFacts(
        request.model if isinstance(request.model, str) else None,
        request.stream if isinstance(request.stream, bool) else None,
        asked.asked,
        asked.hour,
    )
