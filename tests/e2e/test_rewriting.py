"""Usage rewritten in flight, as the clients see it that only know the normalised field.

The script of the report is two identical calls whose system prompt is to be cached: the first
writes, the second reads. It is played through a real LiteLLM for every provider, as JSON and as
streams, by the official SDKs of both APIs and by `curl` and `jq`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest
from openai.types import CompletionUsage

from tests.support.calls import ask_now, body_for, post, request, samples
from tests.support.clouds import Clouds
from tests.support.litellm import RED, LiteLLM
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process

PROVIDERS = ["claude-direct", "claude-vertex", "claude-bedrock"]
MODES = ["json", "sse"]
TOKENS = 1500
WRITES = {"cached_tokens": 0, "cache_creation_tokens": TOKENS}
READS = {"cached_tokens": TOKENS}


@dataclass(frozen=True)
class Rewriting:
    """A sidecar that rewrites."""

    sidecar: SidecarProcess
    full: bool


@pytest.fixture(scope="module", params=["openai", "openai-full"])
def rewriting(
    request: pytest.FixtureRequest, litellm: LiteLLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rewriting]:
    """Run one in front of LiteLLM."""
    settings = {"SIDECAR_UPSTREAM": litellm.url, "SIDECAR_REWRITE_USAGE": request.param}
    with sidecar_process(tmp_path_factory.mktemp("sidecar"), settings) as running:
        yield Rewriting(running, request.param == "openai-full")


@pytest.fixture(autouse=True)
def _new_script(clouds: Clouds) -> None:
    """Have the first call of each test write."""
    clouds.cache.clear()


def asked(model: str, mode: str) -> dict[str, Any]:
    return body_for(model, "rewriting", tokens=TOKENS, stream=mode == "sse")


def written_members(usage: dict[str, Any]) -> dict[str, Any]:
    """Return what a usage has of OpenAI's names."""
    names = ("prompt_tokens_details", "prompt_tokens", "completion_tokens")
    return {name: usage[name] for name in names if name in usage}


def expected(clouds: Clouds, rewriting: Rewriting, details: dict[str, int]) -> dict[str, Any]:
    """Return what the last call's final usage is to have, by the provider's books."""
    entry = clouds.books.entries[-1]
    assert entry.cache_read_input_tokens == details["cached_tokens"]
    assert entry.cache_creation_input_tokens == details.get("cache_creation_tokens", 0)
    members: dict[str, Any] = {"prompt_tokens_details": details}
    if rewriting.full:
        members["prompt_tokens"] = entry.input_tokens + TOKENS
        members["completion_tokens"] = entry.output_tokens
    return members


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", PROVIDERS)
def test_anthropic_sdk(
    clouds: Clouds, litellm: LiteLLM, rewriting: Rewriting, model: str, mode: str
) -> None:
    """Anthropic's SDK takes the members as extra ones, and all else as ever."""
    with anthropic.Anthropic(
        base_url=rewriting.sidecar.url, auth_token=RED.key, max_retries=0
    ) as sdk:
        for details in (WRITES, READS):
            body = asked(model, mode)
            if mode == "json":
                usage: Any = sdk.messages.create(**body).usage
            else:
                events = list(sdk.messages.create(**body))
                start, last = events[0], next(e for e in events if e.type == "message_delta")
                assert start.type == "message_start"
                assert start.message.usage.model_extra is not None
                assert start.message.usage.model_extra["prompt_tokens_details"] == details
                usage = last.usage
            entry = clouds.books.entries[-1]
            assert usage.output_tokens == entry.output_tokens
            assert written_members(usage.model_extra) == expected(clouds, rewriting, details)
    del body["stream"]
    with (
        anthropic.Anthropic(
            base_url=rewriting.sidecar.url, auth_token=RED.key, max_retries=0
        ) as sdk,
        sdk.messages.stream(**body) as stream,
    ):
        final = stream.get_final_message()
    assert final.usage.cache_read_input_tokens == TOKENS
    assert final.usage.input_tokens == clouds.books.entries[-1].input_tokens


class Message(openai.BaseModel):
    """An answer of the Messages API, for the little of it that OpenAI's SDK can know."""

    usage: CompletionUsage


class Event(openai.BaseModel):
    """An event of its streams."""

    type: str
    usage: CompletionUsage | None = None
    message: Message | None = None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", PROVIDERS)
def test_openai_sdk(
    clouds: Clouds, litellm: LiteLLM, rewriting: Rewriting, model: str, mode: str
) -> None:
    """OpenAI's SDK, which has no method for this route, reads the answer's usage as its own
    `CompletionUsage`."""
    with openai.OpenAI(
        base_url=f"{rewriting.sidecar.url}/v1", api_key=RED.key, max_retries=0
    ) as sdk:
        for details in (WRITES, READS):
            body = asked(model, mode)
            if mode == "json":
                usage = sdk.post("/messages", body=body, cast_to=Message).usage
            else:
                events = list(
                    sdk.post(
                        "/messages",
                        body=body,
                        cast_to=Event,
                        stream=True,
                        stream_cls=openai.Stream[Event],
                    )
                )
                assert events[0].message is not None
                found = events[0].message.usage.prompt_tokens_details
                assert found is not None
                assert found.cached_tokens == details["cached_tokens"]
                (last,) = [event.usage for event in events if event.type == "message_delta"]
                assert last is not None
                usage = last
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == details["cached_tokens"]
            wanted = expected(clouds, rewriting, details)
            assert written_members(usage.to_dict()) == wanted
            if rewriting.full:
                assert usage.prompt_tokens == wanted["prompt_tokens"]


SCRIPT = """
ask() {
  curl -sS --fail "$URL/v1/messages" -H "x-api-key: $KEY" -H 'content-type: application/json' \
    --data-binary "$BODY"
}
members='.usage | {prompt_tokens_details, prompt_tokens, completion_tokens} | del(.. | nulls)'
for _ in 1 2; do
  case $MODE in
    json) ask | jq -c "$members" ;;
    sse) ask | sed -n 's/^data: //p' | jq -c "select(.type == \\"message_delta\\") | $members" ;;
  esac
done
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", PROVIDERS)
def test_report_with_curl_and_jq(
    clouds: Clouds, litellm: LiteLLM, rewriting: Rewriting, model: str, mode: str
) -> None:
    """The report's script finds the field where its author looked for it."""
    for tool in ("curl", "jq"):
        require(shutil.which(tool), tool)
    settings = {"URL": rewriting.sidecar.url, "KEY": RED.key, "MODE": mode}
    done = subprocess.run(
        ["sh", "-euc", SCRIPT],
        env={"PATH": "/usr/bin:/bin", "BODY": json.dumps(asked(model, mode))} | settings,
        capture_output=True,
        timeout=60,
        check=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["prompt_tokens_details"] == WRITES
    assert second == expected(clouds, rewriting, READS)


def counted(sidecar: SidecarProcess) -> Counter[tuple[str, ...]]:
    """Return the series of tokens, answers and what could be read, and what was rewritten."""
    answer = ask_now(sidecar.admin_url, request("GET", "/metrics"))
    found: Counter[tuple[str, ...]] = Counter()
    for name, labels, value in samples(answer.body.decode()):
        if name.endswith(("tokens_total", "responses_total", "observations_total", "metric_total")):
            found[name, *labels.values()] = round(value)
        elif name == "litellm_sidecar_rewrites_total":
            found["rewrites", labels["result"]] = round(value)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", PROVIDERS)
def test_metrics_are_those_without_it(
    clouds: Clouds,
    litellm: LiteLLM,
    front: SidecarProcess,
    rewriting: Rewriting,
    model: str,
    mode: str,
) -> None:
    """The same script through a sidecar that changes nothing counts the same."""
    grown = []
    for sidecar in (front, rewriting.sidecar):
        clouds.cache.clear()
        before = counted(sidecar)
        for _ in range(2):
            assert ask_now(sidecar.url, post(asked(model, mode), RED.key)).complete
        after = counted(sidecar)
        grown.append({key: n - before[key] for key, n in after.items() if n != before[key]})
    off, on = grown
    assert on.pop(("rewrites", "rewritten")) == 2
    assert on == off
    assert sum(
        n for (name, *_), n in off.items() if name.endswith("cached_tokens_metric_total")
    ) == (TOKENS)
