"""Why caching missed, through a process and a real LiteLLM, against what the provider did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.calls import ask_now, body_for, request, samples
from tests.support.litellm import RED, LiteLLM
from tests.support.running import SidecarProcess, sidecar_process
from tests.support.wire import Answer

MISSES = "litellm_sidecar_cache_misses_total"


@pytest.fixture
def front(litellm: LiteLLM, tmp_path: Path) -> Iterator[SidecarProcess]:
    """Run a sidecar that has seen no conversation: a miss is told from those of the same key."""
    with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": litellm.url}) as running:
        yield running


def misses(front: SidecarProcess, model: str) -> Counter[str]:
    text = ask_now(front.admin_url, request("GET", "/metrics")).body.decode()
    found: Counter[str] = Counter()
    for name, labels, value in samples(text):
        if name == MISSES and labels["model"] == model:
            found[labels["reason"]] += round(value)
    return found


def ask(front: SidecarProcess, body: dict[str, Any]) -> tuple[Answer, str]:
    """Make a call; returns its answer, and why it missed: empty if it did not."""
    before = misses(front, body["model"])
    raw = request("POST", "/v1/messages", {"authorization": f"Bearer {RED.key}"}, body)
    answer = ask_now(front.url, raw)
    assert (answer.status, answer.complete) == (200, True), answer.body
    new = misses(front, body["model"]) - before
    assert new.total() <= 1
    return answer, next(iter(new), "")


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_each_reason_that_needs_no_waiting(
    litellm: LiteLLM, front: SidecarProcess, stream: bool
) -> None:
    """What is read is no miss; what changes is named by its first block that differs."""
    topic = f"misses {litellm.version} {stream}"
    body = body_for("claude-direct", topic, stream=stream)
    body["messages"][0]["content"] = topic
    body["tools"] = [{"name": "a", "description": topic, "input_schema": {"type": "object"}}]
    assert ask(front, body)[1] == "not_seen_here"
    assert ask(front, body)[1] == ""
    system = body | {"system": body_for("claude-direct", f"{topic} at 12:01")["system"]}
    assert ask(front, system)[1] == "changed_system"
    tools = body | {"tools": [*body["tools"], body["tools"][0] | {"name": "b"}]}
    assert ask(front, tools)[1] == "changed_tools"
    turns = [{"role": "user", "content": f"{topic} again"}, {"role": "assistant", "content": "yes"}]
    turns.append({"role": "user", "content": system["system"]})
    said: dict[str, Any] = {"model": "claude-direct", "max_tokens": 5, "stream": stream}
    said["messages"] = turns
    assert ask(front, said)[1] in ("not_seen_here", "changed_tools")
    first = said["messages"][0]
    edited = said | {"messages": [first, {"role": "assistant", "content": "no"}, turns[2]]}
    assert ask(front, edited)[1] == "changed_messages"
    short = body_for("claude-direct", f"{topic} short", tokens=500, stream=stream)
    assert ask(front, short)[1] == "too_short"


def test_a_router_that_hops(litellm: LiteLLM, front: SidecarProcess) -> None:
    """Each deployment writes the prompt once; all but the first write could have been a read."""
    body = body_for("claude-hop", f"hop {litellm.version}", tokens=5000)
    seen: set[bytes] = set()
    for _ in range(60):
        answer, reason = ask(front, body)
        (deployment,) = (value for name, value in answer.headers if name == b"x-litellm-model-id")
        expected = "" if deployment in seen else "other_deployment" if seen else "not_seen_here"
        assert reason == expected
        seen.add(deployment)
        if len(seen) == 2:
            break
    assert len(seen) == 2
    assert ask(front, body)[1] == ""
