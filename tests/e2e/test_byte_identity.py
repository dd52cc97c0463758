"""Every kind of answer of a real LiteLLM, asked for directly and through the sidecar with the
same bytes: status, header pairs in order, and body are the same.

Two calls of one LiteLLM differ by themselves. The stand-in's ids are held still and its
prompt cache is emptied before each call; what LiteLLM makes anew for each answer is in `VARYING`.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from sidecar.demo import provider
from tests.support.calls import body_for, post, request, send
from tests.support.clouds import Clouds
from tests.support.litellm import RED, LiteLLM
from tests.support.running import SidecarProcess
from tests.support.wire import Answer

pytestmark = pytest.mark.anyio

VARYING = re.compile(
    rb"date"  # the second of the answer
    rb"|x-litellm-call-id"  # a new UUID for each call
    rb"|x-litellm-.*duration-ms"  # how long it took
    rb"|llm_provider-date"
    rb"|llm_provider-anthropic-ratelimit-.*-reset"  # a minute after the answer
)

KEY = {"authorization": f"Bearer {RED.key}"}


def small(text: str = "Hello", **members: Any) -> dict[str, Any]:
    body = {"model": "claude-direct", "max_tokens": 8}
    return body | {"messages": [{"role": "user", "content": text}]} | members


MESSAGES = {
    f"{model} {mode}": (200, post(body_for(model, "identity", stream=mode == "SSE"), RED.key))
    for model in ("claude-direct", "claude-vertex", "claude-bedrock")
    for mode in ("JSON", "SSE")
}
ASKED = MESSAGES | {
    "compressed if it can": (
        200,
        post(small(), RED.key, **{"accept-encoding": "gzip, deflate, br, zstd"}),
    ),
    "401": (401, post(small(), "sk-nobody")),
    "no key": (401, request("POST", "/v1/messages", {}, small())),
    "no such model": (400, post(small(model="no-such-model"), RED.key)),
    "not JSON": (400, request("POST", "/v1/messages", KEY, b'{"model')),
    "400 of the provider": (400, post(small("[[status-400]]"), RED.key)),
    "an error in the stream": (
        200,
        post(small("[[error-mid-stream]]", stream=True), RED.key),
    ),
    "count_tokens": (200, request("POST", "/v1/messages/count_tokens", KEY, small())),
    "models": (200, request("GET", "/v1/models", KEY)),
    "models with a query": (200, request("GET", "/v1/models?limit=1000", KEY)),
    "liveliness": (200, request("GET", "/health/liveliness")),
    "HEAD": (200, request("HEAD", "/")),
    "landing page": (200, request("GET", "/")),
    "redirect to the UI": (307, request("GET", "/ui")),
    "page of the UI": (200, request("GET", "/ui/")),
    "no such path": (404, request("GET", "/no/such%2Fpath?x=%20")),
    "wrong method": (405, request("PUT", "/health/liveliness")),
    "preflight": (
        200,
        request(
            "OPTIONS",
            "/v1/messages",
            {"Origin": "http://ui.test", "Access-Control-Request-Method": "POST"},
        ),
    ),
}


def comparable(answer: Answer) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    headers = [
        (name, b"*" if VARYING.fullmatch(name) else value) for name, value in answer.end_to_end()
    ]
    return answer.status, headers, answer.body


@pytest.mark.parametrize("name", ASKED)
async def test_answer_is_that_of_the_direct_call(
    name: str,
    clouds: Clouds,
    litellm: LiteLLM,
    front: SidecarProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever LiteLLM answers, its client gets the same bytes through the sidecar."""
    monkeypatch.setattr(provider, "_new_id", lambda prefix, length: prefix + "0" * length)
    status, raw = ASKED[name]

    async def answer_of(url: str) -> Answer:
        clouds.cache.clear()
        return await send(url, raw)

    direct, through, again = [await answer_of(url) for url in (litellm.url, front.url, litellm.url)]
    assert direct.status == status
    directly = [comparable(direct), comparable(again)]
    if name == "an error in the stream":
        # 1.100.5 itself gives now the one answer and now another.
        for _ in range(10):
            if comparable(through) not in directly:
                directly.append(comparable(await answer_of(litellm.url)))
    else:
        # Were this to fail, more varies between two calls than is listed above.
        assert directly[0] == directly[1]
    assert comparable(through) in directly
    assert (through.complete, direct.complete) == (True, True)
    assert direct.body or name in ("HEAD", "redirect to the UI")
