"""What the composition root does by itself."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys

import pytest

from tests.support.process import free_port
from tests.support.running import ROOT, running, until
from tests.support.wire import Received, ask, upstream

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


async def test_an_upgrade_of_litellm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after its first answer, the version is that of the one which answers now."""
    monkeypatch.setattr("sidecar.app._WATCH_S", 0.05)
    version = b"1.83.10"
    request = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"

    async def handle(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nx-litellm-version: %b\r\n" % version
        writer.write(head + b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}")

    async with upstream(handle) as llm, running(llm.url, compat=("v1.100",)) as side:

        async def shown(expected: bytes) -> bool:
            await ask(side.host, request)
            value = side.value("litellm_sidecar_upstream_info", version=expected.decode())
            return value == 1

        assert await shown(b"1.83.10")
        assert side.value("litellm_sidecar_compat_conflict") == 0
        version = b"1.100.5"
        async with asyncio.timeout(5):
            while not await shown(version):  # noqa: ASYNC110 - each look is a request
                await asyncio.sleep(0.02)
        assert side.value("litellm_sidecar_upstream_info", version="1.83.10") == 0
        assert side.value("litellm_sidecar_compat_conflict") == 1


async def test_a_fault_of_one_work_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sidecar does beside its requests goes on when one of these works breaks."""
    looked = asyncio.Event()
    monkeypatch.setattr("sidecar.app._WATCH_S", 0.02)

    def look(_: object) -> bool:
        looked.set()
        return True

    monkeypatch.setattr("sidecar.descriptors.Descriptors.has_room", look)

    async def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("sidecar.proxy.transport.Transport.probe", broken)
    monkeypatch.setattr("sidecar.account.price_keeper.PriceKeeper.keep", broken)
    async with running("http://127.0.0.1:9") as side, asyncio.timeout(5):
        await looked.wait()
        assert side.value("litellm_sidecar_internal_errors_total", room="account") == 2


def test_nothing_is_imported_while_it_serves() -> None:
    """An import stops every stream for as long as it takes; all come before the first request."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.lazily"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said["answered"] >= 7
    assert {line: names for line, names in said["imported"].items() if names} == {}
