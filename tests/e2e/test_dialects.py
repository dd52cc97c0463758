"""What is counted of every dialect, through a real LiteLLM, against the providers' books.

Each call is made twice, so that the second reads what the first left in the prompt cache. What
LiteLLM hides or refuses is here, too: `docs/dialects.md` says so, and these tests show it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from sidecar.demo.provider import BookEntry
from tests.support.calls import ask_now, body_for, request, samples
from tests.support.clouds import Clouds
from tests.support.litellm import DIRECT_MODEL, RED, VERTEX_MODEL, LiteLLM
from tests.support.running import SidecarProcess
from tests.support.wire import Answer

Body = dict[str, Any]
INPUT = "litellm_sidecar_input_tokens_total"
OUTPUT = "litellm_sidecar_output_tokens_total"
OBSERVATIONS = "litellm_sidecar_observations_total"
LONG = "You know all about it. " * 500


def chat(model: str, topic: str, *, stream: bool) -> Body:
    """Write a body of Chat Completions that asks for its usage."""
    part: Body = {"type": "text", "text": f"{topic} {LONG}"}
    if model.startswith("claude"):
        part["cache_control"] = {"type": "ephemeral"}
    body: Body = {
        "model": model,
        "max_tokens": 64,
        "messages": [
            {"role": "system", "content": [part]},
            {"role": "user", "content": "What is new?"},
        ],
    }
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


def response(model: str, topic: str, *, stream: bool) -> Body:
    """Write a body of Responses."""
    body: Body = {"model": model, "instructions": f"{topic} {LONG}", "input": "What is new?"}
    return body | ({"stream": True} if stream else {})


def message(model: str, topic: str, *, stream: bool) -> Body:
    """Write a body of Messages."""
    return body_for(model, topic, stream=stream)


def prediction(model: str, topic: str, *, stream: bool) -> Body:
    """Write a body of Messages as Vertex AI takes it: the model stands in the path."""
    body = body_for(model, topic, stream=stream) | {"anthropic_version": "vertex-2023-10-16"}
    del body["model"]
    return body


def invocation(model: str, topic: str, *, stream: bool) -> Body:
    """Write a body of Messages as Bedrock takes it: that it is to stream does, too."""
    body = body_for(model, topic) | {"anthropic_version": "bedrock-2023-05-31"}
    del body["model"], body["stream"]
    return body


def conversation(model: str, topic: str, *, stream: bool) -> Body:
    """Write a body of Converse."""
    return {
        "system": [{"text": f"{topic} {LONG}"}, {"cachePoint": {"type": "default"}}],
        "messages": [{"role": "user", "content": [{"text": "What is new?"}]}],
    }


VERTEX = (
    "/vertex_ai/v1/projects/stand-in/locations/us-east5/publishers/anthropic/models/" + VERTEX_MODEL
)
BEDROCK = "/bedrock/model/claude-bedrock"
CASES = [
    pytest.param("/v1/chat/completions", "gpt-direct", "openai", chat, id="chat-openai"),
    pytest.param("/v1/chat/completions", "claude-direct", None, chat, id="chat-anthropic"),
    pytest.param("/v1/responses", "gpt-direct", "openai", response, id="responses-openai"),
    pytest.param("/v1/responses", "claude-direct", None, response, id="responses-anthropic"),
    pytest.param("/v1/messages", "claude-direct", "anthropic", message, id="messages-anthropic"),
    pytest.param("/v1/messages", "gpt-direct", "openai", message, id="messages-openai"),
    pytest.param("/engines/gpt-direct/chat/completions", "gpt-direct", "openai", chat, id="engine"),
    pytest.param(
        "/openai/deployments/gpt-direct/chat/completions",
        "gpt-direct",
        "openai",
        chat,
        id="deployment",
    ),
    pytest.param("/openai/v1/chat/completions", "gpt-4o", "openai", chat, id="openai-endpoint"),
    pytest.param(
        "/anthropic/v1/messages", DIRECT_MODEL, "anthropic", message, id="anthropic-endpoint"
    ),
    pytest.param(
        (f"{VERTEX}:rawPredict", f"{VERTEX}:streamRawPredict"),
        VERTEX_MODEL,
        "vertex_ai",
        prediction,
        id="vertex-endpoint",
    ),
    pytest.param(
        (f"{BEDROCK}/invoke", f"{BEDROCK}/invoke-with-response-stream"),
        "claude-bedrock",
        "bedrock",
        invocation,
        id="bedrock-invoke",
    ),
    pytest.param(
        (f"{BEDROCK}/converse", f"{BEDROCK}/converse-stream"),
        "claude-bedrock",
        "bedrock",
        conversation,
        id="bedrock-converse",
    ),
]


def counts(front: SidecarProcess) -> Counter[tuple[str, ...]]:
    """Read what was counted so far, by model and provider, and what was observed."""
    answer = ask_now(front.admin_url, request("GET", "/metrics"))
    found: Counter[tuple[str, ...]] = Counter()
    for name, labels, value in samples(answer.body.decode()):
        if name == INPUT:
            found[labels["model"], labels["provider"], labels["cache"]] += round(value)
        elif name == OUTPUT:
            found[labels["model"], labels["provider"], "output"] += round(value)
        elif name == OBSERVATIONS:
            found["status", labels["status"]] += round(value)
    return found


def call(
    front: SidecarProcess, clouds: Clouds, path: str, body: Body
) -> tuple[Answer, list[BookEntry], Counter[tuple[str, ...]]]:
    """Make a call; returns its answer, what stands in the books of it, and what was counted."""
    before, entries = counts(front), len(clouds.books.entries)
    raw = request("POST", path, {"authorization": f"Bearer {RED.key}"}, body)
    answer = ask_now(front.url, raw)
    counted = counts(front)
    counted.subtract(before)
    return answer, clouds.books.entries[entries:], +counted


def true_counts(entry: BookEntry, model: str, provider: str) -> Counter[tuple[str, ...]]:
    """Say what has to be counted of an answer."""
    return +Counter(
        {
            ("status", "complete"): 1,
            (model, provider, "uncached"): entry.input_tokens,
            (model, provider, "read"): entry.cache_read_input_tokens,
            (model, provider, "write_5m"): entry.ephemeral_5m_input_tokens,
            (model, provider, "write_1h"): entry.ephemeral_1h_input_tokens,
            (model, provider, "output"): entry.output_tokens,
        }
    )


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize(("path", "model", "provider", "write_body"), CASES)
def test_counts_are_those_of_the_books(
    path: str | tuple[str, str],
    model: str,
    provider: str | None,
    write_body: Any,
    stream: bool,
    clouds: Clouds,
    litellm: LiteLLM,
    front: SidecarProcess,
) -> None:
    """Both calls are counted as the provider counts them, in the same disjoint classes."""
    if isinstance(path, tuple):
        path = path[stream]
    old = litellm.version == "1.83.10"
    if provider is None:
        # Nothing in the older version's answer tells who gave it.
        provider = "unknown" if old else "anthropic"
    body = write_body(model, f"{litellm.version} {path} {stream}", stream=stream)
    for turn in range(2):
        answer, entries, counted = call(front, clouds, path, body)
        assert (answer.status, answer.complete) == (200, True), answer.body
        (entry,) = entries
        true = true_counts(entry, model, provider)
        if old and (write_body, model) == (message, "gpt-direct"):
            # The adapter gives the whole prompt as uncached, and drops what was read.
            true[model, provider, "uncached"] += true.pop((model, provider, "read"), 0)
        if old and stream and (write_body, model) == (chat, "claude-direct"):
            # Of a stream's write the time to live is dropped.
            true[model, provider, "write_unknown"] = true.pop((model, provider, "write_5m"), 0)
        assert counted == +true
        cached = entry.cache_read_input_tokens > 1000
        # LiteLLM's way from Responses to Anthropic has no place for a breakpoint.
        assert cached == (turn == 1 and (write_body, model) != (response, "claude-direct"))


def test_stream_without_its_option_says_nothing(
    clouds: Clouds, litellm: LiteLLM, front: SidecarProcess
) -> None:
    """Neither OpenAI nor LiteLLM sends usage unasked: that the answer came is all there is."""
    body = chat("gpt-direct", f"{litellm.version} no option", stream=True)
    del body["stream_options"]
    answer, entries, counted = call(front, clouds, "/v1/chat/completions", body)
    assert (answer.status, answer.complete, len(entries)) == (200, True, 1)
    assert counted == {("status", "missing"): 1}


def test_bedrock_takes_models_of_the_router_alone(
    clouds: Clouds, litellm: LiteLLM, front: SidecarProcess
) -> None:
    """An id of Bedrock's own is refused, however it is spelled: that is LiteLLM's answer."""
    path = "/bedrock/model/us.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse"
    answer, entries, counted = call(front, clouds, path, conversation("", "x", stream=False))
    assert (answer.status, entries) == (400, [])
    assert counted == {("status", "error"): 1}
