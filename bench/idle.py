"""What many clients cost that mostly wait: `python -m bench.idle`.

2,000 clients take a streamed answer each and then keep their connections; beside them 500
streams run at the pace of the other measures. Every answer is compared with what it has to be.
Reports the memory of the sidecar's process at each step; exit code 1 if its peak is over 150 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import cast

import uvloop

from bench import bodies
from bench.accounting import open_files, peak_bytes, resident_bytes
from bench.load import request_bytes
from bench.measures import build_upstream, upstream
from sidecar.descriptors import raise_limit
from tests.support.process import ManagedProcess, free_port

__all__: list[str] = []

_ROOT = Path(__file__).resolve().parents[1]
_EVENTS = 300
_BATCH = 400
"""Idle clients that take their first answer side by side: fewer than there are streams, so that
the peak is that of the end."""


class IdleError(Exception):
    """An answer was wrong, or a connection broke."""


class _Client(asyncio.Protocol):
    """Asks once, checks the answer, and keeps its connection."""

    def __init__(self, request: bytes, answer: bytes) -> None:
        self._request = request
        self._answer = answer
        self._got: list[bytes] = []
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._got.append(data)
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            head, _, body = b"".join(self._got).partition(b"\r\n\r\n")
            self._got.clear()
            whole = head.startswith(b"HTTP/1.1 200") and _unframed(body) == self._answer
            if whole:
                self.answered.set_result(None)
            else:
                self.answered.set_exception(IdleError("an answer is not what was sent"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(IdleError(f"a connection broke: {exc}"))


def _unframed(body: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end], 16)
        if not size:
            return b"".join(pieces)
        pieces.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


async def _streams(port: int, count: int) -> list[_Client]:
    """Run so many streams side by side to their end; returns their clients."""
    loop = asyncio.get_running_loop()
    answer = bodies.paced(_EVENTS).body
    request = request_bytes(bodies.STREAM_REQUEST, bodies.REQUEST_HEADERS)
    made = await asyncio.gather(
        *(
            loop.create_connection(lambda: _Client(request, answer), "127.0.0.1", port)
            for _ in range(count)
        )
    )
    clients = [client for _, client in made]
    async with asyncio.timeout(120):
        await asyncio.gather(*(client.answered for client in clients))
    return clients


async def _measure(pid: int, port: int, idle: int, streams: int) -> None:
    def say(what: str) -> None:
        now, peak = resident_bytes([pid]) / 1e6, peak_bytes([pid]) / 1e6
        print(f"{what:38} {now:6.1f} MB, peak {peak:6.1f} MB, {open_files(pid)} files", flush=True)

    say("at rest")
    kept: list[_Client] = []
    while len(kept) < idle:
        kept += await _streams(port, min(_BATCH, idle - len(kept)))
    say(f"{idle:,} idle clients")
    running = asyncio.create_task(_streams(port, streams))
    while open_files(pid) < idle + 2 * streams:
        if running.done():
            raise IdleError("the streams did not run at the same time")
        await asyncio.sleep(0.05)
    say(f"and {streams:,} paced streams, all running")
    for client in await running:
        client.transport.abort()
    broken = sum(client.transport.is_closing() for client in kept)
    if broken:
        raise IdleError(f"{broken} idle connections were closed")
    for client in kept:
        client.transport.abort()
    await asyncio.sleep(3)
    say("afterwards")


def main() -> None:
    """Run, and exit with 1 if it took more than it may."""
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--most-mb", type=float, default=150.0)
    arguments = parser.parse_args()
    # Whoever ends this by SIGTERM wants what it started ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_limit()
    build_upstream()
    port, admin_port = free_port(), free_port()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        upstream(bodies.paced(_EVENTS), Path(name)) as (upstream_port, _),
    ):
        process = ManagedProcess(
            [sys.executable, "-m", "sidecar", "serve"],
            directory=_ROOT,
            log=Path(name) / "log",
            environment={
                "PATH": os.environ["PATH"],
                "SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream_port}",
                "SIDECAR_PORT": str(port),
                "SIDECAR_ADMIN_PORT": str(admin_port),
                "SIDECAR_KEEP_ALIVE_TIMEOUT_S": "600",
                "SIDECAR_DRAIN_DELAY_S": "0",
            },
        )
        try:
            process.wait_until(lambda: '"serving"' in process.log.read_text(), timeout_s=30)
            gc.disable()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_measure(process.pid, port, arguments.idle, arguments.streams))
            peak_mb = peak_bytes([process.pid]) / 1e6
        except IdleError as error:
            sys.exit(f"bench.idle: {error}")
        finally:
            process.stop()
    print(
        f"peak {peak_mb:.1f} MB, {'within' if peak_mb <= arguments.most_mb else 'OVER'} "
        f"{arguments.most_mb:g} MB"
    )
    if peak_mb > arguments.most_mb:
        sys.exit(1)


if __name__ == "__main__":
    main()
