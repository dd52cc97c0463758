"""A client that leaves in the middle of an answer, seen from the provider's side."""

from __future__ import annotations

import asyncio
import math
import time
from urllib.parse import urlsplit

import pytest

from tests.support.calls import body_for, post, request, samples, send
from tests.support.clouds import Clouds
from tests.support.litellm import RED, LiteLLM
from tests.support.running import SidecarProcess, running, until

pytestmark = pytest.mark.anyio


async def leave_after_start(url: str, raw: bytes) -> float:
    """Ask, read as far as `message_start`, close; return when that was."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    async with asyncio.timeout(10):
        writer.write(raw)
        received = b""
        while b'"message_start"' not in received or not received.endswith(b"\n\n\r\n"):
            chunk = await reader.read(65536)
            assert chunk, received
            received += chunk
    left_at = time.monotonic()
    writer.close()
    await writer.wait_closed()
    return left_at


async def counted(front: SidecarProcess, name: str, **labels: str) -> float:
    answer = await send(front.admin_url, request("GET", "/metrics"))
    return sum(
        value
        for found, its, value in samples(answer.body.decode())
        if found == name and labels.items() <= its.items()
    )


async def test_the_provider_sees_it_within_100_ms(clouds: Clouds) -> None:
    """With the sidecar directly before the provider, the provider's connection is closed within
    100 ms; what the start said is counted, and called partial."""
    body = body_for("claude-left", "leaving", stream=True)
    async with running(clouds.url) as side:
        await send(side.url, post(body, RED.key))
        body["messages"][0]["content"] = "Go on. [[hang-after-start]]"
        late = []
        for number in range(1, 11):
            at = len(clouds.books.entries)
            left_at = await leave_after_start(side.url, post(body, RED.key))
            await until(lambda at=at: clouds.books.entries[at].closed_at is not None)
            entry = clouds.books.entries[at]
            assert entry.closed_at is not None
            late.append(entry.closed_at - left_at)
            assert entry.cache_read_input_tokens == 1500
            partial = {"model": "claude-left", "status": "partial"}
            await until(
                lambda number=number, labels=partial: (
                    side.value("litellm_sidecar_observations_total", **labels) == number
                )
            )
            assert side.value("litellm_cached_tokens_metric_total") == 1500 * number
            assert side.value("litellm_cache_hits_metric_total") == number
            assert side.value("litellm_sidecar_http_requests_total", code="499") == number
        assert side.value("litellm_sidecar_http_requests_in_flight") == 0
    assert max(late) < 0.1, late


async def test_through_litellm(clouds: Clouds, litellm: LiteLLM, front: SidecarProcess) -> None:
    """Through LiteLLM 1.100 the provider is stopped within 100 ms, too. 1.83 lets the provider
    go on to the end, whoever leaves. The sidecar counts what was read in either case."""
    model, cached = "claude-direct", "litellm_cached_tokens_metric_total"
    body = body_for(model, f"leaving {litellm.version}", tokens=1777, stream=True)
    await send(front.url, post(body, RED.key))
    partial = {"model": model, "status": "partial"}
    before = await counted(front, cached, model=model)
    before_partial = await counted(front, "litellm_sidecar_observations_total", **partial)
    body["messages"][0]["content"] = "Go on. [[event-gap-ms 20]] [[many-events 25]]"
    late = []
    # The first, without the sidecar, shows that it is LiteLLM; what it does late for the first
    # time (it imports at need) is not held against anybody.
    for url in (litellm.url, front.url, front.url, front.url):
        at = len(clouds.books.entries)
        left_at = await leave_after_start(url, post(body, RED.key))
        assert clouds.books.entries[at].cache_read_input_tokens == 1777
        if litellm.version == "1.83.10":
            await until(lambda at=at: clouds.books.entries[at].completed)
            assert clouds.books.entries[at].closed_at is None
        else:
            await until(lambda at=at: clouds.books.entries[at].closed_at is not None)
            late.append((clouds.books.entries[at].closed_at or math.inf) - left_at)
    assert await counted(front, cached, model=model) == before + 3 * 1777
    grown = await counted(front, "litellm_sidecar_observations_total", **partial) - before_partial
    assert grown == 3
    assert max(late[1:], default=0) < 0.1, late
