"""What a scrape of 30,000 series does to the loop: `python -m bench.scrape`.

Fills a sidecar with series, scrapes it from another process while a probe in the loop notes
how late it wakes, and prints the longest pause, and how long the scrapes took.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import time

import uvloop

from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.exchange import End, Exchange, Observation, RequestFacts, Route, Status, Usage
from sidecar.lifecycle import Lifecycle

SERIES = 30_000
SCRAPES = 20
PROBE_S = 0.001
ACCEPTS = {"text": "text/plain", "OpenMetrics": "application/openmetrics-text;version=1.0.0"}


def fill(sidecar: Sidecar) -> int:
    """Submit exchanges of made-up models and teams until there are enough series."""
    for model, team in itertools.product(range(150), range(150)):
        exchange = Exchange(
            route=Route.MESSAGES,
            method="POST",
            status_code=200,
            observed=True,
            end=End.COMPLETE,
            facts=RequestFacts(f"model-{model}", True, True),
            observation=Observation(Status.COMPLETE, Usage(7, 16, 2101, 0), None, "msg_bdrk_1"),
            request_headers=[],
            response_headers=[(b"x-litellm-team-alias", b"team-%d" % team)],
            duration_s=1.0,
            first_byte_s=0.1,
            first_token_s=0.1,
            overhead_s=0.0001,
        )
        sidecar.ledger.begin(Route.MESSAGES)
        sidecar.ledger.submit(exchange)
        if sidecar.metrics.store.births >= SERIES:
            break
    return sidecar.metrics.store.births


async def scrape(port: int, accept: str) -> float:
    """Scrape from another process and return the seconds it took there."""
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{time_total}", "-H", f"accept: {accept}"]
    command += ["-H", "accept-encoding: gzip", f"http://127.0.0.1:{port}/metrics"]
    # In a thread: to start a process takes the loop milliseconds that are not the sidecar's.
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
    return float(done.stdout)


async def measure() -> dict[str, object]:
    """Run the measurement and return its figures, in milliseconds."""
    sidecar = Sidecar(Settings(upstream="http://127.0.0.1:9", port=0, admin_port=0))
    lifecycle = Lifecycle(sidecar)
    task = asyncio.create_task(lifecycle.run())
    await lifecycle.serving.wait()
    figures: dict[str, object] = {"series": fill(sidecar)}
    late: list[float] = []

    async def probe() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(PROBE_S)
            late.append(time.perf_counter() - began - PROBE_S)

    prober = asyncio.create_task(probe())
    for name, accept in {"idle": "", **ACCEPTS}.items():
        times = []
        worst = []
        for _ in range(SCRAPES):
            late.clear()
            if accept:
                times.append(await scrape(lifecycle.admin_port, accept))
            else:
                await asyncio.sleep(0.1)
            worst.append(max(late))
        figures[name] = {
            "longest_pause_ms": round(1000 * max(worst), 2),
            "median_longest_pause_ms": round(1000 * statistics.median(worst), 2),
        } | ({"median_answer_ms": round(1000 * statistics.median(times), 1)} if times else {})
    prober.cancel()
    lifecycle.stop()
    await task
    return figures


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measure()), indent=1))
