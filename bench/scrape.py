"""What a scrape of 30,000 series does to a stream, or of 4,000: `make bench-scrape`.

    python -m bench.scrape [--series 4000]

Three processes: a sidecar that was filled with series, in whose loop a probe notes how late
it wakes; a scraper that asks as Prometheus does; and this one, which is the provider of a
paced stream and its client, and notes how late each event arrives. All stamp what they note
with the same clock, so that a pause can be put down to the scrape in which it fell. The
sidecar has a core of its own, where the machine has two. Between the scrapes lie times of
rest: what is late there is the machine's doing.

The figures are in milliseconds, of each the median and the greatest over all scrapes: `busy`
is how long the loop computed between two turns of the probe, `late` how late the probe woke,
`stream` how late an event came (one is sent every 5 ms), `answer` how long a scrape took;
`event_p99` is the lateness that 99 of 100 events stay below, of all that were under way during
a scrape, and of all at rest. The exit code is 1 where a scrape kept the loop busy for more than
5 ms, made the stream late by more than that and what the machine did at rest, or took more than
300 ms, or 50 ms with 4,000 series.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import uvloop

from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.exchange import End, Exchange, Observation, RequestFacts, Route, Status, Usage
from sidecar.lifecycle import Lifecycle

REST_S = 0.15
EVENT_S = 0.005
PROBE_S = 0.001
ACCEPTS = {
    "text": "text/plain",
    # Prometheus 2.42's own.
    "openmetrics": (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;"
        "version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    ),
}
MAX_PAUSE_MS = 5.0


class Size(NamedTuple):
    """How much is measured."""

    scrapes: int
    max_answer_ms: float


# A scrape of 4,000 series is over before many events come: it takes more of them.
SIZES = {30_000: Size(30, 300.0), 4_000: Size(200, 50.0)}


class Lateness(NamedTuple):
    """Something that should have happened earlier; both in seconds, on the monotonic clock."""

    at: float
    by: float


class Probed(NamedTuple):
    """What the probe in the loop noted."""

    late: list[Lateness]
    busy: list[Lateness]


class Window(NamedTuple):
    """One scrape, or one time of rest."""

    name: str
    began: float
    ended: float
    size: int


# The sidecar's process.


def fill(sidecar: Sidecar, series: int) -> int:
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
        if sidecar.metrics.store.births >= series:
            break
    return sidecar.metrics.store.births


async def serve(pipe: Connection, upstream: str, wanted: int) -> None:
    """Run a filled sidecar until told to stop, and say how late its loop was."""
    sidecar = Sidecar(Settings(upstream=upstream, port=0, admin_port=0))
    series = fill(sidecar, wanted)
    lifecycle = Lifecycle(sidecar)
    task = asyncio.create_task(lifecycle.run())
    await lifecycle.serving.wait()
    probed = Probed([], [])

    async def probe() -> None:
        while True:
            due, busy = time.monotonic() + PROBE_S, time.thread_time()
            await asyncio.sleep(PROBE_S)
            now = time.monotonic()
            probed.late.append(Lateness(now, now - due))
            probed.busy.append(Lateness(now, time.thread_time() - busy))

    prober = asyncio.create_task(probe())
    pipe.send((series, lifecycle.port, lifecycle.admin_port))
    await asyncio.to_thread(pipe.recv)
    prober.cancel()
    pipe.send(probed)
    lifecycle.stop()
    await task


def serve_in_process(pipe: Connection, upstream: str, wanted: int) -> None:
    """Run the sidecar on the loop that the product runs on."""
    take_core(0)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(pipe, upstream, wanted))


def take_core(number: int) -> None:
    """Keep this process on one core, and so out of the way of the others."""
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


# The scraper's process.


def scrape(pipe: Connection, port: int, scrapes: int) -> None:
    """Scrape on a kept connection, as Prometheus does, and say when."""
    take_core(1)
    windows = []
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(scrapes):
        for name, accept in ACCEPTS.items():
            began = time.monotonic()
            time.sleep(REST_S)
            windows.append(Window("rest", began, began := time.monotonic(), 0))
            headers = {"accept": accept, "accept-encoding": "gzip"}
            headers["x-prometheus-scrape-timeout-seconds"] = "10"
            connection.request("GET", "/metrics", headers=headers)
            size = len(connection.getresponse().read())
            windows.append(Window(name, began, time.monotonic(), size))
    pipe.send(windows)


# The provider and the client of the stream.


async def provide(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with a stream of events, each of which says when it was sent."""
    try:
        while b"/health/" in await reader.readuntil(b"\r\n\r\n"):  # the sidecar's probe
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await reader.readexactly(len(b"{}"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        while not reader.at_eof():
            writer.write(b"event: content_block_delta\ndata: %.6f\n\n" % time.monotonic())
            await asyncio.sleep(EVENT_S)
    except asyncio.IncompleteReadError:
        pass  # the connection of a probe has ended
    finally:
        writer.close()


async def listen(port: int, events: list[Lateness]) -> None:
    """Read such a stream through the sidecar, and note how late each event is."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    try:
        while line := await reader.readline():
            if line.startswith(b"data: "):
                now = time.monotonic()
                events.append(Lateness(now, now - float(line[6:])))
    finally:
        writer.close()


async def measure(wanted: int) -> dict[str, Any]:
    """Run the measurement with so many series and return its figures."""
    scrapes = SIZES[wanted].scrapes
    gc.freeze()  # the client's own pauses are not what is measured
    server = await asyncio.start_server(provide, "127.0.0.1", 0)
    upstream = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    spawning = multiprocessing.get_context("spawn")
    to_sidecar, of_sidecar = spawning.Pipe()
    to_scraper, of_scraper = spawning.Pipe()
    sidecar = spawning.Process(target=serve_in_process, args=(of_sidecar, upstream, wanted))
    sidecar.start()
    take_core(1)
    series, port, admin_port = await asyncio.to_thread(to_sidecar.recv)
    events: list[Lateness] = []
    listener = asyncio.create_task(listen(port, events))
    scraper = spawning.Process(target=scrape, args=(of_scraper, admin_port, scrapes))
    scraper.start()
    windows: list[Window] = await asyncio.to_thread(to_scraper.recv)
    to_sidecar.send(None)
    probed: Probed = await asyncio.to_thread(to_sidecar.recv)
    listener.cancel()
    for process in (sidecar, scraper):
        await asyncio.to_thread(process.join, 10)
    server.close()
    await asyncio.sleep(10 * EVENT_S)  # the provider notices that nobody listens
    figures: dict[str, Any] = {"series": series, "scrapes": scrapes}
    for name in ("rest", *ACCEPTS):
        chosen = [window for window in windows if window.name == name]
        figures[name] = {
            "busy_ms": summary(longest(probed.busy, chosen)),
            "late_ms": summary(longest(probed.late, chosen)),
            "stream_ms": summary(longest(events, chosen)),
            "event_p99_ms": p99(events, chosen),
        }
        if name in ACCEPTS:
            figures[name]["answer_ms"] = summary(w.ended - w.began for w in chosen)
            figures[name]["bytes"] = max(window.size for window in chosen)
    return figures


def longest(noted: Sequence[Lateness], windows: Iterable[Window]) -> list[float]:
    """Find the greatest lateness in each window; one that ends after it began in it."""
    return [max(within(noted, window), default=0.0) for window in windows]


def p99(noted: Sequence[Lateness], windows: Iterable[Window]) -> float:
    """Find the lateness that 99 of 100 stay below, of all that fall in some window."""
    found = sorted(by for window in windows for by in within(noted, window))
    return round(1000 * found[math.ceil(0.99 * len(found)) - 1], 2)


def within(noted: Sequence[Lateness], window: Window) -> list[float]:
    """What was late in a window: was due before its end, and came after it had begun."""
    return [n.by for n in noted if n.at >= window.began and n.at - n.by <= window.ended]


def summary(values: Iterable[float]) -> dict[str, float]:
    """The median and the greatest, in milliseconds."""
    scaled = [1000 * value for value in values]
    return {"median": round(statistics.median(scaled), 2), "max": round(max(scaled), 2)}


def within_limits(figures: dict[str, Any], max_answer_ms: float) -> bool:
    """Whether no scrape held up anything for too long."""
    noise: float = figures["rest"]["stream_ms"]["max"]
    return all(
        figures[name]["busy_ms"]["max"] <= MAX_PAUSE_MS
        and figures[name]["stream_ms"]["max"] <= MAX_PAUSE_MS + noise
        and figures[name]["answer_ms"]["max"] <= max_answer_ms
        for name in ACCEPTS
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what a scrape does to a stream.")
    parser.add_argument("--series", type=int, choices=SIZES, default=30_000)
    wanted = parser.parse_args().series
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        measured = runner.run(measure(wanted))
    print(json.dumps(measured, indent=1))
    sys.exit(not within_limits(measured, SIZES[wanted].max_answer_ms))
