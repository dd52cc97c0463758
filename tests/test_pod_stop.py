"""How a pod ends: what the manifests say, played with processes by the kubelet's rules.

The hooks and the settings' names are those of the manifests; the times are shorter, and LiteLLM is
a process that ends at once when it is told to, so that whatever depends on it then is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.bodies import stream
from tests.support.manifests import Manifests
from tests.support.process import ManagedProcess, free_port
from tests.support.running import SidecarProcess, sidecar_process
from tests.support.shipped import SETS
from tests.support.wire import connected

pytestmark = pytest.mark.anyio

STREAM = stream({"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": 2101}, {})
KEPT = b"GET /kept HTTP/1.1\r\nHost: llm.test\r\n\r\n"
STREAMED = (
    b'POST /v1/messages HTTP/1.1\r\nHost: llm.test\r\nContent-Length: 14\r\n\r\n{"model": "m"}'
)
TIMES = {
    "SIDECAR_DRAIN_DELAY_S": "0",
    "SIDECAR_DRAIN_TIMEOUT_S": "20",
    "SIDECAR_FINAL_SCRAPE_WAIT_S": "5",
}
LITELLM = """
import asyncio, sys

async def answer(reader, writer):
    body = open(sys.argv[2], "rb").read()
    while head := await reader.readuntil(b"\\r\\n\\r\\n"):
        slow = head.startswith(b"POST")
        if slow:
            await reader.readexactly(14)
        writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n")
        writer.write(b"content-length: %d\\r\\n\\r\\n" % len(body) + body[:200])
        await asyncio.sleep(3 if slow else 0)
        writer.write(body[200:])

async def main():
    async with await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
"""


@dataclass
class Pod:
    """LiteLLM and the sidecar, and what the manifests say of their end."""

    litellm: ManagedProcess
    sidecar: SidecarProcess
    native: bool
    hooks: dict[str, list[str] | None]
    drained_before_litellm_ended: bool = False

    async def stop(self) -> None:
        """Do as the kubelet does: all hooks at once; a signal to each container when its hook has
        ended, and to a native sidecar when the others have ended besides."""
        others = asyncio.create_task(self._end("litellm", self.litellm))
        await self._end("sidecar", self.sidecar.process, after=others if self.native else None)
        await others

    async def _end(
        self, name: str, process: ManagedProcess, after: asyncio.Task[None] | None = None
    ) -> None:
        if hook := self.hooks[name]:
            await self.run(hook)
        watched = asyncio.create_task(asyncio.to_thread(process.exit_code, timeout_s=30))
        if after is not None:
            await asyncio.wait([after, watched], return_when=asyncio.FIRST_COMPLETED)
            if not watched.done():
                await after
        if name == "litellm":
            self.drained_before_litellm_ended = bool(self.sidecar.logged("drained"))
        if not watched.done():
            process.send(signal.SIGTERM)
        await watched

    async def run(self, hook: list[str]) -> None:
        """Run a hook to its end."""
        process = await asyncio.create_subprocess_exec(*hook)
        assert await process.wait() == 0


def hooks_of(manifests: Manifests, sidecar: SidecarProcess) -> dict[str, list[str] | None]:
    """The hooks of the manifests, with this machine's ports and processes in them."""
    hooks: dict[str, list[str] | None] = {}
    for name, old, new in (
        ("sidecar", "kill(1,", f"kill({sidecar.process.pid},"),
        ("litellm", "4002", str(sidecar.admin_port)),
    ):
        hook = manifests.container(name).get("lifecycle", {}).get("preStop")
        hooks[name] = None
        if hook is not None:
            interpreter, option, text = hook["exec"]["command"]
            assert re.fullmatch(r"python3?", interpreter)
            assert text.count(old) == 1
            hooks[name] = [sys.executable, option, text.replace(old, new)]
    return hooks


@contextlib.asynccontextmanager
async def pod(manifests: Manifests, directory: Path, **times: str) -> AsyncIterator[Pod]:
    """Start both containers."""
    (directory / "litellm.py").write_text(LITELLM)
    (directory / "body").write_bytes(STREAM)
    port = free_port()
    litellm = ManagedProcess(
        [sys.executable, "litellm.py", str(port), "body"],
        directory=directory,
        log=directory / "litellm.log",
        environment={},
        watched=False,
    )
    settings = {"SIDECAR_UPSTREAM": f"http://127.0.0.1:{port}"}
    settings |= {name: (TIMES | times)[name] for name in manifests.environment if name in TIMES}
    assert settings.keys() == {"SIDECAR_UPSTREAM", *TIMES}
    try:
        with sidecar_process(directory, settings) as sidecar:
            hooks = hooks_of(manifests, sidecar)
            await until(lambda: get(sidecar.admin_port, "/readyz", b"200 OK"))
            yield Pod(litellm, sidecar, manifests.native, hooks)
    finally:
        litellm.stop()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds; fail if it never does."""
    async with asyncio.timeout(10):
        while not await holds():  # noqa: ASYNC110 - it is about another process
            await asyncio.sleep(0.02)


async def get(port: int, path: str, wanted: bytes) -> bool:
    """Ask as Prometheus does, and say whether that is in the answer."""
    head = b"Host: a.test\r\nX-Prometheus-Scrape-Timeout-Seconds: 9\r\nConnection: close\r\n\r\n"
    try:
        async with connected(("127.0.0.1", port)) as client:
            client.send(b"GET %s HTTP/1.1\r\n" % path.encode() + head)
            return wanted in await client.end()
    except OSError:
        return False


async def scrape(port: int) -> bool:
    """Scrape until nobody is there; say whether a scrape saw the stream's tokens."""
    seen = False
    while True:
        seen |= await get(port, "/metrics", b"litellm_cached_tokens_metric_total{")
        try:
            async with connected(("127.0.0.1", port)):
                await asyncio.sleep(0.1)
        except OSError:
            return seen


@pytest.mark.parametrize("form", ["native", "plain"])
async def test_nothing_is_cut(form: str, tmp_path: Path) -> None:
    """A stream that is under way ends whole, a connection that is kept is served and told to
    close, LiteLLM goes on until the sidecar is done, and Prometheus has seen the last counts."""
    async with pod(SETS[form](), tmp_path, SIDECAR_DRAIN_DELAY_S="2") as made:
        address, admin = ("127.0.0.1", made.sidecar.port), made.sidecar.admin_port
        assert await get(admin, "/metrics", b"litellm_sidecar_build_info")
        async with connected(address) as kept, connected(address) as client:
            assert (await kept.ask(KEPT)).body == STREAM
            client.send(STREAMED)
            await client.receive(b"\n", 1)

            scraper = asyncio.create_task(scrape(admin))
            stopping = asyncio.create_task(made.stop())
            await until(lambda: get(admin, "/readyz", b"draining"))
            answer = await kept.ask(KEPT)
            assert (answer.status, answer.body) == (200, STREAM)
            assert answer.header(b"connection") == b"close"
            answer = await client.answer()
            assert (answer.body, answer.complete) == (STREAM, True)
        await asyncio.wait_for(stopping, 20)

        assert made.drained_before_litellm_ended
        assert made.sidecar.process.exit_code(timeout_s=0) == 0
        assert made.sidecar.logged("drained")[0]["cut"] == 0
        assert made.sidecar.logged("final_scrape")
        assert await scraper


@pytest.mark.parametrize(
    ("form", "change"),
    [
        pytest.param("native", {"sidecar": None, "litellm": None}, id="native-no-hooks"),
        pytest.param("native", {"litellm": None}, id="native-litellm-does-not-wait"),
        pytest.param("plain", {"litellm": None}, id="plain-litellm-does-not-wait"),
        pytest.param("plain", {"sidecar": "native"}, id="plain-second-signal"),
    ],
)
async def test_what_the_hooks_are_for(
    form: str, change: dict[str, str | None], tmp_path: Path
) -> None:
    """Without one of them, or with one too many, a stream is cut."""
    async with pod(SETS[form](), tmp_path) as made:
        for name, source in change.items():
            made.hooks[name] = hooks_of(SETS[source](), made.sidecar)[name] if source else None
        async with connected(("127.0.0.1", made.sidecar.port)) as client:
            client.send(STREAMED)
            await client.receive(b"\n", 1)

            await asyncio.wait_for(made.stop(), 20)

            answer = await client.answer()
        assert (answer.status, answer.complete) == (200, False)


async def test_restart_of_litellm_alone_does_not_wait_for_the_sidecar(tmp_path: Path) -> None:
    """Its hook notices that nobody is draining; what it waits for that is shorter here."""
    async with pod(SETS["native"](), tmp_path) as made:
        hook = made.hooks["litellm"]
        assert hook is not None
        assert hook[-1].count("waited > 15") == 1
        hook[-1] = hook[-1].replace("waited > 15", "waited > 1")

        began = time.monotonic()
        await asyncio.wait_for(made.run(hook), 20)

        assert time.monotonic() - began > 1
        assert await get(made.sidecar.admin_port, "/readyz", b"200 OK")
