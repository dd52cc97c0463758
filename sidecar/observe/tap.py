"""The tap: one object for each response, which reads a copy of its bytes as they pass.

It knows which reader fits a response (by the response's own content type and coding, not by
what the request asked for), and the bounds. It must not know what a usage looks like, nor do
any I/O, read a clock or count anything.

The contract: `feed` and `finish`; any split of the same bytes gives the same observation; the
work is linear; memory is bounded by `MAX_JSON_BYTES`, `sse.MAX_EVENT_BYTES` or
`event_stream.MAX_MESSAGE_BYTES`. The public
methods do not raise for any input; the caller contains what a bug may raise all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from sidecar.exchange import (
    Dialect,
    End,
    Observation,
    Outcome,
    RawHeaders,
    RequestFacts,
    Status,
    Tap,
    first_values,
    header,
)
from sidecar.observe import anthropic, bedrock, openai
from sidecar.observe.decoding import DecodingError, ExpansionError, codings_of, decoder_for
from sidecar.observe.event_stream import Message, MessageReader
from sidecar.observe.sse import Event, EventFinder

__all__ = [
    "MAX_JSON_BYTES",
    "MESSAGES_TYPE",
    "STREAM_TYPE",
    "is_json",
    "media_type",
    "outcome_of",
    "tap_for",
]

MAX_JSON_BYTES = 4 * 1024 * 1024
"""Longest JSON body that is read, in bytes after decoding. The longest answer of a current
model, 128k tokens of text, is about 1 MB; results of server tools add to that."""

STREAM_TYPE = b"text/event-stream"
MESSAGES_TYPE = b"application/vnd.amazon.eventstream"


class _EventReading(Protocol):
    def take_event(self, event: Event) -> object: ...

    def finish(self, end: End, *, oversized: bool) -> Observation: ...


class _MessageReading(Protocol):
    first_token_seen: bool

    def take_message(self, message: Message) -> None: ...

    def finish(self, end: End, *, oversized: bool, fault: str) -> Observation: ...


class _Events(NamedTuple):
    """What differs between the event streams of dialects."""

    needles: Sequence[bytes]
    """What the events of interest hold."""
    end_needles: Sequence[bytes]
    """What those hold that are of interest at the end of a stream."""
    reading: Callable[[], _EventReading]
    """Makes what takes the events of one stream."""
    first_token: bytes
    """What the first streamed piece of content holds, and nothing before it."""


class _DialectReading(NamedTuple):
    """What differs between dialects."""

    read_message: Callable[[bytes, End], Observation]
    """Reads a whole JSON body."""
    events: _Events | None = None
    """None where answers do not come as `text/event-stream`."""
    messages: Callable[[], _MessageReading] | None = None
    """Makes what takes the messages of one AWS event stream; None where there is none."""


_DIALECTS = {
    Dialect.ANTHROPIC: _DialectReading(
        anthropic.read_message,
        _Events(
            anthropic.NEEDLES,
            anthropic.END_NEEDLES,
            anthropic.StreamReading,
            b"content_block_delta",
        ),
    ),
    Dialect.OPENAI_CHAT: _DialectReading(
        openai.read_chat,
        _Events(openai.CHAT_NEEDLES, openai.CHAT_END_NEEDLES, openai.ChatReading, b'"choices"'),
    ),
    Dialect.OPENAI_RESPONSES: _DialectReading(
        openai.read_response,
        _Events(
            openai.RESPONSE_NEEDLES,
            openai.RESPONSE_END_NEEDLES,
            openai.ResponseReading,
            b".delta",
        ),
    ),
    Dialect.BEDROCK_INVOKE: _DialectReading(bedrock.read_invocation, messages=bedrock.InvokeStream),
    Dialect.BEDROCK_CONVERSE: _DialectReading(
        bedrock.read_converse, messages=bedrock.ConverseStream
    ),
}


class _JsonReader:
    """Keeps a JSON body until it is whole."""

    first_token_seen: bool = False

    def __init__(self, read_message: Callable[[bytes, End], Observation]) -> None:
        self._read_message = read_message
        self._chunks: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= MAX_JSON_BYTES:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def finish(self, end: End) -> Observation:
        if self._size > MAX_JSON_BYTES:
            return Observation(Status.OVERSIZED, fault="the body is larger than the bound")
        return self._read_message(b"".join(self._chunks), end)


class _StreamReader:
    """Reads an event stream."""

    def __init__(self, dialect: _Events) -> None:
        self.first_token_seen = False
        self._first_token = dialect.first_token
        self._finder = EventFinder(dialect.needles, dialect.end_needles)
        self._reading = dialect.reading()
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        if not self.first_token_seen:
            needle = self._first_token
            border = self._tail + chunk[: len(needle)]
            self.first_token_seen = needle in chunk or needle in border
            whole = chunk if len(chunk) >= len(needle) else border
            self._tail = whole[1 - len(needle) :]
        for event in self._finder.feed(chunk):
            self._reading.take_event(event)

    def finish(self, end: End) -> Observation:
        for event in self._finder.finish():
            self._reading.take_event(event)
        return self._reading.finish(end, oversized=self._finder.oversized)


class _MessagesReader:
    """Reads an AWS event stream."""

    def __init__(self, reading: _MessageReading) -> None:
        self._reading = reading
        self._messages = MessageReader()

    @property
    def first_token_seen(self) -> bool:
        return self._reading.first_token_seen

    def feed(self, chunk: bytes) -> None:
        for message in self._messages.feed(chunk):
            self._reading.take_message(message)

    def finish(self, end: End) -> Observation:
        messages = self._messages
        return self._reading.finish(end, oversized=messages.oversized, fault=messages.fault)


class _Decoded:
    """Puts a decoder before a reader."""

    def __init__(self, codings: bytes, reader: Tap) -> None:
        self._decoder = decoder_for(codings)
        self._codings = codings
        self._reader = reader
        self._error: DecodingError | None = None

    @property
    def first_token_seen(self) -> bool:
        return self._reader.first_token_seen

    def feed(self, chunk: bytes) -> None:
        if self._decoder is None or self._error is not None:
            return
        try:
            for piece in self._decoder.feed(chunk):
                self._reader.feed(piece)
        except DecodingError as exc:
            self._error = exc

    def finish(self, end: End) -> Observation:
        if self._decoder is None:
            shown = self._codings.decode("latin-1")[:64]
            return Observation(Status.ENCODED, fault=f"content-encoding {shown} is not decoded")
        if self._error is None:
            if end is End.COMPLETE and not self._decoder.complete:
                end = End.UPSTREAM_CUT
            return self._reader.finish(end)
        # What was read before the fault is still true.
        seen = self._reader.finish(End.UPSTREAM_CUT)
        oversized = isinstance(self._error, ExpansionError)
        status = Status.OVERSIZED if oversized else Status.INVALID
        return seen._replace(status=status, fault=f"content-encoding: {self._error}")


class _Nothing:
    """Reads nothing, because there is nothing to read."""

    first_token_seen: bool = False

    def __init__(self, status: Status, fault: str) -> None:
        self._observation = Observation(status, fault=fault)

    def feed(self, chunk: bytes) -> None:
        pass

    def finish(self, end: End) -> Observation:
        if self._observation.status is Status.MISSING and end is not End.COMPLETE:
            return self._observation._replace(status=Status.PARTIAL)
        return self._observation


def media_type(headers: RawHeaders) -> bytes:
    """Return the content type in lower case, without its parameters; empty where there is none."""
    return _media_type(header(headers, b"content-type") or b"")


@lru_cache(maxsize=64)
def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


def is_json(content_type: bytes) -> bool:
    """Whether a media type is JSON."""
    return content_type == b"application/json" or content_type.endswith(b"+json")


def tap_for(dialect: Dialect, status_code: int, headers: RawHeaders) -> Tap:
    """Make the tap of one response. See the module for the contract.

    Args:
        headers: the response's headers.
    """
    if not 200 <= status_code < 300:
        return _Nothing(Status.ERROR, f"status {status_code}")
    fields = first_values(headers)
    content_type = _media_type(fields.get(b"content-type", b""))
    reading = _DIALECTS[dialect]
    reader: Tap
    if content_type == STREAM_TYPE and reading.events is not None:
        reader = _StreamReader(reading.events)
    elif content_type in (MESSAGES_TYPE, b"") and reading.messages is not None:
        # LiteLLM 1.83 leaves the type away where it passes such streams through.
        reader = _MessagesReader(reading.messages())
    elif is_json(content_type):
        length = fields.get(b"content-length", b"")
        if length.isdigit() and int(length) > MAX_JSON_BYTES:
            # It would be given up in the end: not even its beginning is kept.
            return _Nothing(Status.OVERSIZED, "the body is larger than the bound")
        reader = _JsonReader(reading.read_message)
    else:
        shown = content_type.decode("latin-1")[:64] or "absent"
        return _Nothing(Status.MISSING, f"the content type is {shown}")
    if b"content-encoding" in fields and (codings := codings_of(headers)):
        return _Decoded(codings, reader)
    return reader


def outcome_of(observation: Observation, facts: RequestFacts) -> Outcome:
    """Say what the prompt cache did for a 2xx answer."""
    usage = observation.usage
    if usage.read_tokens:
        return Outcome.HIT
    if usage.write_tokens:
        return Outcome.WRITE
    if not usage.cache_reported:
        return Outcome.UNREPORTED
    if facts.caching_asked is None:
        return Outcome.UNKNOWN
    # Who reports reads alone, as OpenAI does, caches without being asked.
    asked = facts.caching_asked or not usage.writes_reported
    return Outcome.NOT_CACHED if asked else Outcome.NOT_ASKED
