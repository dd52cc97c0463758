"""Memory stays flat, whatever the size of a body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.running import SidecarProcess, sidecar_process
from tests.support.wire import Received, ask, read_answer, upstream

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

GIGABYTE = 1 << 30
PIECE = (b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n' * 16384)[: 1 << 20]
GROWTH = 16 << 20


@asynccontextmanager
async def peak_growth(side: SidecarProcess, growth: list[int]) -> AsyncIterator[None]:
    """Sample the process's memory; append by how much it grew at most."""
    before = peak = side.resident_bytes()

    async def sample() -> None:
        nonlocal peak
        while True:
            peak = max(peak, side.resident_bytes())
            await asyncio.sleep(0.01)

    task = asyncio.create_task(sample())
    try:
        yield
    finally:
        task.cancel()
        growth.append(max(peak, side.resident_bytes()) - before)


WARM = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize("content_type", [b"text/event-stream", b"application/json"])
async def test_gigabyte_to_a_slow_client(tmp_path: Path, content_type: bytes) -> None:
    """A response of 1 GB to a client that pauses grows the process by less than 16 MB."""

    async def serve(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        size = 4 << 20 if received.body == b"{}" else GIGABYTE
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % (content_type, size))
        for _part in range(size // len(PIECE)):
            writer.write(PIECE)
            await writer.drain()

    growth: list[int] = []
    async with upstream(serve) as up:
        with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": up.url}) as side:
            for _ in range(2):
                await ask(("127.0.0.1", side.port), WARM)
            async with peak_growth(side, growth), asyncio.timeout(60):
                reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
                writer.write(WARM.replace(b"{}", b"[]"))
                await reader.readuntil(b"\r\n\r\n")
                got = 0
                next_pause = 64 << 20
                while got < GIGABYTE:
                    got += len(await reader.read(1 << 20))
                    if got >= next_pause and next_pause <= 256 << 20:
                        next_pause += 64 << 20
                        await asyncio.sleep(0.5)
                writer.close()
    assert growth[0] < GROWTH, f"grew by {growth[0] / 2**20:.1f} MB"


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_gigabyte_of_upload(tmp_path: Path, framing: str) -> None:
    """A request of 1 GB grows the process by less than 16 MB."""

    async def serve(
        received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        lengths = received.values(b"content-length")
        if lengths:
            left = int(lengths[0])
            while left:
                left -= len(await reader.read(min(left, 1 << 20)))
        else:
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                tail = (tail + await reader.read(1 << 20))[-5:]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    growth: list[int] = []
    async with upstream(serve, read_body=False) as up:
        with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": up.url}) as side:
            for _ in range(2):
                await ask(("127.0.0.1", side.port), WARM)
            began = time.monotonic()
            async with peak_growth(side, growth), asyncio.timeout(90):
                reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
                head = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\n"
                if framing == "length":
                    writer.write(head + b"Content-Length: %d\r\n\r\n" % GIGABYTE)
                else:
                    writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
                for _ in range(GIGABYTE // len(PIECE)):
                    if framing == "chunked":
                        writer.write(b"%x\r\n" % len(PIECE))
                    writer.write(PIECE)
                    if framing == "chunked":
                        writer.write(b"\r\n")
                    await writer.drain()
                if framing == "chunked":
                    writer.write(b"0\r\n\r\n")
                assert (await read_answer(reader)).status == 200
                writer.close()
    assert growth[0] < GROWTH, f"grew by {growth[0] / 2**20:.1f} MB"
    assert time.monotonic() - began < 90
