"""What the composition root does by itself."""

from __future__ import annotations

import asyncio
import gc

import pytest

from tests.support.process import free_port
from tests.support.running import running, until

pytestmark = pytest.mark.anyio


async def test_series_are_spared_by_the_garbage_collector() -> None:
    """Modules from the start, and series once they are many, are out of full collections, which
    would stop the loop for tens of milliseconds; at the end all is as it was."""
    async with running(f"http://127.0.0.1:{free_port()}") as side:
        await until(lambda: gc.get_freeze_count() > 10_000)
        before = gc.get_freeze_count()
        for number in range(1500):
            side.sidecar.metrics.upstream_failures.child(str(number))
        await until(lambda: gc.get_freeze_count() >= before + 1500)
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(("status", "ready"), [(200, True), (404, True), (503, False)])
async def test_upstream_has_to_be_well(status: int, ready: bool) -> None:
    """A load balancer that has no LiteLLM to pass on to answers too, and is not one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % status)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as side:
        reason = await side.sidecar.readiness.reason()
    server.close()
    assert (reason is None) is ready
    assert ready or (reason or "").endswith("(SIDECAR_UPSTREAM): answers 503")
