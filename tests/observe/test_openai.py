"""How OpenAI's usage is read, normalised and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sidecar.exchange import Dialect, End, Observation, Remarks, Status, Terms, Usage
from sidecar.observe.tap import tap_for
from tests.support.bodies import JSON, SSE, chunk, event, observe, response_event

DONE = b"data: [DONE]\n\n"


def chat(usage: Any, end: End = End.COMPLETE, **members: Any) -> Observation:
    """Read a chat completion with this usage."""
    body = {"id": "chatcmpl-1", "model": "gpt-4o-2024-08-06", "usage": usage} | members
    return observe(json.dumps(body).encode(), JSON, end=end, dialect=Dialect.OPENAI_CHAT)


def chat_stream(body: bytes, end: End = End.COMPLETE) -> Observation:
    """Read a stream of chunks."""
    return observe(body, SSE, end=end, dialect=Dialect.OPENAI_CHAT)


def response(**members: Any) -> Observation:
    """Read a response."""
    body = json.dumps({"id": "resp_1", "model": "gpt-4o", "error": None} | members).encode()
    return observe(body, JSON, dialect=Dialect.OPENAI_RESPONSES)


def response_stream(body: bytes, end: End = End.COMPLETE) -> Observation:
    """Read a stream of a response's events."""
    return observe(body, SSE, end=end, dialect=Dialect.OPENAI_RESPONSES)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param({"prompt_tokens": 9, "completion_tokens": 3}, Usage(9, 3), id="no-details"),
        pytest.param(
            {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": None},
            Usage(9, 3),
            id="null-details",
        ),
        pytest.param(
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}},
            Usage(9, None, 0),
            id="zero-is-an-answer",
        ),
        pytest.param(
            {"prompt_tokens": 2101, "prompt_tokens_details": {"cached_tokens": 2048}},
            Usage(53, None, 2048),
            id="openai",
        ),
        pytest.param(
            {"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": 8}},
            Usage(1, None, None, 8),
            id="openrouter",
        ),
        pytest.param(
            {
                "prompt_tokens": 2108,
                "completion_tokens": 16,
                "total_tokens": 2124,
                "prompt_tokens_details": {
                    "cached_tokens": 1000,
                    "cache_creation_tokens": 1101,
                    "cache_creation_token_details": {
                        "ephemeral_5m_input_tokens": 1001,
                        "ephemeral_1h_input_tokens": 100,
                    },
                },
                "cache_read_input_tokens": 1000,
                "cache_creation_input_tokens": 1101,
            },
            Usage(7, 16, 1000, 1101, 1001, 100),
            id="litellm-says-it-twice",
        ),
        pytest.param(
            {"prompt_tokens": 9, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 3},
            Usage(4, None, 2, 3),
            id="databricks",
        ),
        pytest.param(
            {"prompt_tokens": 9, "prompt_cache_hit_tokens": 2, "prompt_cache_miss_tokens": 7},
            Usage(7, None, 2),
            id="deepseek",
        ),
        pytest.param({"completion_tokens": 3}, Usage(None, 3), id="no-input"),
        pytest.param({"prompt_tokens": 9.0, "completion_tokens": 3}, Usage(9, 3), id="floats"),
        pytest.param(
            {"prompt_tokens": 9.0, "prompt_tokens_details": {"cached_tokens": 2}},
            Usage(7, None, 2),
            id="floats-and-details",
        ),
        pytest.param(
            {"input_tokens": 9.0, "output_tokens": 3, "input_tokens_details": {}},
            Usage(9, 3),
            id="floats-of-a-response",
        ),
    ],
)
def test_prompt_is_split_into_disjoint_parts(usage: Any, expected: Usage) -> None:
    """What was read from and written to the cache is taken out of the input."""
    seen = chat(usage)
    assert (seen.status, seen.usage) == (Status.COMPLETE, expected)
    assert (seen.response_model, seen.message_id) == ("gpt-4o-2024-08-06", "chatcmpl-1")
    if "prompt_tokens" in usage:
        assert chat_stream(chunk() + chunk(usage, choices=[]) + DONE) == seen


@pytest.mark.parametrize(
    ("usage", "expected", "fault"),
    [
        pytest.param(
            {"prompt_tokens": 9, "cache_read_input_tokens": 10},
            Usage(0, None, 10),
            "more tokens were read from or written to the cache than came in",
            id="below-zero",
        ),
        pytest.param("many", Usage(), "usage is not an object", id="no-object"),
        pytest.param(
            {"prompt_tokens": -1, "completion_tokens": 3},
            Usage(None, 3),
            "prompt_tokens is not a count",
            id="negative",
        ),
        pytest.param(
            {"prompt_tokens": True}, Usage(), "prompt_tokens is not a count", id="a-truth-value"
        ),
        pytest.param(
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": "1"}},
            Usage(9),
            "cached_tokens is not a count",
            id="a-string",
        ),
        pytest.param(
            {"prompt_tokens": 9, "prompt_tokens_details": [1]},
            Usage(9),
            "the details of the prompt is not an object",
            id="details-no-object",
        ),
    ],
)
def test_what_contradicts_itself_is_invalid(usage: Any, expected: Usage, fault: str) -> None:
    """What can be read is read, and no count is below zero."""
    seen = chat(usage)
    assert (seen.status, seen.usage, seen.fault) == (Status.INVALID, expected, fault)


def test_stream_without_usage_is_missing() -> None:
    """Without `stream_options` nothing is said; that is no fault."""
    seen = chat_stream(chunk() + chunk() + DONE)
    assert (seen.status, seen.usage, seen.fault) == (Status.MISSING, Usage(), "no usage was sent")
    assert chat_stream(chunk()).status is Status.MISSING
    assert chat_stream(chunk(), End.UPSTREAM_CUT).status is Status.PARTIAL


def test_cumulative_usages_replace_one_another() -> None:
    """The last one counts; nothing is added."""
    said = [
        {"prompt_tokens": 9, "completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 4}}
        for n in (1, 2, 7)
    ]
    body = b"".join(chunk(usage) for usage in said)
    assert chat_stream(body + DONE).usage == Usage(5, 7, 4)
    # Nothing says that there is no more to come.
    assert chat_stream(body, End.UPSTREAM_CUT).status is Status.PARTIAL


def test_usage_on_a_chunk_with_choices() -> None:
    """Many servers put the usage beside the last piece of text."""
    last = chunk(
        {"prompt_tokens": 9, "completion_tokens": 3},
        choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}],
    )
    seen = chat_stream(chunk() + last + DONE)
    assert (seen.status, seen.usage) == (Status.COMPLETE, Usage(9, 3))


def test_error_in_a_stream() -> None:
    """An error before any usage is one; after it, what was said is counted."""
    usage = chunk({"prompt_tokens": 9, "completion_tokens": 3})
    error = b'data: {"error": {"message": "overloaded"}}\n\n'
    named = b'event: error\ndata: "error"\n\n'
    for each in (error, named):
        assert chat_stream(chunk() + each + DONE).status is Status.ERROR
        assert response_stream(each).status is Status.ERROR
        seen = chat_stream(usage + each + DONE)
        assert (seen.status, seen.usage) == (Status.PARTIAL, Usage(9, 3))
    assert chat(None, error={"message": "The prompt was filtered."}).status is Status.ERROR


@pytest.mark.parametrize("read", [chat_stream, response_stream])
def test_comment_changes_nothing(read: Callable[[bytes], Observation]) -> None:
    """A comment may say anything, on its own or within an event."""
    counts = {"prompt_tokens": 9, "input_tokens": 9}
    last = {"type": "response.completed", "response": {"usage": counts}, "usage": counts}
    body = b"data: " + json.dumps(last).encode() + b"\n\n" + DONE
    plain = read(body)
    assert plain.status is Status.COMPLETE
    for comment in (b': "usage" of "prompt_tokens", no "error" [DONE]', b':{"usage":{}}'):
        for at in (0, body.index(b"\n\n") + 1, body.index(b"\n\n") + 2, len(body)):
            assert read(body[:at] + comment + b"\n" + body[at:]) == plain, at
            assert read(body[:at] + comment + b"\n\n" + body[at:]) == plain, at


def test_what_is_no_json_is_invalid() -> None:
    """Torn events and bodies are told apart from those that were cut."""
    torn = b'data: {"usage": {"prompt_tokens": 9\n\n'
    assert chat_stream(torn + DONE).status is Status.INVALID
    assert chat_stream(torn[:-2], End.UPSTREAM_CUT).status is Status.PARTIAL
    assert response_stream(torn).status is Status.INVALID
    assert response_stream(torn[:-2], End.UPSTREAM_CUT).status is Status.PARTIAL
    assert response_stream(b'data: [DONE]\n\ndata: {"usage"').status is Status.MISSING
    for dialect in (Dialect.OPENAI_CHAT, Dialect.OPENAI_RESPONSES):
        assert observe(b"[]", JSON, dialect=dialect).status is Status.INVALID
        assert observe(b"", JSON, dialect=dialect).status is Status.MISSING
        cut = observe(b'{"usage"', JSON, dialect=dialect, end=End.CLIENT_LEFT)
        assert cut.status is Status.PARTIAL


@pytest.mark.parametrize(
    ("tier", "terms"),
    [("flex", Terms("flex")), ("auto", Terms()), (7, Terms()), (None, Terms())],
)
def test_service_tier_is_a_term(tier: Any, terms: Terms) -> None:
    """It decides the price; `auto` is a wish and no tier."""
    assert chat({"prompt_tokens": 9}, service_tier=tier).terms == terms
    assert response(usage={"input_tokens": 9}, service_tier=tier).terms == terms


def test_names_that_are_none_are_left_out() -> None:
    """An answer whose id is a number is read all the same."""
    seen = chat({"prompt_tokens": 9}, id=7, model=["gpt"])
    assert (seen.usage, seen.message_id, seen.response_model) == (Usage(9), None, None)


USAGE = {
    "input_tokens": 2101,
    "input_tokens_details": {"cached_tokens": 2048},
    "output_tokens": 16,
    "output_tokens_details": {"reasoning_tokens": 8},
    "total_tokens": 2117,
}


def test_response_counts_its_whole_input() -> None:
    """`input_tokens` of a response includes the cache, unlike Anthropic's."""
    seen = response(status="completed", usage=USAGE)
    assert (seen.status, seen.usage) == (Status.COMPLETE, Usage(53, 16, 2048))
    written = {"input_tokens": 9, "input_tokens_details": {"cache_write_tokens": 8}}
    assert response(status="completed", usage=written).usage == Usage(1, None, None, 8)


@pytest.mark.parametrize("name", ["response.completed", "response.incomplete"])
def test_response_stream_is_closed_by_the_response(name: str) -> None:
    """What the response says at its end counts, also where it was cut short by a limit."""
    begun = response_event("response.created", status="in_progress", service_tier="auto")
    begun += event("response.output_text.delta", {"delta": 'a "usage"'})
    closed = response_event(name, usage=USAGE, service_tier="default")
    seen = response_stream(begun + closed)
    assert seen == Observation(
        Status.COMPLETE,
        Usage(53, 16, 2048),
        "gpt-4o-2024-08-06",
        "resp_1",
        terms=Terms("default"),
    )
    cut = response_stream(begun, End.UPSTREAM_CUT)
    assert (cut.status, cut.fault) == (
        Status.PARTIAL,
        "the stream ended without a response.completed",
    )


def test_failed_response() -> None:
    """What it used before it failed is counted."""
    failed = response_event("response.failed", status="failed", error={"code": "server_error"})
    assert response_stream(failed).status is Status.ERROR
    with_usage = response_event("response.failed", status="failed", usage=USAGE)
    seen = response_stream(with_usage)
    assert (seen.status, seen.usage) == (Status.PARTIAL, Usage(53, 16, 2048))
    assert response(status="failed").status is Status.ERROR


def test_response_in_the_background_says_nothing_yet() -> None:
    """It is answered before it is worked on."""
    assert response(status="queued", usage=None).status is Status.MISSING


def test_odd_response_in_an_event() -> None:
    """What the fast decoder refuses is read by the patient one."""
    body = response_event("response.completed", id=7, usage=USAGE | {"input_tokens": 2101.0})
    seen = response_stream(body)
    assert (seen.status, seen.usage) == (Status.COMPLETE, Usage(53, 16, 2048))
    assert response_stream(event("response.completed", {"response": "usage"})).usage == Usage()
    # No `type` in the data: the name of the event says it.
    nameless = json.dumps({"response": {"usage": USAGE}}).encode()
    seen = response_stream(b"event: response.completed\ndata: " + nameless + b"\n\n")
    assert seen.status is Status.COMPLETE


@pytest.mark.parametrize(
    ("dialect", "before", "first"),
    [
        (Dialect.OPENAI_CHAT, b": waiting\n\n", chunk()),
        (
            Dialect.OPENAI_RESPONSES,
            response_event("response.created"),
            event("response.output_text.delta", {"delta": "Hello"}),
        ),
    ],
)
def test_first_token_is_noticed(dialect: Dialect, before: bytes, first: bytes) -> None:
    """The time to the first token ends with the first piece of content."""
    tap = tap_for(dialect, 200, SSE)
    tap.feed(before)
    assert not tap.first_token_seen
    tap.feed(first)
    assert tap.first_token_seen


@pytest.mark.parametrize("reason", ["stop", "length", None, 7])
def test_finish_reason_is_a_remark(reason: Any) -> None:
    """It stands on a chunk without usage, near the end of a stream."""
    remarks = Remarks(reason if isinstance(reason, str) else None)
    choices = [{"index": 0, "message": {"content": "Hello"}, "finish_reason": reason}]
    assert chat({"prompt_tokens": 9}, choices=choices).remarks == remarks
    for separators in ((",", ":"), (", ", ": ")):
        last = {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        end = b"data: " + json.dumps(last, separators=separators).encode() + b"\n\n"
        body = chunk() + end + chunk({"prompt_tokens": 9}, choices=[]) + DONE
        seen = chat_stream(body)
        assert (seen.status, seen.remarks) == (Status.COMPLETE, remarks)
        assert chat_stream(end + DONE).remarks == remarks


def test_odd_choices_say_nothing() -> None:
    """What is no list of objects is passed over."""
    for choices in ("odd", [7], {"finish_reason": "stop"}):
        seen = chat({"prompt_tokens": 9}, choices=choices)
        assert (seen.usage, seen.remarks) == (Usage(9), Remarks())
