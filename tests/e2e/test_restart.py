"""A restart under load: what a client sees that was promised an answer, and one that retries."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from pathlib import Path
from time import monotonic

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosedError

from tests.support.calls import request, samples, send
from tests.support.running import SidecarProcess, sidecar_process, until
from tests.support.wire import Client, Received, connected, upstream

pytestmark = pytest.mark.anyio

CLIENTS = 60
POST = b"POST /v1/messages HTTP/1.1\r\nHost: llm.test\r\nContent-Length: 2\r\n\r\n{}"
SCRAPER = {"X-Prometheus-Scrape-Timeout-Seconds": "1"}


async def stream(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with a few events, over up to a quarter of a second."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for _i in range(random.randint(1, 5)):
        writer.write(b"5\r\nevent\r\n")
        await asyncio.sleep(random.random() * 0.05)
    writer.write(b"0\r\n\r\n")


class Caller:
    """A client that keeps its connection, and asks the other sidecar when the first is gone.

    It takes what a well-behaved client takes: that nobody listens, and that a connection which
    it has used before turns out to be closed, in an orderly way and without a byte.
    """

    def __init__(self, ports: list[int], seen: Counter[str]) -> None:
        self._ports = ports
        self._seen = seen

    async def work(self, until_port: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            port = self._ports[0]
            try:
                async with connected(("127.0.0.1", port)) as client:
                    await self._ask(client, port, stop)
            except ConnectionRefusedError:
                self._ports.remove(port)
                assert self._ports == [until_port]

    async def _ask(self, client: Client, port: int, stop: asyncio.Event) -> None:
        used = False
        while not stop.is_set():
            client.send(POST)
            answer = await client.answer()
            if not answer.complete:
                assert used, "a new connection was closed under its first request"
                assert answer.status == 0, "an answer was cut"
                assert await client.end() == b"", "a connection was reset"
                self._seen["found closed"] += 1
                return
            assert answer.status == 200
            self._seen[f"answered by {port}"] += 1
            if answer.header(b"connection") == b"close":
                self._seen["told that it closes"] += 1
                return
            used = True
            # Some are idle for so long that their connection is closed meanwhile.
            await asyncio.sleep(random.choice((0, 0, 0.01, random.random() * 2)))


async def last_scrape(side: SidecarProcess) -> list[tuple[str, dict[str, str], float]]:
    """Scrape until the admin port is gone; return what the last scrape showed."""
    rows = []
    try:
        while True:
            answer = await send(side.admin_url, request("GET", "/metrics", SCRAPER))
            if answer.complete:
                rows = samples(answer.body.decode())
            await asyncio.sleep(0.05)
    except OSError:
        return rows


@pytest.mark.parametrize("delay_s", ["0", "0.5"])
async def test_restart_under_load_loses_no_answer(tmp_path: Path, delay_s: str) -> None:
    """No answer is cut and no connection reset, requests on kept connections are answered or
    find them closed, and the last scrape has counted every one."""
    settings = {
        "SIDECAR_DRAIN_DELAY_S": delay_s,
        "SIDECAR_DRAIN_TIMEOUT_S": "20",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "10",
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    async with upstream(stream) as up:
        settings["SIDECAR_UPSTREAM"] = up.url
        with (
            sidecar_process(tmp_path / "old", settings) as old,
            sidecar_process(tmp_path / "new", settings) as new,
        ):
            seen: Counter[str] = Counter()
            stop = asyncio.Event()
            scraping = asyncio.create_task(last_scrape(old))
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    caller = Caller([old.port, new.port], seen)
                    group.create_task(caller.work(new.port, stop))
                await until(lambda: seen[f"answered by {old.port}"] > 2 * CLIENTS, 20)
                old.process.send(signal.SIGTERM)
                assert await asyncio.to_thread(old.process.exit_code, timeout_s=20) == 0
                await until(lambda: seen[f"answered by {new.port}"] > CLIENTS, 20)
                stop.set()
            assert seen["told that it closes"] > 0
            final = await scraping
    counted = sum(
        value
        for name, labels, value in final
        if name == "litellm_sidecar_http_requests_total" and labels["code"] == "200"
    )
    assert counted == seen[f"answered by {old.port}"]
    (drained,) = old.logged("drained")
    assert drained["cut"] == 0
    assert old.logged("final_scrape")


async def test_stream_websocket_and_client_that_does_not_read(tmp_path: Path) -> None:
    """In one drain: a stream ends whole, a WebSocket goes on until the time is up, a client that
    does not read holds up nobody, and what is left then is cut."""

    async def serve(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if b"/endless" in received.line:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
            while True:
                writer.write(bytes(65536))
                await writer.drain()
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _i in range(10):
            writer.write(b"5\r\nevent\r\n")
            await asyncio.sleep(0.1)
        writer.write(b"0\r\n\r\n")

    async def echo(websocket: object) -> None:
        async for message in websocket:  # type: ignore[attr-defined]
            await websocket.send(message)  # type: ignore[attr-defined]

    (tmp_path / "http").mkdir()
    (tmp_path / "websocket").mkdir()
    timeout_s = 5.0
    settings = {"SIDECAR_DRAIN_TIMEOUT_S": str(timeout_s)}
    async with upstream(serve) as up, serve_websockets(echo, "127.0.0.1", 0) as echoing:
        (listening,) = echoing.sockets
        echo_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with (
            sidecar_process(tmp_path / "http", settings | {"SIDECAR_UPSTREAM": up.url}) as side,
            sidecar_process(
                tmp_path / "websocket", settings | {"SIDECAR_UPSTREAM": echo_url}
            ) as other,
        ):
            async with (
                connected(("127.0.0.1", side.port), limit=1024) as stuck,
                connected(("127.0.0.1", side.port)) as streaming,
                connect(f"ws://127.0.0.1:{other.port}/v1/realtime", proxy=None) as websocket,
            ):
                stuck.send(POST.replace(b"/v1/messages", b"/endless"))
                streaming.send(POST)
                await streaming.reader.readuntil(b"event")
                began = monotonic()
                for one in (side, other):
                    one.process.send(signal.SIGTERM)
                    await until(lambda one=one: one.logged("draining"))
                await websocket.send("still there?")
                assert await websocket.recv() == "still there?"
                assert (await streaming.end()).endswith(b"0\r\n\r\n")
                assert monotonic() - began < timeout_s
                with pytest.raises(ConnectionClosedError):
                    await websocket.recv()
                for one in (side, other):
                    assert await asyncio.to_thread(one.process.exit_code, timeout_s=10) == 0
                    assert one.logged("drained")[0]["cut"] == 1
                assert timeout_s - 0.1 < monotonic() - began
                assert not (await stuck.answer()).complete
