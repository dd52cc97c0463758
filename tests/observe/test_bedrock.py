"""How the usage of Bedrock's answers is read, whatever model they come from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.exchange import Dialect, End, Observation, Remarks, Status, Usage
from sidecar.observe.event_stream import MAX_MESSAGE_BYTES
from sidecar.observe.tap import tap_for
from tests.support.bodies import JSON, MESSAGES, converse, frame, frames, invocation, observe

USAGE = {
    "inputTokens": 7,
    "outputTokens": 16,
    "totalTokens": 2124,
    "cacheReadInputTokens": 1000,
    "cacheWriteInputTokens": 1101,
}
START = {
    "type": "message_start",
    "message": {
        "id": "msg_bdrk_1",
        "model": "claude-sonnet-4-5",
        "usage": {"input_tokens": 7, "cache_read_input_tokens": 2101, "output_tokens": 1},
    },
}
TEXT = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": 'a "usage"'}}
DELTA = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 16}}
STOP = {
    "type": "message_stop",
    "amazon-bedrock-invocationMetrics": {"inputTokenCount": 7, "outputTokenCount": 15},
}


def converse_json(usage: Any, end: End = End.COMPLETE) -> Observation:
    """Read an answer of `Converse`."""
    body = json.dumps({"output": {}, "stopReason": "end_turn", "usage": usage}).encode()
    return observe(body, JSON, end=end, dialect=Dialect.BEDROCK_CONVERSE)


def converse_stream(body: bytes, end: End = End.COMPLETE) -> Observation:
    """Read a stream of `ConverseStream`."""
    return observe(body, MESSAGES, end=end, dialect=Dialect.BEDROCK_CONVERSE)


def invoked(body: bytes, end: End = End.COMPLETE) -> Observation:
    """Read a stream of `InvokeModelWithResponseStream`."""
    return observe(body, MESSAGES, end=end, dialect=Dialect.BEDROCK_INVOKE)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (USAGE, Usage(7, 16, 1000, 1101)),
        ({"inputTokens": 7}, Usage(7)),
        ({"inputTokens": 7.0, "outputTokens": None}, Usage(7)),
        ({"cacheReadInputTokenCount": 3, "cacheWriteInputTokenCount": 4}, Usage(None, None, 3, 4)),
        (
            USAGE
            | {
                "cacheDetails": [
                    {"ttl": "5m", "inputTokens": 1000},
                    {"ttl": "1h", "inputTokens": 100},
                    {"ttl": "5m", "inputTokens": 1},
                    {"ttl": "5m"},
                    {"ttl": "1d", "inputTokens": 9},
                    "odd",
                ]
            },
            Usage(7, 16, 1000, 1101, 1001, 100),
        ),
    ],
)
def test_usage_of_converse(usage: Any, expected: Usage) -> None:
    """Its input leaves out the cache, as Anthropic's does; JSON and streams say the same."""
    seen = converse_json(usage)
    assert seen == converse_stream(converse(usage))
    assert seen == Observation(Status.COMPLETE, expected, remarks=Remarks("end_turn"))


@pytest.mark.parametrize(
    ("usage", "fault"),
    [
        ("many", "usage is not an object"),
        ({"inputTokens": -1}, "input_tokens is not a count"),
        ({"cacheDetails": [{"ttl": "1h", "inputTokens": "x"}]}, "ephemeral_1h_input_tokens is"),
    ],
)
def test_odd_usage_of_converse_is_invalid(usage: Any, fault: str) -> None:
    """What is no count is said to be none."""
    seen = converse_json(usage)
    assert seen.status is Status.INVALID
    assert seen.fault.startswith(fault)
    assert converse_stream(converse(usage)).fault == seen.fault


def test_converse_without_usage() -> None:
    """An answer that says nothing, one that was cut, and one that is no JSON."""
    assert converse_json(None).status is Status.MISSING
    assert observe(b"[]", JSON, dialect=Dialect.BEDROCK_CONVERSE).status is Status.INVALID
    begun = frames(("messageStart", {"role": "assistant"}))
    assert converse_stream(begun, End.UPSTREAM_CUT).status is Status.PARTIAL
    assert converse_stream(begun).status is Status.MISSING
    torn = frames(("metadata", b"{"))
    odd = frames(("messageStop", {"stopReason": 7}), ("metadata", {"usage": USAGE}))
    assert converse_stream(odd).remarks == Remarks()
    assert converse_stream(torn).status is Status.INVALID


def test_exception_in_a_stream() -> None:
    """What the service throws while it streams is an error."""
    thrown = frames(("throttlingException", {"message": "slow down"}), kind="exception")
    assert converse_stream(thrown).status is Status.ERROR
    assert invoked(thrown).status is Status.ERROR
    assert invoked(frames(("internalServerException", b""), kind="exception")).status is (
        Status.ERROR
    )
    seen = invoked(invocation(START, TEXT) + thrown)
    assert (seen.status, seen.usage) == (Status.PARTIAL, Usage(7, 1, 2101))


def test_damaged_stream_is_invalid() -> None:
    """What was read before the damage is kept."""
    body = bytearray(converse(USAGE))
    body[-1] ^= 1
    seen = converse_stream(bytes(body))
    assert (seen.status, seen.fault) == (Status.INVALID, "the checksum of a message is wrong")
    body = bytearray(invocation(START, TEXT, DELTA, STOP))
    body[-1] ^= 1
    seen = invoked(bytes(body))
    assert (seen.status, seen.usage.cache_read_input_tokens) == (Status.INVALID, 2101)
    assert invoked(frame({":message-type": "event"}, b"{}")).status is Status.INVALID


def test_oversized_message() -> None:
    """A message over the bound matters if the usage may have been in it."""
    huge = frame({":message-type": "event"}, b"x" * MAX_MESSAGE_BYTES)
    assert converse_stream(huge).status is Status.OVERSIZED
    assert converse_stream(huge + converse(USAGE)).status is Status.COMPLETE
    assert invoked(huge).status is Status.OVERSIZED


def test_anthropic_model_is_invoked() -> None:
    """The events are Anthropic's; Bedrock's own metrics are not believed before them."""
    seen = invoked(invocation(START, TEXT, DELTA, STOP))
    assert (seen.status, seen.usage) == (Status.COMPLETE, Usage(7, 16, 2101))
    assert (seen.message_id, seen.response_model) == ("msg_bdrk_1", "claude-sonnet-4-5")
    cut = invoked(invocation(START, TEXT), End.UPSTREAM_CUT)
    assert (cut.status, cut.usage) == (Status.PARTIAL, Usage(7, 1, 2101))


def test_nova_is_invoked() -> None:
    """Amazon's own models speak as `Converse` does."""
    text = {"contentBlockDelta": {"delta": {"text": 'a "metadata"'}}}
    seen = invoked(invocation(text, {"metadata": {"usage": USAGE}}))
    assert (seen.status, seen.usage) == (Status.COMPLETE, Usage(7, 16, 1000, 1101))
    odd = invoked(invocation({"metadata": "usage", "type": "error"}))
    assert odd.status is Status.ERROR


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"usage": USAGE}, Usage(7, 16, 1000, 1101)),
        (
            {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2}}},
            Usage(7, None, 2),
        ),
        ({"usage": {"input_tokens": 9, "cache_read_input_tokens": 2}}, Usage(9, None, 2)),
        ({"generation": "Hello", "prompt_token_count": 9}, Usage()),
        (["usage"], Usage()),
    ],
)
def test_dialect_of_an_invocation_shows_in_its_usage(body: Any, expected: Usage) -> None:
    """Nova's, Mistral's, Anthropic's; and one whose usage is not known."""
    seen = observe(json.dumps(body).encode(), JSON, dialect=Dialect.BEDROCK_INVOKE)
    assert seen.usage == expected


@pytest.mark.parametrize(
    ("dialect", "before", "first"),
    [
        (
            Dialect.BEDROCK_CONVERSE,
            frames(("messageStart", {})),
            frames(("contentBlockDelta", {})),
        ),
        (Dialect.BEDROCK_INVOKE, invocation(START), invocation(TEXT)),
        (
            Dialect.BEDROCK_INVOKE,
            invocation({"messageStart": {}}),
            invocation({"contentBlockDelta": {}}),
        ),
    ],
)
def test_first_token_is_noticed(dialect: Dialect, before: bytes, first: bytes) -> None:
    """The time to the first token ends with the first piece of content."""
    tap = tap_for(dialect, 200, MESSAGES)
    tap.feed(before)
    assert not tap.first_token_seen
    tap.feed(first)
    assert tap.first_token_seen


def test_other_types_are_missing() -> None:
    """An AWS event stream on a route that has none, and the other way round."""
    for dialect, headers in (
        (Dialect.ANTHROPIC, MESSAGES),
        (Dialect.BEDROCK_CONVERSE, [(b"content-type", b"text/event-stream")]),
    ):
        seen = observe(converse(USAGE), headers, dialect=dialect)
        assert seen.status is Status.MISSING


def test_stream_without_a_type_is_read() -> None:
    """LiteLLM 1.83 leaves the type of such streams away."""
    seen = observe(converse(USAGE), [], dialect=Dialect.BEDROCK_CONVERSE)
    assert seen.usage == Usage(7, 16, 1000, 1101)


def test_exception_without_a_payload_says_nothing() -> None:
    """An empty one is neither a usage nor a fault of the framing."""
    seen = invoked(frames(("throttlingException", b""), kind="exception"), End.UPSTREAM_CUT)
    assert seen.status is not Status.INVALID
    assert seen.usage == Usage()
