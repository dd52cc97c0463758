"""Whether anything stays behind: `python -m bench.leaks`.

Puts 100,000 streamed requests through a sidecar in a process of its own, cuts 10% of them at
random points (in the request's head or body, before the answer, within it; with FIN and with
RST), and then asks: are file descriptors, tasks and memory back to where they were after a
warm-up of the same kind? Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench import bodies
from bench.accounting import open_files
from bench.inspected import State, ask, start
from bench.load import request_bytes
from bench.measures import build_upstream, upstream
from tests.support.process import free_port

__all__: list[str] = []

_EVENTS = 8
_EVENT_INTERVAL_MS = 2
_CONNECTIONS = 64
_CUT_SHARE = 0.1
_REST_S = 3.0
"""Longer than idle connections to the upstream are kept."""
_MEMORY_SLACK_BYTES = 4_000_000
"""40 bytes a request: less than any object that could be left behind by each."""


class Held(NamedTuple):
    """What sidecar and upstream hold while nothing is asked of them."""

    sidecar: State
    upstream_files: int


class _Client:
    """One client of many, that makes requests until there are enough."""

    def __init__(self, port: int, chance: random.Random, outcomes: Counter[str]) -> None:
        self._port = port
        self._chance = chance
        self._outcomes = outcomes
        self._request = request_bytes(bodies.STREAM_REQUEST, bodies.REQUEST_HEADERS)
        self._answer = bodies.paced(_EVENTS).body

    async def work(self, todo: list[int]) -> None:
        connection = None
        while todo[0] > 0:
            todo[0] -= 1
            if connection is None:
                connection = await asyncio.open_connection("127.0.0.1", self._port)
            if self._chance.random() < _CUT_SHARE:
                await self._cut(*connection)
                connection = None
            else:
                await self._whole(*connection)
        if connection is not None:
            connection[1].close()

    async def _whole(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._request)
        await reader.readuntil(b"\r\n\r\n")
        pieces = []
        while size := int(await reader.readline(), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        self._outcomes["whole" if b"".join(pieces) == self._answer else "wrong"] += 1

    async def _cut(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Leave at a random point."""
        if self._chance.random() < 0.3:
            writer.write(self._request[: self._chance.randrange(1, len(self._request))])
            self._outcomes["cut in the request"] += 1
        else:
            writer.write(self._request)
            self._outcomes["cut after the request"] += 1
        pause_s = self._chance.random() * _EVENTS * _EVENT_INTERVAL_MS / 1000
        if self._chance.random() < 0.8:
            await asyncio.sleep(pause_s)
        if self._chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


async def _drive(port: int, count: int, seed: int) -> Counter[str]:
    """Make so many requests, some of which are cut, and say how they ended."""
    outcomes: Counter[str] = Counter()
    chance = random.Random(seed)  # noqa: S311
    todo = [count]
    clients = [_Client(port, chance, outcomes) for _ in range(_CONNECTIONS)]
    await asyncio.gather(*(client.work(todo) for client in clients))
    return outcomes


def _compare(before: Held, after: Held) -> list[str]:
    was, is_ = before.sidecar, after.sidecar
    pairs = {
        "files": (was.files, is_.files),
        "tasks": (was.tasks, is_.tasks),
        "connections": (was.connections, is_.connections),
        "files of the upstream": (before.upstream_files, after.upstream_files),
    }
    faults = [f"{name} went from {a} to {b}" for name, (a, b) in pairs.items() if b > a]
    grown = is_.resident_bytes - was.resident_bytes
    if grown > _MEMORY_SLACK_BYTES:
        faults.append(f"memory grew by {grown / 1e6:.1f} MB")
    if is_.in_flight:
        faults.append(f"{is_.in_flight} requests are still counted as in flight")
    if is_.internal_errors:
        faults.append(f"{is_.internal_errors} internal errors")
    return faults


def _run(requests: int, seed: int) -> list[str]:
    build_upstream()
    port, admin_port = free_port(), free_port()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        upstream(bodies.paced(_EVENTS), Path(name), _EVENT_INTERVAL_MS) as (upstream_port, pid),
    ):
        settings = {
            "SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream_port}",
            "SIDECAR_USAGE_LOG": str(Path(name) / "usage.jsonl"),
            "SIDECAR_DRAIN_DELAY_S": "0",
        }
        process = start(Path(name) / "log", port, admin_port, settings)

        def held() -> Held:
            return Held(ask(process, admin_port), open_files(pid))

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_drive(port, requests // 4, seed))
                time.sleep(_REST_S)
                before = held()
                print("after the warm-up:", before)
                began = time.monotonic()
                outcomes = runner.run(_drive(port, requests, seed + 1))
                print(f"{requests:,} requests in {time.monotonic() - began:.0f} s:", dict(outcomes))
                time.sleep(_REST_S)
            after = held()
            print("at the end:       ", after)
        finally:
            process.stop()
        faults = _compare(before, after)
        if outcomes["wrong"]:
            faults.append(f"{outcomes['wrong']} answers were wrong")
        return faults


def main() -> None:
    """Run, and exit with 1 if anything stayed behind."""
    parser = argparse.ArgumentParser(prog="python -m bench.leaks", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # Whoever ends this by SIGTERM wants what it started ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    faults = _run(arguments.requests, arguments.seed)
    for fault in faults:
        print(f"LEAK: {fault}")
    if faults:
        sys.exit(1)
    print("nothing stayed behind")


if __name__ == "__main__":
    main()
