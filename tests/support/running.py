"""A running sidecar: in this loop, or as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.exchange import Observer
from sidecar.lifecycle import Lifecycle
from tests.support.process import ManagedProcess, free_port

__all__ = ["Running", "SidecarProcess", "running", "sidecar_process", "until"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Running:
    """A sidecar in this loop."""

    sidecar: Sidecar
    lifecycle: Lifecycle
    task: asyncio.Task[None]

    @property
    def host(self) -> tuple[str, int]:
        """Where clients connect."""
        return "127.0.0.1", self.lifecycle.port

    @property
    def url(self) -> str:
        """The data port's address."""
        return f"http://127.0.0.1:{self.lifecycle.port}"

    @property
    def admin_url(self) -> str:
        """The admin port's address."""
        return f"http://127.0.0.1:{self.lifecycle.admin_port}"

    def value(self, name: str, **labels: str) -> float:
        """Sum a metric over all series with these labels."""
        total = 0.0
        for metric in self.sidecar.registry.collect():
            for sample in metric.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total


@asynccontextmanager
async def running(
    upstream: str, *, observer: Observer | None = None, **settings: Any
) -> AsyncIterator[Running]:
    """Run a sidecar on free ports, and stop it at the end.

    Its prices come from its settings alone, so that nothing but what a test sends reaches its
    upstream.
    """
    values: dict[str, Any] = {"port": 0, "admin_port": 0, "drain_timeout_s": 2.0}
    values["price_sources"] = ("file", "package")
    sidecar = Sidecar(Settings(upstream=upstream, **(values | settings)), observer=observer)
    lifecycle = Lifecycle(sidecar)
    task = asyncio.create_task(lifecycle.run())
    await asyncio.wait(
        [task, asyncio.ensure_future(lifecycle.serving.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    try:
        yield Running(sidecar, lifecycle, task)
    finally:
        lifecycle.stop()
        await asyncio.wait_for(task, 10)


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait until a condition holds; fail if it never does."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it may be about another process
            await asyncio.sleep(0.002)


@dataclass(frozen=True, slots=True)
class SidecarProcess:
    """A sidecar in a process of its own."""

    process: ManagedProcess
    port: int
    admin_port: int

    @property
    def url(self) -> str:
        """The data port's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        """The admin port's address."""
        return f"http://127.0.0.1:{self.admin_port}"

    def open_files(self) -> int:
        """How many file descriptors the process has."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_s(self) -> float:
        """How much time of a processor the process has used."""
        # Fields 14 and 15, of which the name, field 2, may hold blanks.
        text = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        return sum(map(int, text.split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log with this event."""
        lines = [json.loads(line) for line in self.process.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def resident_bytes(self) -> int:
        """How much memory the process has resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024


@contextmanager
def sidecar_process(
    directory: Path,
    environment: Mapping[str, str],
    *,
    wait: bool = True,
    max_open_files: int | None = None,
    module: str = "sidecar",
    ports: tuple[int, int] | None = None,
) -> Iterator[SidecarProcess]:
    """Run `sidecar serve` as a user would.

    Args:
        environment: its settings.
        wait: until it serves.
        max_open_files: the limit of its process; that of this one if not given.
        module: what has the command `serve`.
        ports: for clients and of the admin port; free ones if not given.
    """
    port, admin_port = ports or (free_port(), free_port())
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SIDECAR_PORT": str(port),
        "SIDECAR_ADMIN_PORT": str(admin_port),
        "SIDECAR_DRAIN_DELAY_S": "0",
        "SIDECAR_DRAIN_TIMEOUT_S": "2",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "0",
        # So that nothing but what a test sends reaches its upstream.
        "SIDECAR_PRICE_SOURCES": "file,package",
        # What must not be in the log must not be there at any level.
        "SIDECAR_LOG_LEVEL": "debug",
    }
    command = [sys.executable, "-m", module, "serve"]
    if max_open_files is not None:
        command = ["sh", "-c", f'ulimit -n {max_open_files}; exec "$@"', "sh", *command]
    process = ManagedProcess(
        command,
        directory=directory,
        log=directory / "sidecar.log",
        environment=settings | dict(environment),
    )
    sidecar = SidecarProcess(process, port, admin_port)
    try:
        if wait:
            process.wait_until(lambda: _answers(f"{sidecar.admin_url}/healthz"), timeout_s=20)
        yield sidecar
    finally:
        process.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
