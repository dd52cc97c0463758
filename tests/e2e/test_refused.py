"""Requests that are refused, with names that were made up, make no series."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets

import pytest

from tests.support.calls import body_for, post, request, samples, send
from tests.support.litellm import LiteLLM
from tests.support.running import SidecarProcess, running
from tests.support.wire import upstream

pytestmark = pytest.mark.anyio

REQUESTS = 10_000
AT_ONCE = 50
METHODS = ("POST", "POST", "POST", "GET", "PROPFIND", "PURGE", "REPORT")
ERROR = json.dumps({"error": {"message": "unknown key", "type": "auth_error"}}).encode()
REFUSAL = (
    b"HTTP/1.1 401 Unauthorized\r\ncontent-type: application/json\r\n"
    b"x-litellm-team-alias: made-up\r\ncontent-length: %d\r\n\r\n" % len(ERROR)
) + ERROR


def invented(number: int) -> bytes:
    """A request with a key, a model, a path and a client of its own."""
    name = secrets.token_hex(8)
    paths = ("/v1/messages", f"/v1/messages?{name}", "/anthropic/v1/messages", f"/{name}")
    headers = {
        "authorization": f"Bearer sk-{name}",
        "x-litellm-api-key": name,
        "user-agent": f"{name}/{number}",
        "x-forwarded-for": f"10.0.{number // 256 % 256}.{number % 256}",
    }
    body = {"model": f"model-{name}", "messages": []}
    method = METHODS[number % len(METHODS)]
    return request(method, paths[number // 7 % len(paths)], headers, body)


async def series(admin_url: str) -> set[tuple[str, str]]:
    answer = await send(admin_url, request("GET", "/metrics"))
    return {(name, str(labels)) for name, labels, _ in samples(answer.body.decode())}


async def test_ten_thousand_refused_requests_make_no_series() -> None:
    """The series after 10,000 refused requests are those after the first of each kind."""
    kinds = len(METHODS) * 4
    async with upstream(REFUSAL) as up, running(up.url) as side:
        numbers = itertools.count()
        for _ in range(kinds):
            answer = await send(side.url, invented(next(numbers)))
            assert (answer.status, answer.body) == (401, ERROR)
        before = await series(side.admin_url)

        async def client() -> None:
            reader, writer = await asyncio.open_connection(*side.host)
            while (number := next(numbers)) < REQUESTS:
                writer.write(invented(number))
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 401 ")
                assert await reader.readexactly(len(ERROR)) == ERROR
            writer.close()

        async with asyncio.timeout(60):
            await asyncio.gather(*[client() for _ in range(AT_ONCE)])
        after = await series(side.admin_url)
        assert side.value("litellm_sidecar_http_requests_total", code="401") == REQUESTS
        assert len(up.received) == REQUESTS
    assert after == before


async def test_what_litellm_refuses_makes_no_series(
    litellm: LiteLLM, front: SidecarProcess
) -> None:
    """Neither do keys that LiteLLM does not know, and models that it does not have."""

    def refused() -> list[bytes]:
        name = secrets.token_hex(8)
        return [
            post(body_for(f"model-{name}", name), f"sk-{name}"),
            post(body_for("claude-direct", name), f"sk-{name}"),
            post(body_for(f"model-{name}", name), "sk-red-1"),
        ]

    async def ask_all() -> list[int]:
        return [(await send(front.url, raw)).status for raw in refused()]

    assert await ask_all() == [401, 401, 400]
    before = await series(front.admin_url)
    for _ in range(20):
        assert await ask_all() == [401, 401, 400]
    assert await series(front.admin_url) == before
