"""The end of a sidecar: what a rolling update does to it while answers are running."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from time import monotonic

import pytest

from tests.support.calls import body_for, post, request, samples, send
from tests.support.clouds import Clouds
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process, until
from tests.support.wire import Answer, read_answer

pytestmark = pytest.mark.anyio

KEY = "sk-drain-1"
SCRAPER = {"X-Prometheus-Scrape-Timeout-Seconds": "1"}


async def begin(
    sidecar: SidecarProcess, question: str, model: str = "claude-drain"
) -> asyncio.Task[Answer]:
    """Begin a streamed call; return when its head and its start are there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.port)
    writer.write(post(body_for(model, "draining", question=question, stream=True), KEY))
    head = await reader.readuntil(b"message_start")

    async def rest() -> Answer:
        # What was read already goes first.
        again = asyncio.StreamReader()
        again.feed_data(head)
        while chunk := await reader.read(65536):
            again.feed_data(chunk)
            if chunk.endswith(b"0\r\n\r\n"):
                break
        again.feed_eof()
        writer.close()
        return await read_answer(again)

    return asyncio.create_task(rest())


async def readiness(sidecar: SidecarProcess) -> tuple[int, bytes]:
    answer = await send(sidecar.admin_url, request("GET", "/readyz"))
    return answer.status, answer.body


async def accepts(sidecar: SidecarProcess) -> bool:
    try:
        answer = await send(sidecar.url, post(body_for("claude-drain", "more"), KEY))
    except ConnectionRefusedError:
        return False
    return answer.status == 200


async def metrics(
    sidecar: SidecarProcess, headers: Mapping[str, str] | None = None
) -> list[tuple[str, dict[str, str], float]]:
    answer = await send(sidecar.admin_url, request("GET", "/metrics", headers))
    return samples(answer.body.decode())


def of(rows: list[tuple[str, dict[str, str], float]], name: str, **labels: str) -> float:
    return sum(v for found, its, v in rows if found == name and labels.items() <= its.items())


async def exit_code(sidecar: SidecarProcess, timeout_s: float) -> int:
    return await asyncio.to_thread(sidecar.process.exit_code, timeout_s=timeout_s)


def logged(sidecar: SidecarProcess, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in sidecar.process.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


async def test_running_stream_ends_whole(clouds: Clouds, tmp_path: Path) -> None:
    """After SIGTERM /readyz says 503 at once, requests are taken until the delay is over and
    then no more, a running stream ends whole, and the process ends with 0."""
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_DRAIN_DELAY_S": "1",
        "SIDECAR_DRAIN_TIMEOUT_S": "20",
    }
    with sidecar_process(tmp_path, settings) as sidecar:
        answer = await begin(sidecar, "[[event-gap-ms 50]] [[many-events 60]]")
        async with asyncio.timeout(5):
            while await readiness(sidecar) != (200, b"ready\n"):  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.01)
        began = monotonic()
        sidecar.process.send(signal.SIGTERM)
        async with asyncio.timeout(0.5):
            while await readiness(sidecar) == (200, b"ready\n"):  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.01)
        assert await readiness(sidecar) == (503, b"draining\n")
        assert await accepts(sidecar)
        while await accepts(sidecar):  # noqa: ASYNC110 - a process
            await asyncio.sleep(0.02)
        assert 0.9 < monotonic() - began < 2
        assert not answer.done()
        # Metrics and probes go on to the end.
        assert await readiness(sidecar) == (503, b"draining\n")
        rows = await metrics(sidecar)
        assert of(rows, "litellm_sidecar_http_requests_in_flight") == 1
        assert ("litellm_sidecar_drain_aborts_total", {}, 0) in rows

        whole = await asyncio.wait_for(answer, 10)
        assert whole.complete
        assert whole.body.count(b"event: content_block_delta") == 60
        assert whole.body.endswith(b"\n\n")
        assert b"message_stop" in whole.body
        assert await exit_code(sidecar, 5) == 0
        (drained,) = logged(sidecar, "drained")
        # One of the calls that were tried out may have been among them.
        assert drained["ended"] in (1, 2)
        assert drained["cut"] == 0
        assert logged(sidecar, "stopped")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_ends_it_at_once(
    clouds: Clouds, tmp_path: Path, first: signal.Signals
) -> None:
    """Whoever does not want to wait sends a second signal."""
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_DRAIN_DELAY_S": "60",
        "SIDECAR_DRAIN_TIMEOUT_S": "60",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "60",
    }
    with sidecar_process(tmp_path, settings) as sidecar:
        answer = await begin(sidecar, "[[hang-after-start]]")
        await metrics(sidecar, SCRAPER)
        sidecar.process.send(first)
        await until(lambda: logged(sidecar, "draining"))
        await asyncio.sleep(0.3)
        assert not answer.done()
        began = monotonic()
        sidecar.process.send(signal.SIGTERM)
        assert await exit_code(sidecar, 10) == 0
        assert monotonic() - began < 2
        assert not (await answer).complete


async def test_interrupt_does_not_delay(clouds: Clouds, tmp_path: Path) -> None:
    """Ctrl-C skips the delay and the last scrape: nobody routes to a terminal."""
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_DRAIN_DELAY_S": "60",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "60",
    }
    with sidecar_process(tmp_path, settings) as sidecar:
        assert await accepts(sidecar)
        await metrics(sidecar, SCRAPER)
        sidecar.process.send(signal.SIGINT)
        assert await exit_code(sidecar, 3) == 0


async def test_stream_that_hangs_is_cut_and_counted(clouds: Clouds, tmp_path: Path) -> None:
    """When its time is up a stream is cut, not ended as if it were whole; what it said is
    counted, and the last scrape shows it although its series is new. Then the process ends."""
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_DRAIN_TIMEOUT_S": "1",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "20",
    }
    model = "claude-hangs"
    with sidecar_process(tmp_path, settings) as sidecar:
        clouds.cache.clear()
        answer = await begin(sidecar, "[[hang-after-start]]", model)
        await metrics(sidecar, SCRAPER)
        began = monotonic()
        sidecar.process.send(signal.SIGTERM)
        cut = await asyncio.wait_for(answer, 5)
        assert not cut.complete
        assert 0.9 < monotonic() - began < 2.5
        await until(lambda: logged(sidecar, "drained"))
        assert logged(sidecar, "drained")[0]["cut"] == 1

        shown = []
        while True:
            try:
                shown.append(await metrics(sidecar, SCRAPER))
            except OSError:
                break
            await asyncio.sleep(0.2)
        assert await exit_code(sidecar, 5) == 0
        assert monotonic() - began < 6
        written = "litellm_sidecar_input_tokens_total"
        assert of(shown[0], written, model=model) == 0
        last = shown[-1]
        entry = clouds.books.entries[-1]
        assert of(last, written, model=model, cache="write_5m") == 1500
        assert entry.cache_creation_input_tokens == 1500
        assert of(last, written, model=model, cache="uncached") == entry.input_tokens
        assert of(last, "litellm_sidecar_observations_total", model=model, status="partial") == 1
        assert of(last, "litellm_sidecar_http_requests_in_flight") == 0
        assert of(shown[0], "litellm_sidecar_drain_aborts_total") == 1
        assert of(last, "litellm_sidecar_drain_aborts_total") == 1
        assert logged(sidecar, "final_scrape")


async def test_prometheus_has_the_final_counts(clouds: Clouds, tmp_path: Path) -> None:
    """With a real Prometheus what is counted in the last second of the process is not lost."""
    require(find_prometheus(), "Prometheus")
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_DRAIN_TIMEOUT_S": "20",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "20",
    }
    model = "claude-last"
    targets = {}
    with sidecar_process(tmp_path, settings) as sidecar:
        targets["sidecar"] = sidecar.admin_url.removeprefix("http://")
        with Prometheus(targets, tmp_path) as prometheus:
            await asyncio.to_thread(prometheus.wait_for_scrapes, 1)
            answer = await begin(sidecar, "[[event-gap-ms 20]] [[many-events 20]]", model)
            sidecar.process.send(signal.SIGTERM)
            assert (await answer).complete
            assert await exit_code(sidecar, 10) == 0
            entry = clouds.books.entries[-1]
            prompt = entry.input_tokens + entry.cache_creation_input_tokens
            prompt += entry.cache_read_input_tokens
            for name, value in {
                "litellm_sidecar_input_tokens_total": prompt,
                "litellm_sidecar_output_tokens_total": entry.output_tokens,
            }.items():
                # The target is gone: look back over what was scraped.
                ((_, last),) = prometheus.query(
                    f'sum(last_over_time({name}{{model="{model}"}}[1m]))'
                )
                assert last == value


@pytest.mark.parametrize("after", [False, True], ids=["before the last call", "after it"])
async def test_scrape_during_the_drain_will_do(clouds: Clouds, tmp_path: Path, after: bool) -> None:
    """A scrape that showed every final count need not be repeated when the drain is over; one
    that came before the last exchange is not enough."""
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_DRAIN_DELAY_S": "0.5",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "3",
    }
    with sidecar_process(tmp_path, settings) as sidecar:
        assert await accepts(sidecar)
        await metrics(sidecar, SCRAPER)
        await metrics(sidecar, SCRAPER)
        sidecar.process.send(signal.SIGTERM)
        await until(lambda: logged(sidecar, "draining"))
        assert await accepts(sidecar)
        if after:
            await metrics(sidecar, SCRAPER)
        assert await exit_code(sidecar, 10) == 0
        assert bool(logged(sidecar, "final_scrape")) is after
        assert bool(logged(sidecar, "no_final_scrape")) is not after


async def test_ends_without_anybody_who_scrapes(clouds: Clouds, tmp_path: Path) -> None:
    """Where nobody scrapes nobody is waited for."""
    settings = {"SIDECAR_UPSTREAM": clouds.url, "SIDECAR_FINAL_SCRAPE_WAIT_S": "60"}
    with sidecar_process(tmp_path, settings) as sidecar:
        assert await accepts(sidecar)
        await metrics(sidecar)
        sidecar.process.send(signal.SIGTERM)
        assert await exit_code(sidecar, 3) == 0
