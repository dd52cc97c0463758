"""Anthropic Messages: where `usage` stands in JSON and in event streams, and how it merges.

Field names and places: Anthropic's API reference and `anthropic-sdk-python`
(`types/usage.py`, `types/message_delta_usage.py`, `lib/streaming/_messages.py`), seen
2026-11; what LiteLLM makes of them is named at the branch that it needs.

The merge rule of a stream is the SDK's own: a later value that is not null replaces the
earlier one, field by field; nothing is added and no maximum is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sidecar.exchange import End, Observation, Status, Usage
from sidecar.observe.members import MemberReader
from sidecar.observe.sse import Event

__all__ = ["END_NEEDLES", "NEEDLES", "USAGE_NEEDLE", "StreamReading", "read_message"]

USAGE_NEEDLE = b'"usage"'
NEEDLES = (USAGE_NEEDLE,)
"""This is in every event that can change what is counted. Inside a JSON string a quote is
escaped, so text that talks of "usage" holds no needle."""

END_NEEDLES = (b'"error"', b"message_stop")
"""One of these is in every event that tells how a stream ended."""

_MAX_COUNT = 2**53
"""Largest count believed: above it a JSON number need not be the number that was meant
(RFC 8259 section 6)."""

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "input_tokens": (),
    "output_tokens": (),
    # Bedrock spells these in its own way where it adds them to a message_stop.
    "cache_read_input_tokens": ("cacheReadInputTokens", "cacheReadInputTokenCount"),
    "cache_creation_input_tokens": ("cacheWriteInputTokens", "cacheWriteInputTokenCount"),
}
_SPLIT = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
_INPUT_SIDE = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class _Envelope(msgspec.Struct):
    """The members of a message, or of a stream event, that are looked at."""

    type: Any = None
    id: Any = None
    model: Any = None
    message: Any = None
    usage: Any = None
    error: Any = None


_read_envelope = MemberReader(_Envelope).lenient


def read_message(body: bytes, end: End) -> Observation:
    """Read a whole JSON answer.

    Args:
        body: the decoded body, as far as it came.
    """
    envelope = _read_envelope(body)
    if envelope is None:
        if end is End.COMPLETE and body.strip():
            return Observation(Status.INVALID, fault="the body is not a JSON object")
        status = Status.MISSING if end is End.COMPLETE else Status.PARTIAL
        return Observation(status, fault="the body ended early" if body else "the body is empty")
    reading = StreamReading()
    reading.take_message(envelope)
    if not reading.reported and (envelope.type == "error" or envelope.error is not None):
        return Observation(Status.ERROR, fault="the body is an error")
    return reading.finish(End.COMPLETE, oversized=False)


class StreamReading:
    """What the events of one stream said so far."""

    __slots__ = (
        "_closed",
        "_errors",
        "_faults",
        "_id",
        "_merged",
        "_model",
        "_started",
        "_stopped",
    )

    def __init__(self) -> None:
        self._merged: dict[str, int] = {}
        self._faults: list[str] = []
        self._errors = 0
        self._started = False
        self._closed = False
        """Whether a usage came behind the first one, which does not count the output."""
        self._stopped = False
        self._model: str | None = None
        self._id: str | None = None

    @property
    def reported(self) -> bool:
        """Whether any count was seen."""
        return bool(self._merged)

    @property
    def usage(self) -> Usage:
        """What is known so far."""
        return Usage(**self._merged)

    def take_event(self, event: Event) -> Sequence[str] | None:
        """Take the next event that held a needle.

        Returns:
            The path of the member in its data that was taken for the usage; empty for none.
            None where the data are no JSON object.
        """
        if not event.data:
            # LiteLLM 1.100 may send a ping in the middle of a frame, and tear it.
            if event.stray:
                self._faults.append("an event could not be read")
            return None
        envelope = _read_envelope(event.data)
        if envelope is None:
            if event.name == b"error":
                self._errors += 1
            elif event.terminated and event.data.strip() != b"[DONE]":
                self._faults.append("an event is not a JSON object")
            return None
        kind = envelope.type
        if not isinstance(kind, str):
            kind = event.name.decode("latin-1")
        # LiteLLM 1.83 reports a failure in mid-stream as `data: {"error": {...}}`, without
        # an event name and without a type.
        if event.name == b"error" or kind == "error" or envelope.error is not None:
            self._errors += 1
        elif kind == "message_start":
            if self._started:
                # LiteLLM 1.83's chat adapter can mix the events of concurrent streams.
                self._faults.append("a second message_start")
            self._started = True
            self._take_start(envelope.message)
            return ("message", "usage")
        elif kind == "message_delta":
            if not self._started:
                self._faults.append("a message_delta without a message_start")
                self._started = True
            self._closed = True
            self._take_usage(envelope.usage)
            return ("usage",)
        elif kind == "message_stop":
            self._closed = self._closed or envelope.usage is not None
            self._take_usage(envelope.usage)
            self._stopped = self._stopped or event.terminated
            return ("usage",)
        elif kind == "message":
            # LiteLLM 1.83's guardrails send a whole message in one frame.
            self.take_message(envelope)
            return ("usage",)
        return ()

    def take_message(self, envelope: _Envelope) -> None:
        """Take a whole message."""
        self._started = self._closed = self._stopped = True
        self._take_names(envelope.id, envelope.model)
        self._take_usage(envelope.usage)

    def finish(self, end: End, *, oversized: bool) -> Observation:
        """Say what the stream said.

        Args:
            oversized: whether an event had to be skipped that may have held a usage.
        """
        fault = ""
        if oversized:
            # First, for what is missing with it makes faults of its own.
            status, fault = Status.OVERSIZED, "an event with usage is larger than the bound"
        elif self._faults:
            status, fault = Status.INVALID, self._faults[0]
        elif self._errors:
            status = Status.PARTIAL if self._merged else Status.ERROR
            fault = "an error event"
        elif self._stopped and self._merged and self._closed:
            status = Status.COMPLETE
        elif self._stopped and self._merged:
            # It may have been torn where this could not be seen.
            status, fault = Status.INVALID, "a message_stop without a message_delta"
        elif not self._merged and (self._stopped or end is End.COMPLETE):
            status, fault = Status.MISSING, "no usage was sent"
        else:
            status, fault = Status.PARTIAL, "the stream ended without a message_stop"
        return Observation(status, self.usage, self._model, self._id, fault)

    def _take_start(self, message: object) -> None:
        if isinstance(message, dict):
            self._take_names(message.get("id"), message.get("model"))
            self._take_usage(message.get("usage"))
        elif message is not None:
            self._faults.append("message is not an object")

    def _take_names(self, message_id: object, model: object) -> None:
        if isinstance(message_id, str):
            self._id = message_id
        if isinstance(model, str):
            self._model = model

    def _take_usage(self, usage: object) -> None:
        """Merge one usage object into what is known."""
        if usage is None:
            return
        if not isinstance(usage, dict):
            self._faults.append("usage is not an object")
            return
        counts: dict[str, int] = {}
        for field, aliases in _ALIASES.items():
            value = usage.get(field)
            for alias in aliases:
                if value is None:
                    value = usage.get(alias)
            if value is not None:
                self._take_count(counts, field, value)
        split = usage.get("cache_creation")
        if isinstance(split, dict):
            self._take_split(counts, split)
        elif split is not None:
            self._faults.append("cache_creation is not an object")
        merged = self._merged
        if (
            merged
            and not any(counts.get(field) for field in _INPUT_SIDE)
            and any(merged.get(field) for field in _INPUT_SIDE)
        ):
            # Some back ends close with an all-zero usage: it does not undo what the start said.
            for field in _INPUT_SIDE:
                counts.pop(field, None)
        merged.update(counts)

    def _take_split(self, counts: dict[str, int], split: dict[str, object]) -> None:
        """Take what was written for each TTL."""
        covered = 0
        for field in _SPLIT:
            value = split.get(field)
            if value is not None:
                self._take_count(counts, field, value)
                covered += counts.get(field, 0)
        total = counts.get("cache_creation_input_tokens")
        if total is not None and covered > total:
            self._faults.append("the split of the written tokens exceeds their total")

    def _take_count(self, counts: dict[str, int], field: str, value: object) -> None:
        """Take a count: an integer, or a float that is one, from 0 to 2^53."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        # Not `isinstance`: to Python, true and false are integers.
        if type(value) is int and 0 <= value <= _MAX_COUNT:
            counts[field] = value
        else:
            self._faults.append(f"{field} is not a count")
