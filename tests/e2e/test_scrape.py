"""A real Prometheus and the first tokens of a new series; refused requests and their series."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.support.clouds import Clouds
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import running, sidecar_process
from tests.support.wire import upstream

BODY = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 9,
    "system": [
        {"type": "text", "text": "scraped " * 2000, "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [{"role": "user", "content": "hello"}],
}


def test_first_tokens_of_a_new_series_are_not_lost(clouds: Clouds, tmp_path: Path) -> None:
    """increase() shows the tokens with which a series was born."""
    require(find_prometheus(), "prometheus")
    for name in ("sidecar", "prometheus"):
        (tmp_path / name).mkdir()
    with (
        sidecar_process(tmp_path / "sidecar", {"SIDECAR_UPSTREAM": clouds.url}) as side,
        Prometheus(
            {"sidecar": f"127.0.0.1:{side.admin_port}"}, tmp_path / "prometheus"
        ) as prometheus,
    ):
        prometheus.wait_for_scrapes(2)
        before = len(clouds.books.entries)
        for _ in range(2):
            answer = httpx.post(
                f"{side.url}/v1/messages", json=BODY, headers={"x-api-key": "k"}, trust_env=False
            )
            assert answer.status_code == 200
        write, read = clouds.books.entries[before:]
        prometheus.wait_for_scrapes(4)
        for name, tokens in {
            "litellm_cached_tokens_metric_total": read.cache_read_input_tokens,
            'litellm_sidecar_input_tokens_total{cache="write_5m"}': write.ephemeral_5m_input_tokens,
        }.items():
            assert tokens > 1000
            grown = f"sum(max_over_time({name}[5m]) - min_over_time({name}[5m]))"
            ((_, value),) = prometheus.query(grown)
            assert value == tokens
            # increase() extrapolates to the window's edges, upwards only from a zero.
            ((_, increase),) = prometheus.query(f"sum(increase({name}[5m]))")
            assert tokens <= increase < 2 * tokens


@pytest.mark.anyio
async def test_refused_requests_create_no_series() -> None:
    """10,000 requests with invented models and keys that get 401 leave no series behind."""
    refusal = b"HTTP/1.1 401 Unauthorized\r\ncontent-type: application/json\r\n"
    refusal += b"content-length: 2\r\n\r\n{}"

    async with upstream(refusal) as up, running(up.url) as side:

        async def ask_many(numbers: range) -> None:
            reader, writer = await asyncio.open_connection(*side.host)
            for number in numbers:
                body = b'{"model":"invented-%d"}' % number
                writer.write(
                    b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: sk-%d\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (number, len(body), body)
                )
                await reader.readexactly(len(refusal))
            writer.close()

        async def series() -> set[str]:
            async with httpx.AsyncClient(trust_env=False) as client:
                text = (await client.get(f"{side.admin_url}/metrics")).text
            return {line.rsplit(" ", 1)[0] for line in text.splitlines()}

        await ask_many(range(1))
        before = await series()
        async with asyncio.timeout(100):
            await asyncio.gather(*(ask_many(range(n, 10_000, 8)) for n in range(8)))
        assert await series() == before
        assert side.value("litellm_sidecar_http_requests_total", code="401") == 10_001
