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

from sidecar.exchange import NO_TERMS, NO_USAGE, End, Observation, Remarks, Status, Terms, Usage
from sidecar.observe.counts import Count, count_of, status_of, unreadable
from sidecar.observe.members import MemberReader, member_of
from sidecar.observe.sse import Event

__all__ = ["END_NEEDLES", "NEEDLES", "USAGE_NEEDLE", "StreamReading", "read_message"]

USAGE_NEEDLE = b'"usage"'
NEEDLES = (USAGE_NEEDLE,)
"""This is in every event that can change what is counted. Inside a JSON string a quote is
escaped, so text that talks of "usage" holds no needle."""

END_NEEDLES = (b'"error"', b"message_stop")
"""One of these is in every event that tells how a stream ended."""

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "input_tokens": (),
    "output_tokens": (),
    # Bedrock spells these in its own way where it adds them to a message_stop.
    "cache_read_input_tokens": ("cacheReadInputTokens", "cacheReadInputTokenCount"),
    "cache_creation_input_tokens": ("cacheWriteInputTokens", "cacheWriteInputTokenCount"),
}
_SPLIT = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


class _PlainSplit(msgspec.Struct, gc=False):
    ephemeral_5m_input_tokens: Count | None = None
    ephemeral_1h_input_tokens: Count | None = None


class _PlainTools(msgspec.Struct, gc=False):
    web_search_requests: Count | None = None
    web_fetch_requests: Count | None = None


class _PlainIteration(msgspec.Struct, gc=False):
    type: str | None = None


class _PlainReason(msgspec.Struct, gc=False):
    type: str | None = None


class _PlainDiagnostics(msgspec.Struct, gc=False):
    cache_miss_reason: str | _PlainReason | None = None


class _PlainDelta(msgspec.Struct, gc=False):
    stop_reason: str | None = None


class _PlainUsage(msgspec.Struct, gc=False):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_creation: _PlainSplit | None = None
    server_tool_use: _PlainTools | None = None
    iterations: list[_PlainIteration] | None = None
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    # Bedrock's names, see `_ALIASES`.
    read_tokens: Count | None = msgspec.field(default=None, name="cacheReadInputTokens")
    read_token_count: Count | None = msgspec.field(default=None, name="cacheReadInputTokenCount")
    write_tokens: Count | None = msgspec.field(default=None, name="cacheWriteInputTokens")
    write_token_count: Count | None = msgspec.field(default=None, name="cacheWriteInputTokenCount")


class _PlainMessage(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    usage: _PlainUsage | None = None
    diagnostics: _PlainDiagnostics | None = None


class _Plain(msgspec.Struct, gc=False):
    """The members of a message, or of a stream event, that are looked at, where all of them are
    what they should be: the decoder checks that, and no error is among them."""

    type: str | None = None
    id: str | None = None
    model: str | None = None
    message: _PlainMessage | None = None
    usage: _PlainUsage | None = None
    delta: _PlainDelta | None = None
    stop_reason: str | None = None
    diagnostics: _PlainDiagnostics | None = None
    error: None = None


class _Envelope(msgspec.Struct):
    """The same members, whatever they are."""

    type: Any = None
    id: Any = None
    model: Any = None
    message: Any = None
    usage: Any = None
    delta: Any = None
    stop_reason: Any = None
    diagnostics: Any = None
    error: Any = None


_read_plain = MemberReader(_Plain).strict
_read_any = MemberReader(_Envelope).lenient


def _read_envelope(data: bytes) -> _Plain | _Envelope | None:
    return _read_plain(data) or _read_any(data)


def read_message(body: bytes, end: End) -> Observation:
    """Read a whole JSON answer.

    Args:
        body: the decoded body, as far as it came.
    """
    envelope = _read_envelope(body)
    if envelope is None:
        return unreadable(body, end)
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
        "_fetches",
        "_id",
        "_iterations",
        "_miss_reason",
        "_model",
        "_started",
        "_stop_reason",
        "_stopped",
        "terms",
        "usage",
    )

    def __init__(self) -> None:
        self.usage = NO_USAGE
        """What is known so far."""
        self.terms = NO_TERMS
        self._faults: list[str] = []
        self._errors = 0
        self._started = False
        self._closed = False
        """Whether a usage came behind the first one, which does not count the output."""
        self._stopped = False
        self._model: str | None = None
        self._id: str | None = None
        self._stop_reason: str | None = None
        self._miss_reason: str | None = None
        self._fetches: int | None = None
        self._iterations: tuple[str, ...] = ()

    @property
    def reported(self) -> bool:
        """Whether any count was seen."""
        return self.usage is not NO_USAGE

    def take_event(self, event: Event) -> Sequence[str] | None:
        """Take the next event that held a needle.

        Returns:
            The path of the member in its data that was taken for the usage; empty for none.
            None where the data are no JSON object.
        """
        del self._faults[1:]  # the first is told; a stream may have any number
        if not event.data:
            # Such an event is the rest of a frame (`Event.stray`): LiteLLM 1.100 may send a ping in
            # the middle of one, and tear it.
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
            first, self._id = self._id, None
            self._take_start(envelope.message)
            # LiteLLM 1.83's chat adapter can mix the events of concurrent streams; its adapter
            # for responses says the start of one stream twice.
            if self._started and (first is None or first != self._id):
                self._faults.append("a second message_start")
            self._started = True
            return ("message", "usage")
        elif kind == "message_delta":
            if not self._started:
                self._faults.append("a message_delta without a message_start")
                self._started = True
            self._closed = True
            self._take_usage(envelope.usage)
            self._take_stop(member_of(envelope.delta, "stop_reason"))
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

    def take_message(self, envelope: _Plain | _Envelope) -> None:
        """Take a whole message."""
        self._started = self._closed = self._stopped = True
        self._take_names(envelope.id, envelope.model)
        self._take_usage(envelope.usage)
        self._take_stop(envelope.stop_reason)
        self._take_diagnostics(envelope.diagnostics)

    def finish(self, end: End, *, oversized: bool) -> Observation:
        """Say what the stream said.

        Args:
            oversized: whether an event had to be skipped that may have held a usage.
        """
        faults = self._faults
        if self._stopped and self.reported and not (self._closed or self._errors):
            # It may have been torn where this could not be seen.
            faults = [*faults, "a message_stop without a message_delta"]
        status, fault = status_of(
            end,
            faults=faults,
            oversized=oversized,
            failed=self._errors > 0,
            reported=self.reported,
            stopped=self._stopped,
            stop="a message_stop",
        )
        remarks = Remarks(self._stop_reason, self._miss_reason, self._fetches, self._iterations)
        return Observation(status, self.usage, self._model, self._id, fault, self.terms, remarks)

    def _take_start(self, message: object) -> None:
        if type(message) is _PlainMessage:
            self._take_names(message.id, message.model)
            self._take_usage(message.usage)
            self._take_diagnostics(message.diagnostics)
        elif isinstance(message, dict):
            self._take_names(message.get("id"), message.get("model"))
            self._take_usage(message.get("usage"))
            self._take_diagnostics(message.get("diagnostics"))
        elif message is not None:
            self._faults.append("message is not an object")

    def _take_names(self, message_id: object, model: object) -> None:
        if isinstance(message_id, str):
            self._id = message_id
        if isinstance(model, str):
            self._model = model

    def _take_stop(self, reason: object) -> None:
        if isinstance(reason, str):
            self._stop_reason = reason

    def _take_diagnostics(self, diagnostics: object) -> None:
        """Take why nothing was read from the cache: the reason, or an object of that type."""
        if diagnostics is not None:
            reason = member_of(diagnostics, "cache_miss_reason")
            kind = reason if isinstance(reason, str) else member_of(reason, "type")
            if isinstance(kind, str):
                self._miss_reason = kind

    def _take_iterations(self, iterations: Sequence[object]) -> None:
        kinds = [member_of(each, "type") for each in iterations]
        self._iterations = tuple(kind for kind in kinds if isinstance(kind, str))

    def _take_usage(self, usage: object) -> None:
        """Merge one usage object into what is known."""
        if type(usage) is _PlainUsage:
            self._merge(self._plain_counts(usage))
            tools = usage.server_tool_use
            searches = None
            if tools is not None:
                searches = tools.web_search_requests
                if tools.web_fetch_requests is not None:
                    self._fetches = tools.web_fetch_requests
            self._merge_terms(usage.service_tier, usage.speed, usage.inference_geo, searches)
            if usage.iterations:
                self._take_iterations(usage.iterations)
        elif isinstance(usage, dict):
            self._merge(self._any_counts(usage))
            self._merge_terms(*self._any_terms(usage))
            iterations = usage.get("iterations")
            if isinstance(iterations, list):
                self._take_iterations(iterations)
        elif usage is not None:
            self._faults.append("usage is not an object")

    def _merge(self, said: Usage) -> None:
        """Have what is said now replace what was said before, where it is not null."""
        if said == NO_USAGE:
            return
        known = self.usage
        if known is not NO_USAGE:
            if not _has_input(said) and _has_input(known):
                # Some back ends close with an all-zero usage: it does not undo what the start
                # said.
                said = said._replace(
                    input_tokens=None,
                    cache_read_input_tokens=None,
                    cache_creation_input_tokens=None,
                )
            said = Usage(
                *[old if new is None else new for new, old in zip(said, known, strict=True)]
            )
        self.usage = said

    def _merge_terms(
        self, tier: str | None, speed: str | None, geo: str | None, searches: int | None
    ) -> None:
        if tier is None and speed is None and geo is None and searches is None:
            return
        said, known = Terms(tier, speed, geo, searches), self.terms
        if known is not NO_TERMS:
            said = Terms._make(
                old if new is None else new for new, old in zip(said, known, strict=True)
            )
        self.terms = said

    def _plain_counts(self, usage: _PlainUsage) -> Usage:
        """Read a usage all of whose counts are counts."""
        read = usage.cache_read_input_tokens
        if read is None:
            read = usage.read_tokens
            if read is None:
                read = usage.read_token_count
        written = usage.cache_creation_input_tokens
        if written is None:
            written = usage.write_tokens
            if written is None:
                written = usage.write_token_count
        written_5m = written_1h = None
        split = usage.cache_creation
        if split is not None:
            written_5m = split.ephemeral_5m_input_tokens
            written_1h = split.ephemeral_1h_input_tokens
            self._check_split(written, (written_5m or 0) + (written_1h or 0))
        return Usage(usage.input_tokens, usage.output_tokens, read, written, written_5m, written_1h)

    def _any_counts(self, usage: dict[str, object]) -> Usage:
        """Read a usage, and what of its counts are counts."""
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
        return Usage(**counts)

    def _any_terms(self, usage: dict[str, object]) -> Terms:
        """Read what else decides the price, as far as it is what it should be."""
        words = [usage.get(field) for field in ("service_tier", "speed", "inference_geo")]
        counts: dict[str, int] = {}
        tools = usage.get("server_tool_use")
        searches = tools.get("web_search_requests") if isinstance(tools, dict) else None
        if searches is not None:
            self._take_count(counts, "web_search_requests", searches)
        fetches = count_of(member_of(tools, "web_fetch_requests"))
        if fetches is not None:
            self._fetches = fetches
        tier, speed, geo = [word if isinstance(word, str) else None for word in words]
        return Terms(tier, speed, geo, counts.get("web_search_requests"))

    def _take_split(self, counts: dict[str, int], split: dict[str, object]) -> None:
        """Take what was written for each TTL."""
        covered = 0
        for field in _SPLIT:
            value = split.get(field)
            if value is not None:
                self._take_count(counts, field, value)
                covered += counts.get(field, 0)
        self._check_split(counts.get("cache_creation_input_tokens"), covered)

    def _check_split(self, written: int | None, covered: int) -> None:
        if written is not None and covered > written:
            self._faults.append("the split of the written tokens exceeds their total")

    def _take_count(self, counts: dict[str, int], field: str, value: object) -> None:
        """Take a count, or note that it is none."""
        count = count_of(value)
        if count is not None:
            counts[field] = count
        else:
            self._faults.append(f"{field} is not a count")


def _has_input(usage: Usage) -> bool:
    return bool(
        usage.input_tokens or usage.cache_read_input_tokens or usage.cache_creation_input_tokens
    )
