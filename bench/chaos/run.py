"""One run: a sidecar between clients and a stand-in that break off, go away and come back.

The order of it: a warm-up, after which it is noted what the sidecar holds at rest; load, in
which the upstream is restarted several times and the sidecar once, by SIGTERM and a new process
on the same port; rest again; SIGTERM again; and then the books are compared.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.chaos.books import Books
from bench.chaos.client import drive
from bench.chaos.judge import Life, Samples, Verdict, judge, read_lines
from bench.chaos.standin import StandIn
from bench.inspected import State, ask, start
from tests.support.process import ManagedProcess, free_port
from tests.support.prometheus import Prometheus

__all__ = ["Report", "run"]

_WARM_UP_SHARE = 0.05
_UPSTREAM_DOWN_S = 0.1
_STOPS_WITHIN_S = 60.0
_RESTS_WITHIN_S = 15.0
_SETTINGS = {
    "SIDECAR_DRAIN_DELAY_S": "0.2",
    "SIDECAR_DRAIN_TIMEOUT_S": "1",
    "SIDECAR_LOG_LEVEL": "info",
}


@dataclass
class Report:
    """What came of a run."""

    verdict: Verdict
    books: Books
    lives: list[Life]
    seconds: float
    before: State
    after: State
    leaks: list[str]
    exit_codes: list[int]
    log_tails: list[str]

    @property
    def passed(self) -> bool:
        """Whether there is nothing to complain of."""
        return not (
            self.verdict.offences or self.verdict.difference or self.leaks or any(self.exit_codes)
        )


class _Process:
    """One life of the sidecar."""

    def __init__(self, number: int, directory: Path, port: int, upstream_port: int) -> None:
        self.admin_port = free_port()
        self.lines: list[bytes] = []
        self._port = port
        self._log = directory / f"sidecar-{number}.log"
        self._settings = _SETTINGS | {
            "SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream_port}",
            "SIDECAR_USAGE_LOG": str(directory / "usage.jsonl"),
        }
        self.process: ManagedProcess | None = None

    @property
    def instance(self) -> str:
        """Its name in Prometheus."""
        return f"127.0.0.1:{self.admin_port}"

    def start(self) -> None:
        self.process = start(self._log, self._port, self.admin_port, self._settings)

    def state(self) -> State:
        assert self.process is not None
        return ask(self.process, self.admin_port)

    def terminate(self) -> int:
        """End it as Kubernetes does, and return its exit code."""
        assert self.process is not None
        self.process.send(signal.SIGTERM)
        return self.process.exit_code(timeout_s=_STOPS_WITHIN_S)

    def stop(self) -> None:
        """See to it that it has ended."""
        if self.process is not None:
            self.process.stop()

    def log_tail(self) -> str:
        assert self.process is not None
        return self.process.log_tail()


async def run(
    exchanges: int, seed: int, *, clients: int = 96, restarts: int = 8, say: Callable[[str], None]
) -> Report:
    """Make a run. Call it within uvloop.

    Args:
        restarts: of the upstream.
    """
    books = Books(seed)
    standin = StandIn(books)
    standin.start()
    port = free_port()
    with TemporaryDirectory(prefix="chaos-") as name:
        directory = Path(name)
        lives = [_Process(number, directory, port, standin.port) for number in (1, 2)]
        targets = {"sidecar": [life.instance for life in lives]}
        prometheus = Prometheus(targets, directory)
        try:
            await asyncio.to_thread(lives[0].start)
            await asyncio.to_thread(prometheus.__enter__)
            try:
                return await _run(
                    exchanges,
                    port,
                    books,
                    standin,
                    lives,
                    prometheus,
                    directory,
                    clients=clients,
                    restarts=restarts,
                    say=say,
                )
            finally:
                await asyncio.to_thread(prometheus.__exit__, None, None, None)
        finally:
            for life in lives:
                await asyncio.to_thread(life.stop)
            await standin.stop()


async def _run(
    exchanges: int,
    port: int,
    books: Books,
    standin: StandIn,
    lives: list[_Process],
    prometheus: Prometheus,
    directory: Path,
    *,
    clients: int,
    restarts: int,
    say: Callable[[str], None],
) -> Report:
    usage_log = directory / "usage.jsonl"
    # Its first scrape may take some seconds; its connection belongs to what is held at rest.
    await asyncio.to_thread(prometheus.wait_for, f'up{{instance="{lives[0].instance}"}} == 1')
    began = time.monotonic()
    warm_up = int(exchanges * _WARM_UP_SHARE)
    await drive(books, port, clients=clients, until=lambda: len(books.attempts) >= warm_up)
    before = await _at_rest(lives[0], standin, None)
    say(f"at rest after {warm_up:,} exchanges: {before}")

    total = warm_up + exchanges
    load = asyncio.create_task(
        drive(books, port, clients=clients, until=lambda: len(books.attempts) >= total)
    )
    exit_codes = []
    for turn in range(1, restarts + 2):
        await _until(books, warm_up + exchanges * turn // (restarts + 2), load)
        if turn == restarts // 2 + 1:
            say(f"SIGTERM after {len(books.attempts):,} exchanges")
            exit_codes.append(await asyncio.to_thread(lives[0].terminate))
            lives[0].lines = await asyncio.to_thread(read_lines, usage_log)
            await asyncio.to_thread(lives[1].start)
            say(f"a new process serves; {books.refused:,} connections were refused meanwhile")
        else:
            await standin.restart(_UPSTREAM_DOWN_S)
    await load
    seconds = time.monotonic() - began
    after = await _at_rest(lives[1], standin, before)
    say(f"at rest after {len(books.attempts):,} exchanges: {after}")
    exit_codes.append(await asyncio.to_thread(lives[1].terminate))
    lines = await asyncio.to_thread(read_lines, usage_log)
    lives[1].lines = lines[len(lives[0].lines) :]
    samples = [await asyncio.to_thread(_final_samples, prometheus, life) for life in lives]
    evidence = [Life(life.lines, values) for life, values in zip(lives, samples, strict=True)]
    verdict = await asyncio.to_thread(judge, books, evidence)
    leaks = _compare(before, after)
    if standin.open_connections:
        leaks.append(f"{standin.open_connections} connections to the upstream are open")
    tails = [life.log_tail() for life in lives]
    for number, tail in enumerate(tails, 1):
        if '"no_final_scrape"' in tail or '"final_scrape"' not in tail:
            verdict.offences.append(f"life {number} ended without a final scrape")
    return Report(verdict, books, evidence, seconds, before, after, leaks, exit_codes, tails)


async def _until(books: Books, count: int, load: asyncio.Task[None]) -> None:
    while len(books.attempts) < count and not load.done():  # noqa: ASYNC110 - others count
        await asyncio.sleep(0.01)


async def _at_rest(life: _Process, standin: StandIn, wanted: State | None) -> State:
    """Say what a sidecar holds when nothing is asked of it and idle connections are gone."""
    deadline = time.monotonic() + _RESTS_WITHIN_S
    while True:
        await asyncio.sleep(0.5)
        state = await asyncio.to_thread(life.state)
        resting = not (state.connections or state.in_flight or standin.open_connections)
        if resting and (wanted is None or not _compare(wanted, state)):
            return state
        if time.monotonic() > deadline:
            return state


def _compare(before: State, after: State) -> list[str]:
    faults = [
        f"{name} went from {was} to {is_}"
        for name, was, is_ in zip(State._fields, before, after, strict=True)
        if name in ("files", "tasks") and is_ > was
    ]
    faults += [
        f"{getattr(after, name)} {name} at rest"
        for name in ("connections", "in_flight", "internal_errors")
        if getattr(after, name)
    ]
    return faults


def _final_samples(prometheus: Prometheus, life: _Process) -> Samples:
    """All series of a life, as they were scraped last."""
    return prometheus.query(
        f'last_over_time({{instance="{life.instance}",__name__=~"litellm_.*"}}[3h])'
    )
