"""OpenAI: where usage stands in chat completions and in responses, as JSON and as streams.

Field names and places: OpenAI's API reference (Chat Completions and Responses objects, and their
streaming events), seen 2026-11; who adds what to them is named beside the member. Text completions
have the usage of chat completions.

OpenAI counts the whole prompt, and says how much of that was read from or written to the cache;
here the prompt is split into disjoint parts. Of a stream that reports usage more than once the
counts are cumulative: a later value that is not null replaces the earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sidecar.exchange import NO_REMARKS, NO_TERMS, NO_USAGE, End, Observation, Remarks, Terms, Usage
from sidecar.observe.counts import Count, count_of, status_of, unreadable
from sidecar.observe.members import MemberReader, member_of
from sidecar.observe.sse import Event

__all__ = [
    "CHAT_END_NEEDLES",
    "CHAT_NEEDLES",
    "RESPONSE_END_NEEDLES",
    "RESPONSE_NEEDLES",
    "ChatReading",
    "ResponseReading",
    "read_chat",
    "read_response",
]

CHAT_NEEDLES = (b'"prompt_tokens"',)
"""With `stream_options.include_usage` every chunk has a `usage`, which is null but in the last."""
CHAT_END_NEEDLES = (b"[DONE]", b'"error"', b'"finish_reason":"', b'"finish_reason": "')
RESPONSE_NEEDLES = (b'"usage"',)
"""Only the events that hold the whole response have it: the first ones and the last."""
RESPONSE_END_NEEDLES = (b'"error"',)

_ENDS = ("response.completed", "response.incomplete", "response.failed")


class _PlainSplit(msgspec.Struct, gc=False):
    ephemeral_5m_input_tokens: Count | None = None
    ephemeral_1h_input_tokens: Count | None = None


class _PlainDetails(msgspec.Struct, gc=False):
    cached_tokens: Count | None = None
    cache_write_tokens: Count | None = None
    """OpenAI's own and OpenRouter's name."""
    cache_creation_tokens: Count | None = None
    """LiteLLM's, as is the split."""
    cache_creation_token_details: _PlainSplit | None = None


class _PlainUsage(msgspec.Struct, gc=False):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: _PlainDetails | None = None
    # The same in responses.
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: _PlainDetails | None = None
    # LiteLLM and Databricks add Anthropic's names; the prompt includes them all the same.
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    prompt_cache_hit_tokens: Count | None = None
    """DeepSeek's name for what was read."""


class _PlainChoice(msgspec.Struct, gc=False):
    finish_reason: str | None = None


class _Chat(msgspec.Struct, gc=False):
    """The members of a chat completion, or of one chunk of it, where they are what they should
    be."""

    id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    choices: list[_PlainChoice] | None = None
    usage: _PlainUsage | None = None
    error: None = None


class _AnyChat(msgspec.Struct):
    """The same members, whatever they are."""

    id: Any = None
    model: Any = None
    service_tier: Any = None
    choices: Any = None
    usage: Any = None
    error: Any = None


class _Response(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    status: str | None = None
    usage: _PlainUsage | None = None
    error: None = None


class _Event(msgspec.Struct, gc=False):
    type: str | None = None
    response: _Response | None = None
    error: None = None


class _AnyResponse(msgspec.Struct):
    id: Any = None
    model: Any = None
    service_tier: Any = None
    status: Any = None
    usage: Any = None
    error: Any = None


class _AnyEvent(msgspec.Struct):
    type: Any = None
    response: Any = None
    error: Any = None


_plain_chat = MemberReader(_Chat).strict
_any_chat = MemberReader(_AnyChat).lenient
_plain_response = MemberReader(_Response).strict
_any_response = MemberReader(_AnyResponse).lenient
_plain_event = MemberReader(_Event).strict
_any_event = MemberReader(_AnyEvent).lenient


class _Counting:
    """What the usages of one answer said so far."""

    __slots__ = ("_said", "faults", "model", "response_id", "stop_reason", "terms")

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.model: str | None = None
        self.response_id: str | None = None
        self.terms = NO_TERMS
        self.stop_reason: str | None = None
        self._said = NO_USAGE
        """With the whole prompt as its `input_tokens`, as it comes."""

    @property
    def reported(self) -> bool:
        """Whether any count was seen."""
        return self._said is not NO_USAGE

    def take_names(self, response_id: object, model: object, service_tier: object) -> None:
        """Take what names the answer, and the tier that it was processed in."""
        if isinstance(response_id, str):
            self.response_id = response_id
        if isinstance(model, str):
            self.model = model
        # `auto` is what was asked for; the answer's end says what that came to.
        if isinstance(service_tier, str) and service_tier != "auto":
            self.terms = Terms(service_tier)

    def take_usage(self, usage: object) -> None:
        """Merge one usage object into what is known."""
        if usage is None:
            return
        if type(usage) is _PlainUsage:
            said = _plain_counts(usage)
        elif isinstance(usage, dict):
            said = self._any_counts(usage)
        else:
            self.faults.append("usage is not an object")
            return
        if said != NO_USAGE:
            self._said = Usage._make(
                old if new is None else new for new, old in zip(said, self._said, strict=True)
            )

    def usage(self) -> Usage:
        """Split the prompt into disjoint parts."""
        said = self._said
        if said.input_tokens is None:
            return said
        uncached = said.input_tokens - said.read_tokens - said.write_tokens
        if uncached < 0:
            self.faults.append("more tokens were read from or written to the cache than came in")
        return said._replace(input_tokens=max(uncached, 0))

    def observation(
        self, end: End, *, oversized: bool, failed: bool, stopped: bool, stop: str
    ) -> Observation:
        """Say what all of it comes to."""
        usage = self.usage()
        status, fault = status_of(
            end,
            faults=self.faults,
            oversized=oversized,
            failed=failed,
            reported=self.reported,
            stopped=stopped,
            stop=stop,
        )
        remarks = Remarks(self.stop_reason) if self.stop_reason is not None else NO_REMARKS
        return Observation(status, usage, self.model, self.response_id, fault, self.terms, remarks)

    def _any_counts(self, usage: Mapping[str, object]) -> Usage:
        """Read a usage, and what of its counts are counts."""
        details = usage.get("prompt_tokens_details")
        if details is None:
            details = usage.get("input_tokens_details")
        details = self._object("the details of the prompt", details)
        split = self._object(
            "cache_creation_token_details", details.get("cache_creation_token_details")
        )
        return Usage(
            self._first_count((usage, "prompt_tokens"), (usage, "input_tokens")),
            self._first_count((usage, "completion_tokens"), (usage, "output_tokens")),
            self._first_count(
                (details, "cached_tokens"),
                (usage, "cache_read_input_tokens"),
                (usage, "prompt_cache_hit_tokens"),
            ),
            self._first_count(
                (details, "cache_write_tokens"),
                (details, "cache_creation_tokens"),
                (usage, "cache_creation_input_tokens"),
            ),
            self._first_count((split, "ephemeral_5m_input_tokens")),
            self._first_count((split, "ephemeral_1h_input_tokens")),
        )

    def _object(self, name: str, value: object) -> Mapping[str, object]:
        if isinstance(value, dict):
            return value
        if value is not None:
            self.faults.append(f"{name} is not an object")
        return {}

    def _first_count(self, *places: tuple[Mapping[str, object], str]) -> int | None:
        """Read the first of these members that is not null."""
        for members, name in places:
            value = members.get(name)
            if value is not None:
                count = count_of(value)
                if count is None:
                    self.faults.append(f"{name} is not a count")
                return count
        return None


def _plain_counts(usage: _PlainUsage) -> Usage:
    """Read a usage all of whose counts are counts."""
    details = usage.prompt_tokens_details or usage.input_tokens_details or _NO_DETAILS
    split = details.cache_creation_token_details or _NO_SPLIT
    return Usage(
        _first(usage.prompt_tokens, usage.input_tokens),
        _first(usage.completion_tokens, usage.output_tokens),
        _first(details.cached_tokens, usage.cache_read_input_tokens, usage.prompt_cache_hit_tokens),
        _first(
            details.cache_write_tokens,
            details.cache_creation_tokens,
            usage.cache_creation_input_tokens,
        ),
        split.ephemeral_5m_input_tokens,
        split.ephemeral_1h_input_tokens,
    )


_NO_DETAILS = _PlainDetails()
_NO_SPLIT = _PlainSplit()


def _first(*counts: int | None) -> int | None:
    for count in counts:
        if count is not None:
            return count
    return None


# Chat completions


def read_chat(body: bytes, end: End) -> Observation:
    """Read a whole JSON answer.

    Args:
        body: the decoded body, as far as it came.
    """
    answer = _plain_chat(body) or _any_chat(body)
    if answer is None:
        return unreadable(body, end)
    reading = ChatReading()
    reading.take(answer)
    reading.stopped = True
    return reading.finish(End.COMPLETE, oversized=False)


class ChatReading:
    """What the chunks of one stream said so far."""

    __slots__ = ("_counting", "_failed", "stopped")

    def __init__(self) -> None:
        self._counting = _Counting()
        self._failed = False
        self.stopped = False

    def take_event(self, event: Event) -> None:
        """Take the next event that held a needle."""
        del self._counting.faults[1:]  # the first is told; a stream may have any number
        if event.data.strip() == b"[DONE]":
            self.stopped = True
            return
        chunk = _plain_chat(event.data) or _any_chat(event.data)
        if chunk is not None:
            self.take(chunk)
        elif event.name == b"error":
            self._failed = True
        elif event.terminated:
            self._counting.faults.append("an event is not a JSON object")

    def take(self, chunk: _Chat | _AnyChat) -> None:
        """Take a chunk, or a whole answer."""
        counting = self._counting
        counting.take_names(chunk.id, chunk.model, chunk.service_tier)
        counting.take_usage(chunk.usage)
        if isinstance(chunk.choices, list):
            for choice in chunk.choices:
                reason = member_of(choice, "finish_reason")
                if isinstance(reason, str):
                    counting.stop_reason = reason
        if chunk.error is not None:
            self._failed = True
        elif chunk.usage is not None and chunk.choices == []:
            # What `stream_options` adds, behind all others.
            self.stopped = True

    def finish(self, end: End, *, oversized: bool) -> Observation:
        """Say what the stream said.

        Args:
            oversized: whether an event had to be skipped that may have held a usage.
        """
        return self._counting.observation(
            end, oversized=oversized, failed=self._failed, stopped=self.stopped, stop="[DONE]"
        )


# Responses


def read_response(body: bytes, end: End) -> Observation:
    """Read a whole JSON answer.

    Args:
        body: the decoded body, as far as it came.
    """
    answer = _plain_response(body) or _any_response(body)
    if answer is None:
        return unreadable(body, end)
    reading = ResponseReading()
    reading.take(answer, stopped=True)
    return reading.finish(End.COMPLETE, oversized=False)


class ResponseReading:
    """What the events of one stream said so far."""

    __slots__ = ("_counting", "_failed", "_stopped")

    def __init__(self) -> None:
        self._counting = _Counting()
        self._failed = False
        self._stopped = False

    def take_event(self, event: Event) -> None:
        """Take the next event that held a needle."""
        del self._counting.faults[1:]
        seen = _plain_event(event.data) or _any_event(event.data)
        if seen is None:
            if event.name == b"error":
                self._failed = True
            elif event.terminated and event.data.strip() != b"[DONE]":
                self._counting.faults.append("an event is not a JSON object")
            return
        kind = seen.type if isinstance(seen.type, str) else event.name.decode("latin-1")
        if kind == "error" or seen.error is not None:
            self._failed = True
        elif isinstance(seen.response, _Response):
            self.take(seen.response, stopped=kind in _ENDS)
        elif isinstance(seen.response, dict):
            members = {name: seen.response.get(name) for name in _AnyResponse.__struct_fields__}
            self.take(_AnyResponse(**members), stopped=kind in _ENDS)

    def take(self, response: _Response | _AnyResponse, *, stopped: bool) -> None:
        """Take a response as it stands.

        Args:
            stopped: whether it stands so for good.
        """
        counting = self._counting
        counting.take_names(response.id, response.model, response.service_tier)
        counting.take_usage(response.usage)
        self._stopped = self._stopped or stopped
        if response.error is not None or response.status == "failed":
            self._failed = True

    def finish(self, end: End, *, oversized: bool) -> Observation:
        """Say what the stream said.

        Args:
            oversized: whether an event had to be skipped that may have held a usage.
        """
        return self._counting.observation(
            end,
            oversized=oversized,
            failed=self._failed,
            stopped=self._stopped,
            stop="a response.completed",
        )
