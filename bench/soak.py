"""Whether anything grows with time: `python -m bench.soak` (10 minutes).

Puts the mixed traffic of `bench.chaos`, broken exchanges included, through one sidecar at half of
the rate that it can take, and looks every few seconds at its memory, open files, tasks and at the
99th percentile of the time that undisturbed answers take; beside it, of the time that they take
without a sidecar, which is what the machine and the load itself make of it. Exit code 1 if memory
has grown by 5% or more since the warm-up, if files or tasks are not back where they were, or if a
count differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.accounting import cpu_s
from bench.chaos.books import Books
from bench.chaos.client import drive
from bench.chaos.judge import Life, Verdict, judge, read_lines
from bench.chaos.standin import StandIn
from bench.inspected import State, ask, run_until_terminated, samples, start
from bench.plot import Panel, draw
from tests.support.process import free_port

__all__: list[str] = []

_HERE = Path(__file__).parent
_CAPACITY_CLIENTS = 64
_CAPACITY_ROUNDS = 8
_SOAK_CLIENTS = 256
_WARM_UP_SHARE = 0.2
_WINDOW_SHARE = 0.1
"""Of the samples, at the end of the warm-up and at the end; their medians are compared."""
_MAX_GROWTH = 0.05
_DIRECT_SHARE = 0.1
"""Of the load: what goes to a stand-in directly."""
_DIRECT_CLIENTS = 32
_REST_S = 4.0
"""Longer than idle connections to the upstream are kept."""


class Sample(NamedTuple):
    """One look at the sidecar."""

    minute: float
    resident_mb: float
    files: int
    tasks: int
    p99_ms: float
    direct_p99_ms: float
    """Without a sidecar."""


class Figures(NamedTuple):
    """What came of a run."""

    capacity: float
    rate: float
    before: State
    after: State
    samples: list[Sample]
    verdict: Verdict
    seconds: float
    cpu_us: float
    """CPU time of the sidecar for each exchange."""

    def growth(self) -> tuple[float, float]:
        """Memory after the warm-up and at the end, in MB."""
        count = len(self.samples)
        window = max(1, int(count * _WINDOW_SHARE))
        warm = int(count * _WARM_UP_SHARE)
        sizes = [sample.resident_mb for sample in self.samples]
        return statistics.median(sizes[warm : warm + window]), statistics.median(sizes[-window:])

    def faults(self) -> list[str]:
        """What is not as it has to be."""
        warm, end = self.growth()
        faults = list(self.verdict.offences)
        if end >= warm * (1 + _MAX_GROWTH):
            faults.append(f"memory grew from {warm:.1f} to {end:.1f} MB")
        for name in ("files", "tasks", "connections"):
            was, is_ = getattr(self.before, name), getattr(self.after, name)
            if is_ > was:
                faults.append(f"{name} went from {was} to {is_}")
        return faults


class _Times:
    """The times of undisturbed answers, since one last asked."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._seen = len(books.attempts)

    def p99_ms(self) -> float:
        """Return the 99th percentile. What is under way at the moment is never in it."""
        new = self._books.attempts[self._seen :]
        self._seen += len(new)
        times = [attempt.took_s for attempt in new if attempt.took_s]
        return statistics.quantiles(times, n=100)[98] * 1000 if len(times) > 1 else 0.0


async def _look(
    books: Books,
    direct: Books,
    state: Callable[[], State],
    every_s: float,
    load: asyncio.Future[Any],
) -> list[Sample]:
    """Look at the sidecar until the load ends."""
    began = time.monotonic()
    times, direct_times = _Times(books), _Times(direct)
    found = []
    while not load.done():
        await asyncio.wait([load], timeout=every_s)
        p99_ms, direct_p99_ms = times.p99_ms(), direct_times.p99_ms()
        now = await asyncio.to_thread(state)
        minute = (time.monotonic() - began) / 60
        memory = now.resident_bytes / 1e6
        found.append(Sample(minute, memory, now.files, now.tasks, p99_ms, direct_p99_ms))
    return found


async def _load(books: Books, port: int, seconds: float, clients: int, rate: float | None) -> None:
    until = time.monotonic() + seconds
    await drive(books, port, clients=clients, until=lambda: time.monotonic() >= until, rate=rate)


async def _capacity(books: Books, port: int) -> float:
    """Find out how many exchanges go in a second: the best of a few, as others may be at work."""
    best = 0.0
    for _ in range(_CAPACITY_ROUNDS):
        done, began = len(books.attempts), time.monotonic()
        await _load(books, port, 1, _CAPACITY_CLIENTS, None)
        best = max(best, (len(books.attempts) - done) / (time.monotonic() - began))
    return best


def settings_for(upstream_port: int, usage_log: Path) -> dict[str, str]:
    """Write the settings of the sidecar: all that it logs is kept."""
    return {
        "SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream_port}",
        "SIDECAR_USAGE_LOG": str(usage_log),
        "SIDECAR_USAGE_LOG_FILES": "100",
        "SIDECAR_DRAIN_DELAY_S": "0",
    }


async def _run(seconds: float, every_s: float, seed: int) -> Figures:
    books, direct = Books(seed), Books(seed)
    standin, direct_standin = StandIn(books), StandIn(direct)
    standin.start()
    direct_standin.start()
    port, admin_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        log, usage_log = Path(name) / "log", Path(name) / "usage.jsonl"
        settings = settings_for(standin.port, usage_log)
        process = await asyncio.to_thread(start, log, port, admin_port, settings)

        def state() -> State:
            return ask(process, admin_port)

        try:
            capacity = await _capacity(books, port)
            await asyncio.sleep(_REST_S)
            before = await asyncio.to_thread(state)
            rate = capacity / 2
            print(f"capacity {capacity:,.0f}/s; at rest: {before}", flush=True)
            done, used_s = len(books.attempts), cpu_s([process.pid])
            load = asyncio.gather(
                _load(books, port, seconds, _SOAK_CLIENTS, rate),
                _load(direct, direct_standin.port, seconds, _DIRECT_CLIENTS, rate * _DIRECT_SHARE),
            )
            looks = await _look(books, direct, state, every_s, load)
            await load
            used_s = cpu_s([process.pid]) - used_s
            cpu_us = used_s / (len(books.attempts) - done) * 1e6
            await asyncio.sleep(_REST_S)
            after = await asyncio.to_thread(state)
            lines = await asyncio.to_thread(read_lines, usage_log)
            counted = await asyncio.to_thread(samples, admin_port)
        finally:
            await asyncio.to_thread(process.stop)
            await standin.stop()
            await direct_standin.stop()
    verdict = await asyncio.to_thread(judge, books, [Life(lines, counted)])
    return Figures(capacity, rate, before, after, looks, verdict, seconds, cpu_us)


def _p99_text(p99s_ms: Sequence[float]) -> str:
    late = p99s_ms[int(len(p99s_ms) * _WARM_UP_SHARE) :]
    return f"{statistics.median(late):.1f} ms, {max(late):.1f} ms"


def _text(figures: Figures, seed: int) -> str:
    warm, end = figures.growth()
    verdict = figures.verdict
    return f"""# Soak

Made by `make soak`; drawn in [soak.svg](soak.svg). How it is made stands in [README.md](README.md).

| | |
|---|---|
| time | {figures.seconds / 60:.0f} min, seed {seed}, {os.cpu_count()} cores |
| capacity of the sidecar, with client and stand-in on the same machine | \
{figures.capacity:,.0f} exchanges/s |
| offered | {figures.rate:,.0f}/s, {verdict.exchanges:,} exchanges in all |
| memory after the warm-up, at the end | {warm:.1f} MB, {end:.1f} MB ({end / warm - 1:+.1%}) |
| open files at rest, before and after | {figures.before.files}, {figures.after.files} |
| tasks at rest, before and after | {figures.before.tasks}, {figures.after.tasks} |
| CPU of the sidecar for each exchange | {figures.cpu_us:,.0f} µs |
| p99 of undisturbed answers, median and largest of all samples after the warm-up | \
{_p99_text([sample.p99_ms for sample in figures.samples])} |
| the same without a sidecar | \
{_p99_text([sample.direct_p99_ms for sample in figures.samples])} |
| usage lines, difference to the books and to the metrics | {verdict.lines:,}, \
{verdict.difference} |
"""


def _draw(figures: Figures) -> str:
    found = figures.samples
    minutes = [sample.minute for sample in found]
    return draw(
        "Memory, files, tasks and latency of a sidecar at half of its capacity",
        "minutes",
        minutes,
        [
            Panel("resident memory, MB", [sample.resident_mb for sample in found]),
            Panel("open files", [sample.files for sample in found]),
            Panel("tasks", [sample.tasks for sample in found]),
            Panel("p99 of undisturbed answers, ms", [sample.p99_ms for sample in found]),
            Panel("the same without a sidecar, ms", [sample.direct_p99_ms for sample in found]),
        ],
    )


def main() -> None:
    """Run, and exit with 1 if anything has grown."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write soak.svg and SOAK.md")
    arguments = parser.parse_args()
    figures = run_until_terminated(_run(arguments.minutes * 60, arguments.every, arguments.seed))
    text = _text(figures, arguments.seed)
    print(text)
    if arguments.write:
        (_HERE / "SOAK.md").write_text(text)
        (_HERE / "soak.svg").write_text(_draw(figures))
    faults = figures.faults()
    for fault in faults:
        print(f"FAULT: {fault}")
    if faults:
        sys.exit(1)
    print("nothing has grown")


if __name__ == "__main__":
    main()
