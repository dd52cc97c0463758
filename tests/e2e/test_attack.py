"""The edge under attack, in a process of its own, on real sockets.

Under each attack the admin port answers, clients that do nothing wrong are served, and memory
is bounded; afterwards everything that the attack took is given back.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import pytest

from tests.support.calls import request, samples, send
from tests.support.running import SidecarProcess, sidecar_process, until
from tests.support.wire import Received, ask, connected, upstream

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MEBIBYTE = 1 << 20
GET = b"GET /v1/models HTTP/1.1\r\nHost: llm.test\r\n\r\n"
ENDLESS = GET.replace(b"/v1/models", b"/endless")
UPLOAD = b"POST /v1/messages HTTP/1.1\r\nHost: llm.test\r\nContent-Length: 100000\r\n\r\n{"
REFUSALS = "litellm_sidecar_refusals_total"
ADMIN_WITHIN_S = 5.0
"""Far more than it takes, for the sake of a machine with other things to do."""
RESET_AT_CLOSE = struct.pack("ii", 1, 0)
"""So that thousands of closed connections do not use up the ports."""


async def serve(received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if b"/endless" in received.line:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


@asynccontextmanager
async def attacked(
    directory: Path, *, max_open_files: int | None = None, **settings: str
) -> AsyncIterator[SidecarProcess]:
    """Run a sidecar, and look after the attack whether all that it had opened is closed."""
    async with upstream(serve) as up:
        environment = {f"SIDECAR_{name.upper()}": value for name, value in settings.items()}
        environment["SIDECAR_UPSTREAM"] = up.url
        with sidecar_process(directory, environment, max_open_files=max_open_files) as side:
            assert (await ask(("127.0.0.1", side.port), GET)).status == 200
            # The way to the upstream that is kept for a moment may be among them.
            before = side.open_files()
            yield side
            await until(lambda: side.open_files() <= before, timeout_s=10)
            assert (await ask(("127.0.0.1", side.port), GET)).status == 200
            assert await total(side, "litellm_sidecar_http_requests_in_flight") == 0
            assert await total(side, "litellm_sidecar_internal_errors_total") == 0


async def total(side: SidecarProcess, name: str, **labels: str) -> float:
    answer = await send(side.admin_url, request("GET", "/metrics"))
    rows = samples(answer.body.decode())
    return sum(
        value for found, its, value in rows if found == name and labels.items() <= its.items()
    )


@dataclass(slots=True)
class Watch:
    """What somebody who is not part of the attack sees."""

    served: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0


@asynccontextmanager
async def watched(side: SidecarProcess, *, kept: bool = False) -> AsyncIterator[Watch]:
    """Ask the admin port, and as a client, again and again; all must be answered.

    Args:
        kept: whether the client has a connection from before the attack, and needs no other.
    """
    watch = Watch(peak_bytes=side.resident_bytes())
    stop = asyncio.Event()

    async def look() -> None:
        async with connected(("127.0.0.1", side.port)) as client:
            while not stop.is_set() or not watch.served:
                for path in ("/healthz", "/metrics"):
                    began = monotonic()
                    async with asyncio.timeout(ADMIN_WITHIN_S):
                        assert (await send(side.admin_url, request("GET", path))).status == 200
                    watch.slowest_s = max(watch.slowest_s, monotonic() - began)
                answer = await client.ask(GET)
                if not kept:
                    answer = await ask(("127.0.0.1", side.port), GET)
                assert answer.body == b"ok"
                watch.served += 1
                watch.peak_bytes = max(watch.peak_bytes, side.resident_bytes())
                await asyncio.sleep(0.02)

    looking = asyncio.create_task(look())
    try:
        await until(lambda: watch.served or looking.done())
        yield watch
    finally:
        stop.set()
        await looking


@contextmanager
def many_files() -> Iterator[int]:
    """Let this process open as many files as the system lets it; yields how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Sockets, as bare as they come, that are all reset at the end."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._stack = ExitStack()
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def grow(self, count: int, say: bytes = b"", *, receive_bytes: int = 0) -> None:
        """Connect so many more, and have each say something."""
        loop = asyncio.get_running_loop()
        for start in range(0, count, 500):
            await asyncio.gather(
                *(
                    self._join(loop, say, receive_bytes)
                    for _ in range(start, min(count, start + 500))
                )
            )

    async def _join(self, loop: asyncio.AbstractEventLoop, say: bytes, receive_bytes: int) -> None:
        one = self._stack.enter_context(socket.socket())
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        if receive_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await loop.sock_connect(one, self._address)
        if say:
            await loop.sock_sendall(one, say)
        self.sockets.append(one)

    async def answers(self) -> list[bytes]:
        """Wait until each is closed; return the status lines that they were told."""
        loop = asyncio.get_running_loop()

        async def told(one: socket.socket) -> bytes:
            said = b""
            try:
                while piece := await loop.sock_recv(one, 65536):
                    said += piece
            except ConnectionError:
                pass
            return said.partition(b"\r\n")[0]

        async with asyncio.timeout(20):
            return await asyncio.gather(*map(told, self.sockets))


async def test_slow_heads(tmp_path: Path) -> None:
    """Heads that come a byte at a time are given up when their time is over, all of them."""
    async with attacked(tmp_path, head_timeout_s="1") as side, watched(side):
        with Crowd(side.port) as crowd:
            await crowd.grow(1000, b"GET /v1/models HTT")
            ended = asyncio.create_task(crowd.answers())
            loop = asyncio.get_running_loop()
            for byte in b"P/1.1\r\nx: " + b"x" * 1000:
                if ended.done():
                    break
                for one in crowd.sockets:
                    try:
                        await loop.sock_sendall(one, bytes([byte]))
                    except ConnectionError:  # given up already
                        pass
                await asyncio.sleep(0.1)
            told = await ended
        assert set(told) <= {b"HTTP/1.1 408 Request Timeout", b""}
        assert await total(side, REFUSALS, reason="slow_head") == 1000


async def test_slow_bodies(tmp_path: Path) -> None:
    """Uploads that stop are given up, and so are their connections to LiteLLM."""
    async with attacked(tmp_path, stall_timeout_s="1") as side, watched(side):
        with Crowd(side.port) as crowd:
            await crowd.grow(500, UPLOAD)
            assert set(await crowd.answers()) == {b"HTTP/1.1 408 Request Timeout"}
        assert await total(side, REFUSALS, reason="slow_body") == 500


async def test_clients_that_do_not_read(tmp_path: Path) -> None:
    """Who takes nothing of an answer is reset in the end; until then no more than a little of it
    is held."""
    async with attacked(tmp_path, stall_timeout_s="2") as side, watched(side) as watch:
        before = side.resident_bytes()
        with Crowd(side.port) as crowd:
            await crowd.grow(200, ENDLESS, receive_bytes=4096)

            async with asyncio.timeout(20):
                while await total(side, REFUSALS, reason="slow_reader") < 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        # uvloop reads up to 256 KiB at once, which wait for the client beside what is on its way.
        assert watch.peak_bytes - before < 200 * 640 * 1024


async def test_ten_thousand_connections(tmp_path: Path) -> None:
    """So many clients that say nothing, or half a head, cost some memory and nothing else."""
    with many_files() as files:
        count = min(10_000, files - 1000)
        assert count > 1000, "the limit of open files is too low for a test of many connections"
        async with attacked(tmp_path) as side, watched(side) as watch:
            before = side.resident_bytes()
            with Crowd(side.port) as crowd:
                await crowd.grow(count // 2)
                await crowd.grow(count - count // 2, b"GET / HTTP/1.1\r\nHost: ")
                await until(lambda: side.open_files() > count, timeout_s=20)
                used = side.cpu_s()
                served = watch.served
                await until(lambda: watch.served > served + 5, timeout_s=20)
                assert watch.peak_bytes - before < count * 16 * 1024
                assert side.cpu_s() - used < 10
            await until(lambda: side.open_files() < 200, timeout_s=20)


async def test_flood_at_the_connection_limit(tmp_path: Path) -> None:
    """Clients beyond the limit are told so, or hung up on; those within it notice nothing."""
    async with attacked(tmp_path, max_connections="50") as side:
        async with watched(side, kept=True) as watch:
            before = side.resident_bytes()
            with Crowd(side.port) as crowd:
                await crowd.grow(49)
                await until(lambda: side.open_files() > 50)
                for _ in range(8):
                    with Crowd(side.port) as flood:
                        await flood.grow(500, GET)
                        told = set(await flood.answers())
                        assert told <= {b"HTTP/1.1 503 Service Unavailable", b""}
            assert watch.peak_bytes - before < 32 * MEBIBYTE
        assert await total(side, REFUSALS, reason="too_many_connections") == 4000


async def test_file_descriptors_run_out(tmp_path: Path) -> None:
    """Clients are turned away before there are none left for the admin port and for LiteLLM; the
    log says once what to do, and all is well when the clients have gone."""
    async with attacked(tmp_path, max_open_files=96) as side:
        (warning,) = side.logged("file_descriptor_limit_is_low")
        assert (warning["level"], warning["limit"]) == ("warning", 96)
        async with watched(side, kept=True):
            with Crowd(side.port) as crowd:
                for _ in range(5):
                    await crowd.grow(100)
                    await asyncio.sleep(0.1)
                await until(lambda: side.logged("file_descriptors_ran_out"))
                used = side.cpu_s()
                await asyncio.sleep(1)
                assert side.cpu_s() - used < 0.9
        (said,) = side.logged("file_descriptors_ran_out")
        assert "ulimit -n" in said["detail"]
        assert await total(side, REFUSALS, reason="too_many_connections") >= 400


async def test_no_file_descriptor_is_left_for_litellm(tmp_path: Path) -> None:
    """A request for which none is left gets 503, and the admin port still answers."""
    async with attacked(tmp_path, max_open_files=96) as side:
        with Crowd(side.port) as crowd:
            await crowd.grow(60)
            await until(lambda: side.open_files() > 60)
            for one in crowd.sockets:
                await asyncio.get_running_loop().sock_sendall(one, ENDLESS)
            await until(lambda: side.logged("file_descriptors_ran_out"))
            answer = await send(side.admin_url, request("GET", "/metrics"))
            assert answer.status == 200
            reason = {"reason": "no_file_descriptors"}
            failed = await total(side, "litellm_sidecar_upstream_failures_total", **reason)
            refused = await total(side, "litellm_sidecar_http_requests_total", code="503")
            assert failed == refused > 0


async def test_admin_port_takes_all_file_descriptors(tmp_path: Path) -> None:
    """Then nobody is let in, but the process neither spins nor dies, and it says why."""
    async with attacked(tmp_path, max_open_files=96) as side:
        with Crowd(side.admin_port) as crowd:
            await crowd.grow(200)
            await until(lambda: side.logged("file_descriptors_ran_out"))
            used = side.cpu_s()
            await asyncio.sleep(1)
            assert side.cpu_s() - used < 0.9
        assert len(side.logged("file_descriptors_ran_out")) == 1
