"""Miss reasons through the relay, before the stand-in provider, on a clock that jumps."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from sidecar.demo.provider import Books, PromptCache
from sidecar.exchange import MissReason
from tests.support.calls import body_for
from tests.support.clouds import create_clouds, serving
from tests.support.running import Running, running, until

pytestmark = pytest.mark.anyio

MODEL = "claude-sonnet-4-5-20250929"


class Clock:
    """The time of day, and so much later."""

    later = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.later


async def ask(front: Running, topic: str, ttl: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        body = body_for(MODEL, topic, ttl=ttl)
        answer = await client.post(
            f"{front.url}/v1/messages", json=body, headers={"x-api-key": "sk-1"}
        )
        assert answer.status_code == 200


def misses(front: Running, reason: str) -> float:
    return front.value("litellm_sidecar_cache_misses_total", reason=reason)


@pytest.mark.parametrize(("ttl", "ttl_s"), [("5m", 300), ("1h", 3600)])
async def test_expired_and_never_read(ttl: str, ttl_s: float) -> None:
    """Read in time: a hit, and nothing lost. Too late: expired, and the second write is lost when
    its own time is over."""
    clock = Clock()
    cache = PromptCache(clock)
    lost = "litellm_sidecar_cache_write_tokens_never_read_total"
    money = "litellm_sidecar_cache_write_premium_never_read_usd_total"
    with serving(create_clouds(books=Books(), cache=cache)) as url:
        async with running(url) as front:
            tracker = front.sidecar.misses
            assert tracker is not None
            tracker._clock = clock
            await ask(front, "a", ttl)
            assert misses(front, "not_seen_here") == 1
            clock.later = ttl_s - 60
            await ask(front, "a", ttl)
            clock.later += ttl_s + 1
            await ask(front, "a", ttl)
            assert misses(front, "expired") == 1
            assert front.value(lost) == 0
            clock.later += ttl_s + 1
            await until(lambda: front.value(lost, ttl=ttl) == 1500)
            assert front.value(lost) == 1500
            assert front.value(money, ttl=ttl) > 0


async def test_off_there_is_nothing() -> None:
    """No series, no hashes, and no word in the log's line."""
    with serving(create_clouds(books=Books(), cache=PromptCache())) as url:
        async with running(url, miss_reasons=False) as front:
            assert front.sidecar.misses is None
            await ask(front, "a", "5m")
            names = {metric.name for metric in front.sidecar.registry.collect()}
            assert not [name for name in names if "cache_misses" in name and "sidecar" in name]
            assert not [name for name in names if "never_read" in name]


VERTEX = "/vertex_ai/v1/projects/p/locations/l/publishers/anthropic/models"
OTHER_MODEL = "claude-haiku-4-5-20251001"


def prediction(topic: str) -> dict[str, Any]:
    """Write a body of Messages as clouds take it: without a model."""
    rules = f"{topic} " * 5000
    return {
        "anthropic_version": "vertex-2023-10-16",
        "max_tokens": 64,
        "system": [{"type": "text", "text": rules, "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    }


def conversation(topic: str) -> dict[str, Any]:
    """Write a body of Converse."""
    return {
        "system": [{"text": f"{topic} " * 5000}, {"cachePoint": {"type": "default"}}],
        "messages": [{"role": "user", "content": [{"text": "hi"}]}],
    }


@pytest.mark.parametrize(
    ("before", "after", "write_body"),
    [
        (f"{VERTEX}/", ":rawPredict", prediction),
        (f"{VERTEX}/", ":streamRawPredict", prediction),
        ("/bedrock/model/", "/invoke", prediction),
        ("/bedrock/model/", "/invoke-with-response-stream", prediction),
        ("/bedrock/model/", "/converse", conversation),
        ("/bedrock/model/", "/converse-stream", conversation),
    ],
)
async def test_the_model_of_a_path_is_told_apart(before: str, after: str, write_body: Any) -> None:
    """Where the body names no model, prefixes belong to the one that the path names."""
    clouds = create_clouds(books=Books(), cache=PromptCache())
    mounts = [Mount("/vertex_ai", clouds), Mount("/bedrock", clouds)]
    with serving(Starlette(routes=mounts)) as url:
        async with running(url) as front, httpx.AsyncClient(trust_env=False) as client:

            async def told(model: str, topic: str) -> dict[str, float]:
                target = f"{front.url}{before}{model}{after}"
                answer = await client.post(
                    target, json=write_body(topic), headers={"authorization": "Bearer sk-1"}
                )
                assert answer.status_code == 200, answer.text
                name = "litellm_sidecar_cache_misses_total"
                found = {
                    reason: front.value(name, model=model, reason=reason) for reason in MissReason
                }
                return {reason: count for reason, count in found.items() if count}

            new = {MissReason.NOT_SEEN_HERE: 1.0}
            assert await told(MODEL, "rules") == new
            assert await told(MODEL, "rules") == new
            assert await told(OTHER_MODEL, "rules") == new
            assert await told(MODEL, "laws") == new | {MissReason.CHANGED_SYSTEM: 1.0}
