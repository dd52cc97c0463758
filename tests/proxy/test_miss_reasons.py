"""Miss reasons through the relay, before the stand-in provider, on a clock that jumps."""

from __future__ import annotations

import time

import httpx
import pytest

from sidecar.demo.provider import Books, PromptCache
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
