"""Amazon Bedrock: where usage stands in what its models answer, as JSON and as event streams.

Field names and places: Bedrock's API reference (`Converse`, `ConverseStream`, `InvokeModel`,
`InvokeModelWithResponseStream`), seen 2026-11. `Converse` speaks one dialect for all models. An
invocation passes on what the model's maker says: Anthropic's models speak `anthropic`'s, Amazon's
own Nova that of `Converse`, Mistral's OpenAI's; of the rest nothing is read.

As with Anthropic the input leaves out what was read from or written to the cache.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sidecar.exchange import NO_REMARKS, NO_USAGE, End, Observation, Remarks, Status, Usage
from sidecar.observe import anthropic, openai
from sidecar.observe.counts import count_of, status_of, unreadable
from sidecar.observe.event_stream import Message
from sidecar.observe.members import MemberReader
from sidecar.observe.sse import Event

__all__ = ["ConverseStream", "InvokeStream", "read_converse", "read_invocation"]

_COUNTS = {
    "input_tokens": ("inputTokens",),
    "output_tokens": ("outputTokens",),
    "cache_read_input_tokens": ("cacheReadInputTokens", "cacheReadInputTokenCount"),
    "cache_creation_input_tokens": ("cacheWriteInputTokens", "cacheWriteInputTokenCount"),
}
_TTLS = {"5m": "ephemeral_5m_input_tokens", "1h": "ephemeral_1h_input_tokens"}

_NEEDLES = (*anthropic.NEEDLES, *anthropic.END_NEEDLES)


class _Converse(msgspec.Struct):
    usage: Any = None
    stopReason: Any = None  # noqa: N815 - the name on the wire


class _Shape(msgspec.Struct):
    """What tells the dialects of invocations apart."""

    usage: Any = None
    metadata: Any = None


class _Chunk(msgspec.Struct):
    event: bytes = msgspec.field(name="bytes")
    """The event, in Base64; the decoder undoes that."""


_read_converse = MemberReader(_Converse).lenient
_read_shape = MemberReader(_Shape).lenient
_read_chunk = msgspec.json.Decoder(_Chunk).decode


def read_converse(body: bytes, end: End) -> Observation:
    """Read a whole JSON answer of `Converse`.

    Args:
        body: the decoded body, as far as it came.
    """
    answer = _read_converse(body)
    if answer is None:
        return unreadable(body, end)
    faults: list[str] = []
    usage = _usage(answer.usage, faults)
    status, fault = status_of(
        End.COMPLETE,
        faults=faults,
        oversized=False,
        failed=False,
        reported=usage != NO_USAGE,
        stopped=True,
        stop="",
    )
    return Observation(status, usage, fault=fault, remarks=_remarks(answer.stopReason))


def read_invocation(body: bytes, end: End) -> Observation:
    """Read a whole JSON answer of `InvokeModel`.

    Args:
        body: the decoded body, as far as it came.
    """
    answer = _read_shape(body)
    usage = None if answer is None else answer.usage
    if isinstance(usage, dict):
        if "inputTokens" in usage:
            return read_converse(body, end)
        if "prompt_tokens" in usage:
            return openai.read_chat(body, end)
    return anthropic.read_message(body, end)


class ConverseStream:
    """What the messages of one stream of `ConverseStream` said so far."""

    __slots__ = ("_failed", "_faults", "_remarks", "_stopped", "_usage", "first_token_seen")

    def __init__(self) -> None:
        self._usage = NO_USAGE
        self._faults: list[str] = []
        self._remarks = NO_REMARKS
        self._failed = False
        self._stopped = False
        self.first_token_seen = False

    def take_message(self, message: Message) -> None:
        """Take the next message."""
        del self._faults[1:]  # the first is told; a stream may have any number
        kind = message.headers.get(b":event-type")
        if kind == b"contentBlockDelta":
            self.first_token_seen = True
        elif kind in (b"messageStop", b"metadata"):
            # In this order; they are the last ones.
            answer = _read_converse(message.payload)
            if answer is None:
                self._faults.append("an event is not a JSON object")
            elif kind == b"metadata":
                self.take_usage(answer.usage)
            else:
                self._remarks = _remarks(answer.stopReason)
        elif message.headers.get(b":message-type") != b"event":
            self._failed = True

    def take_usage(self, usage: object) -> None:
        """Take the usage that closes a stream."""
        self._usage = _usage(usage, self._faults)
        self._stopped = True

    def finish(self, end: End, *, oversized: bool, fault: str) -> Observation:
        """Say what the stream said.

        Args:
            oversized: whether a message had to be skipped.
            fault: what is wrong with its framing.
        """
        if fault:
            self._faults.append(fault)
        status, fault = status_of(
            end,
            faults=self._faults,
            oversized=oversized and not self._stopped,
            failed=self._failed,
            reported=self._usage != NO_USAGE,
            stopped=self._stopped,
            stop="its metadata",
        )
        return Observation(status, self._usage, fault=fault, remarks=self._remarks)


class InvokeStream:
    """What the messages of one stream of `InvokeModelWithResponseStream` said so far."""

    __slots__ = ("_anthropic", "_converse", "_faults", "first_token_seen")

    def __init__(self) -> None:
        self._anthropic = anthropic.StreamReading()
        self._converse: ConverseStream | None = None
        self._faults: list[str] = []
        self.first_token_seen = False

    def take_message(self, message: Message) -> None:
        """Take the next message."""
        del self._faults[1:]  # the first is told; a stream may have any number
        if message.headers.get(b":message-type") != b"event":
            self._anthropic.take_event(Event(b"error", message.payload or b"{}"))
            return
        try:
            event = _read_chunk(message.payload).event
        except msgspec.MsgspecError:
            self._faults.append("an event is not a JSON object")
            return
        # Nova's events have names in the manner of Converse.
        if not self.first_token_seen:
            self.first_token_seen = b"content_block_delta" in event or b"contentBlockDelta" in event
        if not any(needle in event for needle in _NEEDLES):
            return
        if b'"metadata"' in event:
            shape = _read_shape(event)
            if shape is not None and isinstance(shape.metadata, dict):
                self._converse = ConverseStream()
                self._converse.take_usage(shape.metadata.get("usage"))
                return
        self._anthropic.take_event(Event(b"", event))

    def finish(self, end: End, *, oversized: bool, fault: str) -> Observation:
        """Say what the stream said. See `ConverseStream.finish`."""
        fault = fault or next(iter(self._faults), "")
        if self._converse is not None:
            return self._converse.finish(end, oversized=oversized, fault=fault)
        seen = self._anthropic.finish(end, oversized=oversized)
        return seen._replace(status=Status.INVALID, fault=fault) if fault else seen


def _remarks(stop_reason: object) -> Remarks:
    return Remarks(stop_reason) if isinstance(stop_reason, str) else NO_REMARKS


def _usage(usage: object, faults: list[str]) -> Usage:
    """Read a usage in the names of `Converse`."""
    if not isinstance(usage, dict):
        if usage is not None:
            faults.append("usage is not an object")
        return NO_USAGE
    counts: dict[str, int] = {}
    for field, names in _COUNTS.items():
        value = next((usage[name] for name in names if usage.get(name) is not None), None)
        _take_count(counts, field, value, faults)
    details = usage.get("cacheDetails")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and detail.get("ttl") in _TTLS:
            _take_count(counts, _TTLS[detail["ttl"]], detail.get("inputTokens"), faults)
    return Usage(**counts)


def _take_count(counts: dict[str, int], field: str, value: object, faults: list[str]) -> None:
    if value is None:
        return
    count = count_of(value)
    if count is None:
        faults.append(f"{field} is not a count")
    else:
        counts[field] = counts.get(field, 0) + count
