"""Whether anything grows with time: `python -m bench.soak` (10 minutes).

Puts the mixed traffic of `bench.chaos`, broken exchanges included, through one sidecar at half of
the rate that it can take, and looks every few seconds at its memory, open files, tasks and at the
99th percentile of the time that undisturbed answers take. Exit code 1 if memory has grown by 5%
or more since the warm-up, if files or tasks are not back where they were, or if a count differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench.chaos.books import Books
from bench.chaos.client import drive
from bench.chaos.judge import Life, Verdict, judge, read_lines
from bench.chaos.standin import StandIn
from bench.inspected import State, ask, samples, start
from bench.plot import Panel, draw
from tests.support.process import free_port

__all__: list[str] = []

_HERE = Path(__file__).parent
_CAPACITY_CLIENTS = 64
_SOAK_CLIENTS = 256
_WARM_UP_SHARE = 0.2
_WINDOW_SHARE = 0.1
"""Of the samples, at the end of the warm-up and at the end; their medians are compared."""
_MAX_GROWTH = 0.05
_REST_S = 4.0
"""Longer than idle connections to the upstream are kept."""


class Sample(NamedTuple):
    """One look at the sidecar."""

    minute: float
    resident_mb: float
    files: int
    tasks: int
    p99_ms: float
    answers: int
    """Undisturbed ones since the last look."""


class Figures(NamedTuple):
    """What came of a run."""

    capacity: float
    rate: float
    before: State
    after: State
    samples: list[Sample]
    verdict: Verdict
    seconds: float

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


def _p99_ms(times_s: Sequence[float]) -> float:
    if len(times_s) < 2:
        return 0.0
    return statistics.quantiles(times_s, n=100)[98] * 1000


async def _look(
    books: Books, state: Callable[[], State], every_s: float, load: asyncio.Task[None]
) -> list[Sample]:
    """Look at the sidecar until the load ends."""
    began, seen = time.monotonic(), len(books.attempts)
    found = []
    while not load.done():
        await asyncio.wait([load], timeout=every_s)
        # What is under way at this look is counted at none.
        times = [attempt.took_s for attempt in books.attempts[seen:] if attempt.took_s]
        seen = len(books.attempts)
        now = await asyncio.to_thread(state)
        minute = (time.monotonic() - began) / 60
        memory = now.resident_bytes / 1e6
        found.append(Sample(minute, memory, now.files, now.tasks, _p99_ms(times), len(times)))
    return found


async def _run(seconds: float, every_s: float, seed: int) -> Figures:
    books = Books(seed)
    standin = StandIn(books)
    standin.start()
    port, admin_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        log, usage_log = Path(name) / "log", Path(name) / "usage.jsonl"
        settings = {
            "SIDECAR_UPSTREAM": f"http://127.0.0.1:{standin.port}",
            "SIDECAR_USAGE_LOG": str(usage_log),
            "SIDECAR_USAGE_LOG_FILES": "1000",
            "SIDECAR_DRAIN_DELAY_S": "0",
        }
        process = await asyncio.to_thread(start, log, port, admin_port, settings)

        def state() -> State:
            return ask(process, admin_port)

        async def load(span_s: float, clients: int, rate: float | None) -> None:
            until = time.monotonic() + span_s
            await drive(
                books,
                port,
                clients=clients,
                until=lambda: time.monotonic() >= until,
                rate=rate,
            )

        try:
            await load(2, _CAPACITY_CLIENTS, None)
            done, began = len(books.attempts), time.monotonic()
            await load(5, _CAPACITY_CLIENTS, None)
            capacity = (len(books.attempts) - done) / (time.monotonic() - began)
            await asyncio.sleep(_REST_S)
            before = await asyncio.to_thread(state)
            rate = capacity / 2
            print(f"capacity {capacity:,.0f}/s; at rest: {before}", flush=True)
            task = asyncio.create_task(load(seconds, _SOAK_CLIENTS, rate))
            looks = await _look(books, state, every_s, task)
            await task
            await asyncio.sleep(_REST_S)
            after = await asyncio.to_thread(state)
            lines = await asyncio.to_thread(read_lines, usage_log)
            counted = await asyncio.to_thread(samples, admin_port)
        finally:
            await asyncio.to_thread(process.stop)
            await standin.stop()
    verdict = await asyncio.to_thread(judge, books, [Life(lines, counted)])
    return Figures(capacity, rate, before, after, looks, verdict, seconds)


def _text(figures: Figures, seed: int) -> str:
    warm, end = figures.growth()
    late = [sample for sample in figures.samples if sample.answers]
    late = late[int(len(late) * _WARM_UP_SHARE) :]
    p99s = [sample.p99_ms for sample in late]
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
| p99 of undisturbed answers, median and largest of {len(late)} samples | \
{statistics.median(p99s):.1f} ms, {max(p99s):.1f} ms |
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
    # Whoever ends this by SIGTERM wants what it started ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(_run(arguments.minutes * 60, arguments.every, arguments.seed))
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
