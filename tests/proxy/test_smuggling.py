"""Request smuggling: what the upstream reads is what the edge read, or the client is refused.

The upstream is h11, on which LiteLLM's own server runs. It is laxer than the edge: it takes a
length beside a transfer coding, bare line feeds and folded headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import pytest

from sidecar.app import Sidecar
from sidecar.config import Settings
from tests.support.edges import Served, serving
from tests.support.wire import connected

pytestmark = pytest.mark.anyio

Requests = list[tuple[bytes, bytes, bytes]]
"""Method, target and body of each."""


@asynccontextmanager
async def h11_upstream() -> AsyncIterator[tuple[str, Requests]]:
    """Serve as LiteLLM's server reads, and note every request that it makes out."""
    seen: Requests = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    request, body = event, b""
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert request is not None
                    seen.append((request.method, request.target, body))
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    connection.send(
                        h11.Response(status_code=200, headers=[("content-length", "2")])
                    )
                    connection.send(h11.Data(data=b"ok"))
                    connection.send(h11.EndOfMessage())
                    connection.start_next_cycle()
                else:
                    break
        except (h11.ProtocolError, ConnectionError):
            seen.append((b"MALFORMED", b"", b""))
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()


@asynccontextmanager
async def relaying(url: str) -> AsyncIterator[Served]:
    sidecar = Sidecar(Settings(upstream=url))
    try:
        async with serving(lambda _: sidecar.relay) as served:
            yield served
    finally:
        await sidecar.aclose()


def post(*headers: bytes, body: bytes = b"", target: bytes = b"/a") -> bytes:
    return b"\r\n".join([b"POST " + target + b" HTTP/1.1", b"Host: a", *headers, b"", body])


HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: %d" % len(b"0\r\n\r\n" + HIDDEN)
OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(post(LENGTH, CHUNKED, body=b"0\r\n\r\n" + HIDDEN), id="CL.TE"),
        pytest.param(post(CHUNKED, LENGTH, body=b"0\r\n\r\n" + HIDDEN), id="TE.CL"),
        pytest.param(
            post(b"Content-Length: 4", CHUNKED, body=chunk(HIDDEN) + b"0\r\n\r\n"), id="TE.CL short"
        ),
        pytest.param(
            post(b"Content-Length: 0", b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            id="two lengths",
        ),
        pytest.param(post(b"Content-Length: 0, 33", body=HIDDEN), id="list of lengths"),
        pytest.param(post(b"Content-Length: +33", body=HIDDEN), id="signed length"),
        pytest.param(post(b"Content-Length : 33", body=HIDDEN), id="length, space, colon"),
        pytest.param(post(b"Content-Length:\r\n 33", body=HIDDEN), id="folded length"),
        pytest.param(
            post(b"Transfer-Encoding : chunked", LENGTH, body=HIDDEN), id="TE space colon"
        ),
        pytest.param(post(b"Transfer-Encoding: xchunked", LENGTH, body=HIDDEN), id="TE xchunked"),
        pytest.param(post(b"Transfer-Encoding:\r\n chunked", body=HIDDEN), id="TE folded"),
        pytest.param(post(b"Transfer-Encoding: \x0bchunked", LENGTH, body=HIDDEN), id="TE VT"),
        pytest.param(post(b"Transfer-Encoding: chunked\x00", LENGTH, body=HIDDEN), id="TE NUL"),
        pytest.param(post(b"X: y\nTransfer-Encoding: chunked", LENGTH, body=HIDDEN), id="bare LF"),
        pytest.param(post(b"X: y\rTransfer-Encoding: chunked", LENGTH, body=HIDDEN), id="bare CR"),
        pytest.param(post(b"X: y\r\n\tTransfer-Encoding: chunked", body=HIDDEN), id="obs-fold"),
        pytest.param(post(CHUNKED, b"Transfer-Encoding: x", body=HIDDEN), id="TE.TE"),
        pytest.param(post(b"Transfer-Encoding: x", CHUNKED, body=HIDDEN), id="TE.TE reversed"),
        pytest.param(post(b"Transfer-Encoding: identity", LENGTH, body=HIDDEN), id="TE identity"),
        pytest.param(post(b"Transfer-Encoding: chunked, identity", body=HIDDEN), id="TE list"),
        pytest.param(post(b"\xa0Transfer-Encoding: chunked", LENGTH, body=HIDDEN), id="TE NBSP"),
        pytest.param(
            post(CHUNKED, body=b"0\r\n\r\n").replace(b"1.1", b"1.0", 1), id="TE in HTTP/1.0"
        ),
        pytest.param(post(b"Host: b"), id="two hosts"),
        pytest.param(post(b"Host : b"), id="host, space, colon"),
        pytest.param(post(b" Host: b"), id="indented host"),
        pytest.param(b"POST /a HTTP/1.1\nHost: a\n\n" + HIDDEN, id="bare LF everywhere"),
        pytest.param(b"POST /a HTTP/1.1\r\n\r\n" + HIDDEN, id="no host"),
        pytest.param(b"POST /a\r\n\r\n" + HIDDEN, id="HTTP/0.9"),
        pytest.param(b"POST /a HTTP/1.1\r\nHost: a\r\n\x00\r\n\r\n" + HIDDEN, id="NUL line"),
        pytest.param(post(CHUNKED, body=b"0x0\r\n\r\n" + HIDDEN), id="chunk size in hex"),
        pytest.param(post(CHUNKED, body=b"1\r\nxy\r\n0\r\n\r\n" + HIDDEN), id="chunk too long"),
        pytest.param(post(CHUNKED, body=b"1\nx\n0\n\n" + HIDDEN), id="chunks with bare LF"),
        pytest.param(post(CHUNKED, body=b"1;\nx\r\n0\r\n\r\n" + HIDDEN), id="extension with LF"),
        pytest.param(post(CHUNKED, body=b"0\r\n\n" + HIDDEN), id="end with bare LF"),
        pytest.param(
            post(CHUNKED, body=b"0\r\nContent-Length: 33\r\n\r\n" + HIDDEN), id="length in trailers"
        ),
        pytest.param(post(CHUNKED, body=b"-0\r\n\r\n" + HIDDEN), id="negative chunk"),
        pytest.param(post(CHUNKED, body=b"%x\r\n" % (1 << 64) + HIDDEN), id="chunk size overflow"),
    ],
)
async def test_ambiguous_requests_are_refused(raw: bytes) -> None:
    """With one answer of ours, and the upstream makes out no request at all, or a broken one."""
    async with (
        h11_upstream() as (url, seen),
        relaying(url) as served,
        connected(served.address) as client,
    ):
        client.send(raw + NEXT)
        answer = await client.answer()
        assert answer.status in (400, 501)
        assert await client.end() == b""
        await asyncio.sleep(0.01)
        assert [request for request in seen if request[0] != b"MALFORMED"] == []


@pytest.mark.parametrize(
    ("raw", "meant"),
    [
        pytest.param(
            post(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN), (b"/a", HIDDEN), id="length"
        ),
        pytest.param(
            post(b"Content-Length: 000%d  " % len(HIDDEN), body=HIDDEN),
            (b"/a", HIDDEN),
            id="length with zeros and blanks",
        ),
        pytest.param(
            post(CHUNKED, body=chunk(HIDDEN) + b"0\r\n\r\n"), (b"/a", HIDDEN), id="chunks"
        ),
        pytest.param(
            post(b"tRANSFER-eNCODING: cHUNKED", body=chunk(HIDDEN) + b"0\r\n\r\n"),
            (b"/a", HIDDEN),
            id="case",
        ),
        pytest.param(
            post(CHUNKED, body=b"000;x=y\r\n\r\n"), (b"/a", b""), id="extension of the last chunk"
        ),
        pytest.param(
            post(CHUNKED, body=b"0\r\nHost: b\r\nAuthorization: x\r\n\r\n"),
            (b"/a", b""),
            id="headers in trailers",
        ),
        pytest.param(
            post(*OFFER, b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            (b"/a", HIDDEN),
            id="h2c with a length",
        ),
        pytest.param(
            post(*OFFER, CHUNKED, body=chunk(HIDDEN) + b"0\r\n\r\n"),
            (b"/a", HIDDEN),
            id="h2c with chunks",
        ),
        pytest.param(
            post(
                b"Connection: content-length, host",
                b"Content-Length: %d" % len(HIDDEN),
                body=HIDDEN,
            ),
            (b"/a", HIDDEN),
            id="nominated framing",
        ),
        pytest.param(
            post(b"Connection: transfer-encoding", CHUNKED, body=chunk(HIDDEN) + b"0\r\n\r\n"),
            (b"/a", HIDDEN),
            id="nominated coding",
        ),
        pytest.param(post(b"Content_Length: 33", body=b""), (b"/a", b""), id="underscore"),
        pytest.param(
            post(target=b"http://other.test/b"), (b"/b", b""), id="URL with another authority"
        ),
        pytest.param(post(target=b"//other.test/b"), (b"//other.test/b", b""), id="two slashes"),
        pytest.param(
            post(b"Expect: 100-continue", b"Content-Length: %d" % len(HIDDEN), body=HIDDEN),
            (b"/a", HIDDEN),
            id="body sent without waiting for 100",
        ),
    ],
)
@pytest.mark.parametrize("step", [0, 1], ids=["whole", "byte by byte"])
async def test_what_is_passed_on_has_one_meaning(
    raw: bytes, meant: tuple[bytes, bytes], step: int
) -> None:
    """The upstream makes out the same request, and the one behind it, and nothing else."""
    async with (
        h11_upstream() as (url, seen),
        relaying(url) as served,
        connected(served.address) as client,
    ):
        raw += NEXT
        for at in range(0, len(raw), step or len(raw)):
            client.send(raw[at : at + (step or len(raw))])
            await asyncio.sleep(0)
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        assert seen == [(b"POST", *meant), (b"GET", b"/next", b"")]
