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
from bench.chaos.judge import Life, Verdict, judge, read_lines
from bench.chaos.standin import StandIn
from bench.inspected import State, ask, start
from tests.support.process import ManagedProcess, free_port
from tests.support.prometheus import Prometheus

__all__ = ["Report", "run"]

_WARM_UP_SHARE = 0.05
_UPSTREAM_DOWN_S = 0.1
_STOPS_WITHIN_S = 60.0
_RESTS_WITHIN_S = 15.0
_LOOK_BACK = "6h"
"""Longer than a run: of a life that has ended Prometheus has the last sample."""
_SETTINGS = {
    "SIDECAR_DRAIN_DELAY_S": "0.2",
    "SIDECAR_DRAIN_TIMEOUT_S": "1",
}


@dataclass
class Report:
    """What came of a run."""

    verdict: Verdict
    books: Books
    lives: list[Life]
    seconds: float
    """In which exchanges were made."""
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

    def __init__(self, log: Path, usage_log: Path, port: int) -> None:
        self.lines: list[bytes] = []
        """What it wrote to the usage log."""
        self._log = log
        self._usage_log = usage_log
        self._port = port
        self._admin_port = free_port()
        self.process: ManagedProcess | None = None

    @property
    def instance(self) -> str:
        """Its name in Prometheus."""
        return f"127.0.0.1:{self._admin_port}"

    def selector(self, *matchers: str) -> str:
        """Select its series in PromQL."""
        return "{" + ",".join([f'instance="{self.instance}"', *matchers]) + "}"

    def start(self, upstream_port: int) -> None:
        """Start it, and wait until it serves."""
        settings = _SETTINGS | {
            "SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream_port}",
            "SIDECAR_USAGE_LOG": str(self._usage_log),
        }
        self.process = start(self._log, self._port, self._admin_port, settings)

    def state(self) -> State:
        """Ask it what it holds."""
        assert self.process is not None
        return ask(self.process, self._admin_port)

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
        """The end of what it logged."""
        assert self.process is not None
        return self.process.log_tail()


async def run(
    exchanges: int, seed: int, *, clients: int = 96, restarts: int = 8, say: Callable[[str], None]
) -> Report:
    """Make a run. Call it within uvloop.

    Args:
        restarts: of the upstream.
    """
    with TemporaryDirectory(prefix="chaos-") as name:
        made = _Run(Path(name), Books(seed), clients, say)
        made.standin.start()
        try:
            await made.start()
            before = await made.warm_up(int(exchanges * _WARM_UP_SHARE))
            await made.load(exchanges, restarts)
            after = await made.rest(before)
            await made.end()
            return await made.report(before, after)
        finally:
            await made.stop()


class _Run:
    """A run, step by step."""

    def __init__(
        self, directory: Path, books: Books, clients: int, say: Callable[[str], None]
    ) -> None:
        self.standin = StandIn(books)
        self._books = books
        self._clients = clients
        self._say = say
        self._directory = directory
        self._usage_log = directory / "usage.jsonl"
        self._port = free_port()
        self._lives: list[_Process] = []
        self._prometheus: Prometheus | None = None
        self._exit_codes: list[int] = []
        self._seconds = 0.0

    async def start(self) -> None:
        """Start the sidecar's first life, and what scrapes it."""
        self._lives = [
            _Process(self._directory / f"sidecar-{number}.log", self._usage_log, self._port)
            for number in (1, 2)
        ]
        await asyncio.to_thread(self._lives[0].start, self.standin.port)
        targets = {"sidecar": [life.instance for life in self._lives]}
        prometheus = Prometheus(targets, self._directory)
        self._prometheus = await asyncio.to_thread(prometheus.__enter__)
        # The first scrape takes some seconds; its connection belongs to what is held at rest.
        await asyncio.to_thread(prometheus.wait_for, f"up{self._lives[0].selector()} == 1")

    async def warm_up(self, exchanges: int) -> State:
        """Let everything happen once, and say what the sidecar then holds at rest."""
        await self._drive(exchanges)
        return await self.rest(None)

    async def load(self, exchanges: int, restarts: int) -> None:
        """Make exchanges while the upstream goes away and comes back, and the sidecar once."""
        books, first = self._books, len(self._books.attempts)
        task = asyncio.create_task(self._drive(exchanges))
        for turn in range(1, restarts + 2):
            due = first + exchanges * turn // (restarts + 2)
            while len(books.attempts) < due and not task.done():  # noqa: ASYNC110 - others count
                await asyncio.sleep(0.01)
            if turn == restarts // 2 + 1:
                await self._succeed()
            else:
                await self.standin.restart(_UPSTREAM_DOWN_S)
        await task

    async def _drive(self, exchanges: int) -> None:
        books = self._books
        total, began = len(books.attempts) + exchanges, time.monotonic()
        await drive(
            books, self._port, clients=self._clients, until=lambda: len(books.attempts) >= total
        )
        self._seconds += time.monotonic() - began

    async def _succeed(self) -> None:
        """Drain the first life, and start the second in its place."""
        old, new = self._lives
        self._say(f"SIGTERM after {len(self._books.attempts):,} exchanges")
        with self._books.disturbing():
            self._exit_codes.append(await asyncio.to_thread(old.terminate))
            old.lines = await asyncio.to_thread(read_lines, self._usage_log)
            await asyncio.to_thread(new.start, self.standin.port)
        self._say(f"a new process serves; {self._books.refused:,} connections were refused")

    async def rest(self, wanted: State | None) -> State:
        """Say what the sidecar holds when nothing is asked of it and idle connections are gone."""
        life = self._lives[len(self._exit_codes)]
        deadline = time.monotonic() + _RESTS_WITHIN_S
        while True:
            await asyncio.sleep(0.5)
            state = await asyncio.to_thread(life.state)
            resting = not (state.connections or state.in_flight or self.standin.open_connections)
            as_wanted = resting and (wanted is None or not _compare(wanted, state))
            if as_wanted or time.monotonic() > deadline:
                self._say(f"at rest after {len(self._books.attempts):,} exchanges: {state}")
                return state

    async def end(self) -> None:
        """End the second life."""
        old, new = self._lives
        self._exit_codes.append(await asyncio.to_thread(new.terminate))
        lines = await asyncio.to_thread(read_lines, self._usage_log)
        new.lines = lines[len(old.lines) :]

    async def report(self, before: State, after: State) -> Report:
        """Compare everything with everything."""
        return await asyncio.to_thread(self._report, before, after)

    def _report(self, before: State, after: State) -> Report:
        assert self._prometheus is not None
        lives = []
        for life in self._lives:
            series = life.selector('__name__=~"litellm_.*"')
            samples = self._prometheus.query(f"last_over_time({series}[{_LOOK_BACK}])")
            lives.append(Life(life.lines, samples))
        verdict = judge(self._books, lives)
        tails = [life.log_tail() for life in self._lives]
        for number, tail in enumerate(tails, 1):
            if '"final_scrape"' not in tail:
                verdict.offences.append(f"life {number} ended without a final scrape")
        leaks = _compare(before, after)
        if self.standin.open_connections:
            leaks.append(f"{self.standin.open_connections} connections to the upstream are open")
        return Report(verdict, self._books, lives, self._seconds, leaks, self._exit_codes, tails)

    async def stop(self) -> None:
        """See to it that nothing runs on."""
        if self._prometheus is not None:
            await asyncio.to_thread(self._prometheus.__exit__, None, None, None)
        for life in self._lives:
            await asyncio.to_thread(life.stop)
        await self.standin.stop()


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
