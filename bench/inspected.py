"""A sidecar that tells what it holds: `python -m bench.inspected` serves like `sidecar serve`.

At SIGUSR1 it writes how many tasks there are and how many connections to the upstream. `ask` puts
that together with what the kernel and the metrics say of the process. Nothing else is different:
not even the garbage collector is called.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench.accounting import open_files, resident_bytes
from sidecar.app import Sidecar
from sidecar.config import load_settings
from sidecar.lifecycle import Lifecycle
from sidecar.logs import set_up_logging
from tests.support.process import ManagedProcess

__all__ = ["State", "ask", "run_until_terminated", "samples", "start"]

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parents[1]
_SAID = re.compile(r"tasks=(\d+) connections=(\d+)")
_ANSWERS_WITHIN_S = 10.0


class State(NamedTuple):
    """What a sidecar holds."""

    files: int
    tasks: int
    connections: int
    """To the upstream, idle ones included."""
    resident_bytes: int
    in_flight: int
    internal_errors: int


async def _serve() -> None:
    settings = load_settings()
    set_up_logging(settings.log_level)
    sidecar = Sidecar(settings)
    lifecycle = Lifecycle(sidecar)

    def say() -> None:
        tasks, connections = len(asyncio.all_tasks()), sidecar.upstream.open_connections
        os.write(1, b"tasks=%d connections=%d\n" % (tasks, connections))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, say)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.stop, number)
    await lifecycle.run()


def start(log: Path, port: int, admin_port: int, settings: Mapping[str, str]) -> ManagedProcess:
    """Start one, and wait until it serves."""
    process = ManagedProcess(
        [sys.executable, "-m", "bench.inspected"],
        directory=_ROOT,
        log=log,
        environment={
            "PATH": os.environ["PATH"],
            "SIDECAR_PORT": str(port),
            "SIDECAR_ADMIN_PORT": str(admin_port),
            **settings,
        },
    )
    process.wait_until(lambda: '"serving"' in log.read_text(), timeout_s=30)
    return process


def ask(process: ManagedProcess, admin_port: int) -> State:
    """Ask a sidecar what it holds."""
    said = len(_SAID.findall(process.log.read_text()))
    process.send(signal.SIGUSR1)
    deadline = time.monotonic() + _ANSWERS_WITHIN_S
    while len(found := _SAID.findall(process.log.read_text())) == said:
        if time.monotonic() > deadline:
            raise TimeoutError("the sidecar does not say what it holds")
        time.sleep(0.02)
    # Before the scrape, whose own connection would be among them.
    files = open_files(process.pid)
    counted = samples(admin_port)

    def total(name: str) -> int:
        return int(sum(value for labels, value in counted if labels["__name__"] == name))

    tasks, connections = map(int, found[-1])
    return State(
        files,
        tasks,
        connections,
        resident_bytes([process.pid]),
        total("litellm_sidecar_http_requests_in_flight"),
        total("litellm_sidecar_internal_errors_total"),
    )


def samples(admin_port: int) -> list[tuple[dict[str, str], float]]:
    """Read the metrics: labels, the name as `__name__` among them, and value."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{admin_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return [
        ({"__name__": sample.name, **sample.labels}, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def run_until_terminated(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in uvloop. Whoever ends it by SIGTERM wants what it started ended, too."""

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None
        # A handler of Python's would raise within whatever callback runs at that moment.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())
    except asyncio.CancelledError:
        sys.exit(143)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
