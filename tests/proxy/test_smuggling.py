"""Request smuggling: what the upstream reads is what the edge read, or the client is refused.

The upstream is h11, on which LiteLLM's own server runs. It is laxer than the edge: it takes a
length beside a transfer coding, bare line feeds and folded headers. What it has to say of each
request is in `tests/data/smuggling`, with the bytes that it must get.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest

from sidecar.app import Sidecar
from sidecar.config import Settings
from tests.support.edges import serving
from tests.support.running import until
from tests.support.wire import Received, connected, upstream

pytestmark = pytest.mark.anyio

DATA = Path(__file__).parents[1] / "data" / "smuggling"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
NEXT_FORWARDED = b"GET /next HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 127.0.0.1\r\n\r\n"


def cases(name: str) -> list[Any]:
    """Read cases as parameters."""
    lines = (DATA / name).read_text().splitlines()
    return [pytest.param(case, id=case["name"]) for case in map(json.loads, lines)]


@dataclass(slots=True)
class Reading:
    """An upstream that reads as LiteLLM's server does, and what it has read."""

    url: str = ""
    requests: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    """Method, target and body of each that h11 has made out."""
    raw: bytes = b""
    """All that came."""
    malformed: bool = False


@asynccontextmanager
async def h11_upstream() -> AsyncIterator[Reading]:
    """Serve as LiteLLM's server reads, and note every request that it makes out."""
    seen = Reading()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(65536)
                    seen.raw += data
                    connection.receive_data(data)
                elif isinstance(event, h11.Request):
                    request, body = event, b""
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert request is not None
                    seen.requests.append((request.method, request.target, body))
                    answer: list[h11.Event] = [
                        h11.Response(status_code=200, headers=[("content-length", "2")]),
                        h11.Data(data=b"ok"),
                        h11.EndOfMessage(),
                    ]
                    if request.method == b"HEAD":
                        del answer[1]
                    writer.write(b"".join(connection.send(part) or b"" for part in answer))
                    connection.start_next_cycle()
                else:
                    break
        except h11.ProtocolError:
            seen.malformed = True
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield seen
    finally:
        server.close()


def read_requests(raw: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Make out with h11 what a file's bytes hold."""
    requests: list[tuple[bytes, bytes, bytes]] = []
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    while (event := connection.next_event()) is not h11.NEED_DATA:
        if isinstance(event, h11.Request):
            requests.append((event.method, event.target, b""))
        elif isinstance(event, h11.Data):
            method, target, body = requests[-1]
            requests[-1] = (method, target, body + bytes(event.data))
    return requests


@dataclass(slots=True)
class Relaying:
    """A sidecar without its admin port."""

    sidecar: Sidecar
    address: tuple[str, int]

    @property
    def requests(self) -> int:
        """How many it has counted."""
        samples = [
            sample for metric in self.sidecar.registry.collect() for sample in metric.samples
        ]
        name = "litellm_sidecar_http_requests_total"
        return int(sum(sample.value for sample in samples if sample.name == name))


@asynccontextmanager
async def relaying(url: str) -> AsyncIterator[Relaying]:
    """Serve what a sidecar serves to clients."""
    sidecar = Sidecar(Settings(upstream=url))
    try:
        async with serving(lambda _: sidecar.relay, ws=sidecar.tunnel) as served:
            yield Relaying(sidecar, served.address)
    finally:
        await sidecar.aclose()


@pytest.mark.parametrize("case", cases("requests.jsonl"))
async def test_requests(case: dict[str, Any]) -> None:
    """A request goes on as the bytes that are written down for it, or is refused; the upstream
    makes out as many as the sidecar, of the same meaning, also where they come byte by byte."""
    raw = case["bytes"].encode("latin-1")
    forwarded = [part.encode("latin-1") for part in case["forwarded"]]
    refused, closes = case.get("refused"), case.get("closes", False)
    if not refused and not closes:
        raw += NEXT
        forwarded.append(NEXT_FORWARDED)
    meant = [request for part in forwarded for request in read_requests(part)]
    assert len(meant) == len(forwarded)
    for step in (len(raw), 1):
        async with (
            h11_upstream() as seen,
            relaying(seen.url) as sidecar,
            connected(sidecar.address) as client,
        ):
            for at in range(0, len(raw), step):
                client.send(raw[at : at + step])
                await asyncio.sleep(0)
            answers = [await client.answer(method.decode()) for method, _, _ in meant]
            assert [answer.status for answer in answers] == [200] * len(meant)
            if refused:
                refusal = await client.answer()
                assert [refusal.status, refusal.header(b"x-sidecar-error")] == [
                    refused[0],
                    refused[1].encode(),
                ]
            if refused or closes:
                assert await client.end() == b""
            assert seen.requests == meant
            if case.get("torn"):
                # Its head was good: what has come of it went on, and was then cut.
                await until(lambda: sidecar.requests == len(meant) + 1)
            else:
                await until(lambda: sidecar.requests == len(meant))
                assert not seen.malformed
                assert step == 1 or seen.raw == b"".join(forwarded)


@pytest.mark.parametrize("case", cases("responses.jsonl"))
async def test_responses(case: dict[str, Any]) -> None:
    """An answer is passed on as what is written down for it, or is none; what stands behind it
    answers no other request."""
    raw = case["bytes"].encode("latin-1")
    method = case.get("method", "GET")
    status, body, complete = case["answer"]
    second = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond"

    async def handler(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if b"/second" in received.line:
            writer.write(second)
            return
        writer.write(raw)
        if case.get("close"):
            writer.close()

    async with upstream(handler) as server, relaying(server.url) as sidecar:
        async with connected(sidecar.address) as client:
            answer = await client.ask(f"{method} /a HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            if status == 502:
                assert answer.header(b"x-sidecar-error") is not None
                assert b"hidden" not in answer.body
            else:
                assert answer.body == body.encode("latin-1")
            assert (answer.status, answer.complete) == (status, complete)
        async with connected(sidecar.address) as client:
            answer = await client.ask(b"GET /second HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (answer.status, answer.body) == (200, b"second")
        # The first was asked for once: what may have been acted on is not asked for again.
        assert sum(b"/a" in request.line for request in server.received) == 1


@pytest.mark.parametrize("case", cases("handshakes.jsonl"))
async def test_handshakes(case: dict[str, Any]) -> None:
    """A WebSocket's handshake goes on as the bytes that are written down for it, or as the plain
    request that it is, or is refused; what stands behind it goes on after the 101 alone."""
    raw, refused = case["bytes"].encode("latin-1"), case.get("refused")
    forwarded = case.get("forwarded", "").encode("latin-1")
    frames = case.get("frames", "").encode("latin-1")
    switches = b"\r\nupgrade: " in forwarded
    came = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            answered = len(came) >= len(forwarded)
            came.extend(data)
            if answered or len(came) < len(forwarded):
                continue
            # None of what stands behind the handshake may have come.
            assert len(came) == len(forwarded)
            writer.write(SWITCH if switches else b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        for step in (len(raw), 1):
            came.clear()
            async with relaying(url) as sidecar, connected(sidecar.address) as client:
                for at in range(0, len(raw), step):
                    client.send(raw[at : at + step])
                    await asyncio.sleep(0)
                if switches:
                    async with asyncio.timeout(10):
                        head = await client.reader.readuntil(b"\r\n\r\n")
                    assert head.startswith(b"HTTP/1.1 101 ")
                else:
                    answer = await client.answer()
                    assert answer.status == (refused[0] if refused else 200)
                    reason = refused[1].encode() if refused else None
                    assert answer.header(b"x-sidecar-error") == reason
                await until(lambda: len(came) >= len(forwarded + frames))
                assert bytes(came) == forwarded + frames
    finally:
        server.close()
