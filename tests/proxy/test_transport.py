"""The contract of the way to the upstream, on real sockets of all three kinds."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop

from sidecar.errors import UpstreamError
from sidecar.exchange import RawHeaders, UpstreamFault
from sidecar.proxy import transport as transport_module
from sidecar.proxy.transport import Timeouts, Transport, UpstreamResponse
from tests.support.certificates import Authority
from tests.support.running import running, until
from tests.support.wire import Handler, Received, Upstream, ask, upstream

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
KINDS = ("tcp", "tls", "unix")
MEBIBYTE = 1 << 20


# A transport, an upstream, and nothing that stays behind


@dataclass(frozen=True, slots=True)
class Link:
    """A transport and the upstream at its other end."""

    transport: Transport
    up: Upstream

    async def open(
        self, method: str = "GET", body: Body | None = None, *, target: bytes = b"/x"
    ) -> UpstreamResponse:
        """Send a request and wait for the head of the answer."""
        headers = [(b"host", b"llm.test"), *(body.framing if body is not None else ())]
        return await self.transport.open(method, target, headers, body)

    async def fetch(self, method: str = "GET", body: Body | None = None) -> Fetched:
        """Send a request and read the whole answer."""
        return await read(await self.open(method, body))


@dataclass(slots=True)
class Body:
    """A request's body: what is there at once, and the rest."""

    framing: RawHeaders
    first: bytes = b""
    rest: Callable[[], AsyncIterator[bytes]] | None = None

    def take(self) -> tuple[bytes, bool]:
        return self.first, self.rest is not None

    def __aiter__(self) -> AsyncIterator[bytes]:
        assert self.rest is not None
        return self.rest()


@dataclass(frozen=True, slots=True)
class Fetched:
    """An answer that was read to its end."""

    status_code: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    pieces: int = field(compare=False, default=0)


def sized(data: bytes) -> Body:
    return Body([(b"content-length", b"%d" % len(data))], data)


def chunked(*pieces: bytes, first: bytes = b"") -> Body:
    async def rest() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    return Body([(b"transfer-encoding", b"chunked")], first, rest)


async def read(response: UpstreamResponse) -> Fetched:
    pieces: list[bytes] = []
    try:
        await response.pump(lambda piece, _: pieces.append(piece))
    finally:
        response.close()
    body = b"".join(pieces)
    return Fetched(response.status_code, response.headers, body, len(pieces))


async def take(response: UpstreamResponse, way: str, pieces: list[bytes]) -> None:
    """Take the body by `pump` or by `chunks`."""
    if way == "pump":
        await response.pump(lambda piece, _: pieces.append(piece))
    else:
        async for piece in response.chunks():
            pieces.append(piece)  # noqa: PERF401 - it may fail in the middle


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Let each `gc.collect` look at what its own test made, and at nothing else."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def server_tls(authority: Authority) -> ssl.SSLContext:
    return authority.server("localhost", "127.0.0.1", "::1")


@pytest.fixture
def client_tls(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.file)


Connect = Callable[..., Any]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of socket."""
    return str(request.param)


@pytest.fixture
def link(
    kind: str, tmp_path: Path, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> Connect:
    """Make a link over the kind of socket that the test runs with."""
    numbers = itertools.count()

    @asynccontextmanager
    async def connect(
        handler: Handler | bytes, *, read_body: bool = True, **timeouts: float
    ) -> AsyncIterator[Link]:
        path = str(tmp_path / f"{next(numbers)}.sock") if kind == "unix" else None
        tls = server_tls if kind == "tls" else None
        async with (
            nothing_left(),
            upstream(handler, read_body=read_body, path=path, tls=tls) as up,
        ):
            transport = Transport(up.url, Timeouts(**timeouts), tls=client_tls)
            try:
                yield Link(transport, up)
            finally:
                await transport.aclose()
                await until(lambda: transport.open_connections == 0)

    return connect


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Fail on what stays behind: a socket, a task, an exception that the loop had to report."""
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    try:
        yield
        await until(lambda: asyncio.all_tasks() <= tasks)
        await until(lambda: open_sockets() <= sockets)
        gc.collect()
        assert reports == []
    finally:
        loop.set_exception_handler(before)


def open_sockets() -> int:
    """Count the sockets of this process."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            pass  # closed meanwhile; os.listdir's own, for one
    return count


def answers(raw: bytes, *, close: bool = False, cut: int | None = None) -> Handler:
    """Answer with these bytes: at once, in two pieces (`cut`), or byte by byte (`cut` 0)."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if cut is None:
            pieces = [raw]
        elif cut:
            pieces = [raw[:cut], raw[cut:]]
        else:
            pieces = [raw[i : i + 1] for i in range(len(raw))]
        for piece in pieces:
            writer.write(piece)
            # A step of the loop for the piece to be read in, before the next one.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if close:
            writer.close()

    return serve


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset (with a Unix socket, just close)."""
    connection = writer.get_extra_info("socket")
    if connection.family != socket.AF_UNIX:
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


# Responses


@dataclass(frozen=True, slots=True)
class Case:
    """A response, what is to come of it, and whether its connection is used again."""

    raw: bytes
    body: bytes = b""
    status_code: int = 200
    method: str = "GET"
    close: bool = False
    reused: bool = True


CASES = {
    "length": Case(OK, b"ok"),
    "empty": Case(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    "chunked": Case(CHUNKED + b"2\r\nok\r\n3;x=y\r\nnow\r\n0\r\n\r\n", b"oknow"),
    "empty chunked": Case(CHUNKED + b"0\r\n\r\n"),
    "trailers": Case(CHUNKED + b"2\r\nok\r\n0\r\nx-a: 1\r\netag: 9\r\n\r\n", b"ok"),
    "Chunked": Case(CHUNKED.replace(b": chunked", b": CHUNKED") + b"0\r\n\r\n"),
    "no reason": Case(b"HTTP/1.1 299\r\ncontent-length: 0\r\n\r\n", status_code=299),
    "204": Case(b"HTTP/1.1 204 No Content\r\n\r\n", status_code=204),
    "304": Case(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", status_code=304),
    "599": Case(b"HTTP/1.1 599 Odd\r\ncontent-length: 0\r\n\r\n", status_code=599),
    "HEAD": Case(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", method="HEAD"),
    "HEAD, chunked": Case(CHUNKED, method="HEAD", reused=False),
    "HEAD, no length": Case(b"HTTP/1.1 200 OK\r\n\r\n", method="HEAD", reused=False),
    "100": Case(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
    "several 1xx": Case(
        b"HTTP/1.1 102 Processing\r\nx: 1\r\n\r\n"
        b"HTTP/1.1 103 Early Hints\r\nlink: a\r\nlink: b\r\n\r\nHTTP/1.1 199 Odd\r\n\r\n" + OK,
        b"ok",
    ),
    "connection: close": Case(
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", b"ok", reused=False
    ),
    "HTTP/1.0": Case(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok", reused=False),
    "HTTP/1.0, keep-alive": Case(
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", b"ok"
    ),
    "until the end": Case(b"HTTP/1.1 200 OK\r\n\r\nok", b"ok", close=True, reused=False),
    "until the end, empty": Case(b"HTTP/1.1 200 OK\r\n\r\n", close=True, reused=False),
    "HTTP/1.0 until the end": Case(
        b"HTTP/1.0 200 OK\r\n\r\n0\r\n\r\n", b"0\r\n\r\n", close=True, reused=False
    ),
    "closed behind its end": Case(OK, b"ok", close=True, reused=False),
    "second response": Case(OK + OK, b"ok", reused=False),
    "second response after 204": Case(
        b"HTTP/1.1 204 No Content\r\n\r\n" + OK, status_code=204, reused=False
    ),
    "garbage behind it": Case(OK + b"\0garbage", b"ok", reused=False),
    "garbage behind chunks": Case(CHUNKED + b"0\r\n\r\n" + b"\0", reused=False),
    "body of HEAD": Case(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", method="HEAD", reused=False
    ),
    "half a body of HEAD": Case(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no", method="HEAD", reused=False
    ),
    "chunks of HEAD": Case(CHUNKED + b"2\r\nok\r\n0\r\n\r\n", method="HEAD", reused=False),
    "body of 304": Case(
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\nok", status_code=304, reused=False
    ),
}


def _headers(case: Case) -> list[tuple[bytes, bytes]]:
    heads = case.raw.split(b"\r\n\r\n")
    head = next(head for head in heads if not head.startswith(b"HTTP/1.1 1"))
    pairs = [line.split(b": ") for line in head.split(b"\r\n")[1:]]
    return [(name, value) for name, value in pairs]


@pytest.mark.parametrize("cut", [None, 0], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_response(link: Connect, case: Case, cut: int | None) -> None:
    """Status, headers and body are what was sent; what is behind them is nobody's."""
    async with link(answers(case.raw, close=case.close, cut=cut)) as it:
        for _ in range(2):
            expected = Fetched(case.status_code, _headers(case), case.body)
            assert await it.fetch(case.method) == expected
            if not case.reused:
                await until(lambda: it.transport.open_connections == 0)
        assert it.up.connections == (1 if case.reused else 2)


@pytest.mark.parametrize("kind", ["unix"], indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_response_cut_anywhere(link: Connect, case: Case) -> None:
    """Wherever the bytes are cut in two, the response is the same."""
    cut = 0

    async def serve(
        received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await answers(case.raw, close=case.close, cut=cut)(received, reader, writer)

    async with link(serve) as it:
        for cut in range(1, len(case.raw)):
            fetched = await it.fetch(case.method)
            assert fetched == Fetched(case.status_code, _headers(case), case.body), cut
            if not case.reused:
                await until(lambda: it.transport.open_connections == 0)


def _ok(*lines: bytes, version: bytes = b"1.1", body: bytes = b"ok") -> bytes:
    return b"\r\n".join([b"HTTP/" + version + b" 200 OK", *lines, b"", body])


MALFORMED_HEADS = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a request": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "HTTP/0.9": _ok(b"content-length: 2", version=b"0.9"),
    "HTTP/1.2": _ok(b"content-length: 2", version=b"1.2"),
    "HTTP/2.0": _ok(b"content-length: 2", version=b"2.0"),
    "status 0": b"HTTP/1.1 000 Odd\r\ncontent-length: 0\r\n\r\n",
    "status 99": b"HTTP/1.1 099 Odd\r\ncontent-length: 0\r\n\r\n",
    "status 600": b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n",
    "status 999": b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
    "status of 4 digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 0\r\n\r\n",
    "status 101": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "101 without upgrade": b"HTTP/1.1 101 Switching\r\n\r\n" + OK,
    "101 after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching\r\n\r\n",
    "length and coding": _ok(b"content-length: 2", b"transfer-encoding: chunked"),
    "coding and length": _ok(b"transfer-encoding: chunked", b"content-length: 2"),
    "two lengths": _ok(b"content-length: 2", b"content-length: 3"),
    "two equal lengths": _ok(b"content-length: 2", b"content-length: 2"),
    "list of lengths": _ok(b"content-length: 2, 2"),
    "signed length": _ok(b"content-length: +2"),
    "negative length": _ok(b"content-length: -2"),
    "hexadecimal length": _ok(b"content-length: 0x2"),
    "empty length": _ok(b"content-length:"),
    "huge length": _ok(b"content-length: 99999999999999999999"),
    "identity": _ok(b"transfer-encoding: identity"),
    "gzip": _ok(b"transfer-encoding: gzip"),
    "xchunked": _ok(b"transfer-encoding: xchunked"),
    "gzip, chunked": _ok(b"transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunked, gzip": _ok(b"transfer-encoding: chunked, gzip", body=b"0\r\n\r\n"),
    "chunked, chunked": _ok(b"transfer-encoding: chunked, chunked", body=b"0\r\n\r\n"),
    "chunked twice": _ok(*[b"transfer-encoding: chunked"] * 2, body=b"0\r\n\r\n"),
    "empty coding": _ok(b"transfer-encoding:"),
    "vertical tab": _ok(b"transfer-encoding: \x0bchunked", body=b"0\r\n\r\n"),
    "coding in HTTP/1.0": _ok(b"transfer-encoding: chunked", version=b"1.0", body=b"0\r\n\r\n"),
    "folded line": _ok(b"x-a: 1", b" folded", b"content-length: 2"),
    "folded coding": _ok(b"transfer-encoding:", b" chunked", body=b"0\r\n\r\n"),
    "bare LF": OK.replace(b"\r\n", b"\n"),
    "bare LF in a line": _ok(b"x-a: 1\nx-b: 2", b"content-length: 2"),
    "bare CR": _ok(b"x-a: 1\rx-b: 2", b"content-length: 2"),
    "space before the colon": _ok(b"content-length : 2"),
    "space in a name": _ok(b"content length: 2"),
    "no colon": _ok(b"content-length 2"),
    "empty name": _ok(b": 2", b"content-length: 2"),
    "NUL in a value": _ok(b"x-a: a\0b", b"content-length: 2"),
    "control in a value": _ok(b"x-a: a\x01b", b"content-length: 2"),
    "space at the first line": _ok(b" x-a: 1", b"content-length: 2"),
}


@pytest.mark.parametrize("cut", [None, 0], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("raw", MALFORMED_HEADS.values(), ids=MALFORMED_HEADS)
async def test_malformed_head(link: Connect, raw: bytes, cut: int | None) -> None:
    """What has no meaning, or two, is no response."""
    async with link(answers(raw, cut=cut)) as it:
        with pytest.raises(UpstreamError) as caught:
            await it.open()
        assert caught.value.fault is UpstreamFault.MALFORMED_RESPONSE
        await until(lambda: it.transport.open_connections == 0)
        assert len(it.up.received) == 1, "it is not asked for a second time"


MALFORMED_BODIES = {
    "no size": b"\r\nok\r\n0\r\n\r\n",
    "no number": b"xx\r\nok\r\n0\r\n\r\n",
    "signed": b"-2\r\nok\r\n0\r\n\r\n",
    "with prefix": b"0x2\r\nok\r\n0\r\n\r\n",
    "huge": b"ffffffffffffffff1\r\nok",
    "space before the size": b" 2\r\nok\r\n0\r\n\r\n",
    "longer than it says": b"2\r\nokk\r\n0\r\n\r\n",
    "shorter than it says": b"3\r\nok\r\n0\r\n\r\n",
    "bare LF behind the size": b"2\nok\r\n0\r\n\r\n",
    "bare LF behind the chunk": b"2\r\nok\n0\r\n\r\n",
    "control in an extension": b"2;a=\x01\r\nok\r\n0\r\n\r\n",
    "NUL in a trailer": b"2\r\nok\r\n0\r\nx: \0\r\n\r\n",
    "length in a trailer": b"2\r\nok\r\n0\r\ncontent-length: 2\r\n\r\n",
    "folded trailer": b"2\r\nok\r\n0\r\nx: 1\r\n 2\r\n\r\n",
}


@pytest.mark.parametrize("cut", [None, 0], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("raw", MALFORMED_BODIES.values(), ids=MALFORMED_BODIES)
async def test_malformed_body(link: Connect, raw: bytes, cut: int | None) -> None:
    """A body whose chunks are not framed ends in a fault, never as if it were whole."""
    async with link(answers(CHUNKED + b"1\r\n>\r\n" + raw, cut=cut)) as it:
        response = await it.open()
        pieces: list[tuple[bytes, bool]] = []
        with pytest.raises(UpstreamError) as caught:
            await response.pump(lambda piece, last: pieces.append((piece, last)))
        assert caught.value.fault is UpstreamFault.MALFORMED_RESPONSE
        assert not any(last for _, last in pieces)
        assert b"".join(piece for piece, _ in pieces) in (b">", b">ok", b">ok\r")
        await until(lambda: it.transport.open_connections == 0)


CUT_BODIES = {
    "short of its length": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
    "without any of it": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n",
    "in a chunk": CHUNKED + b"3\r\nok",
    "between chunks": CHUNKED + b"2\r\nok\r\n",
    "before the last line": CHUNKED + b"2\r\nok\r\n0\r\n",
    "in the trailers": CHUNKED + b"2\r\nok\r\n0\r\nx: 1\r\n",
}


@pytest.mark.parametrize("close", [asyncio.StreamWriter.close, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("raw", CUT_BODIES.values(), ids=CUT_BODIES)
async def test_body_that_is_cut(
    link: Connect, raw: bytes, close: Callable[[asyncio.StreamWriter], None]
) -> None:
    """A body that ends before its end is a fault, behind what came of it."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await asyncio.sleep(0.01)
        close(writer)

    async with link(serve) as it:
        response = await it.open()
        pieces: list[bytes] = []
        with pytest.raises(UpstreamError) as caught:
            await response.pump(lambda piece, _: pieces.append(piece))
        assert caught.value.fault is UpstreamFault.BODY_CUT
        assert b"".join(pieces) in (b"ok", b"")
        await until(lambda: it.transport.open_connections == 0)


async def test_reset_is_no_end(link: Connect, kind: str) -> None:
    """A body that lasts until the end of the connection is not whole after a reset, nor,
    over TLS, without a close_notify."""
    if kind == "unix":
        return  # there is but one way to close it

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nok")
        await asyncio.sleep(0.01)
        if kind == "tls":
            writer.transport.abort()
        else:
            reset(writer)

    async with link(serve) as it:
        with pytest.raises(UpstreamError) as caught:
            await it.fetch()
        assert caught.value.fault is UpstreamFault.BODY_CUT


@pytest.mark.parametrize(
    ("start", "piece", "fault"),
    [
        pytest.param(
            b"HTTP/1.1 200 OK\r\nx: ", b"x" * 4096, UpstreamFault.MALFORMED_RESPONSE, id="header"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\n",
            b"x: y\r\n" * 999,
            UpstreamFault.MALFORMED_RESPONSE,
            id="headers",
        ),
        pytest.param(
            b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99, UpstreamFault.MALFORMED_RESPONSE, id="1xx"
        ),
        pytest.param(
            CHUNKED + b"1\r\nx\r\n0\r\nx: ",
            b"x" * 4096,
            UpstreamFault.MALFORMED_RESPONSE,
            id="trailer",
        ),
        pytest.param(
            CHUNKED + b"1\r\nx\r\n2;", b"x" * 4096, UpstreamFault.MALFORMED_RESPONSE, id="extension"
        ),
        pytest.param(
            CHUNKED + b"1\r\nx\r\n", b"0" * 4096, UpstreamFault.MALFORMED_RESPONSE, id="chunk size"
        ),
    ],
)
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
async def test_endless_head(
    link: Connect, start: bytes, piece: bytes, fault: UpstreamFault, *, taken: bool
) -> None:
    """What comes besides a body has a bound, whether somebody takes the body or not."""
    sent = 0

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(start)
        await asyncio.sleep(0.01)
        while not writer.is_closing():
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    async def run(it: Link) -> None:
        response = await it.open()
        if not taken:
            await asyncio.sleep(0.1)  # what there is of the body is held meanwhile
        await read(response)

    async with link(serve) as it:
        with pytest.raises(UpstreamError) as caught:
            await run(it)
        assert caught.value.fault is fault
        await until(lambda: it.transport.open_connections == 0)
    assert sent < 32 * MEBIBYTE


async def test_long_head_within_the_bound(link: Connect) -> None:
    """A head of many headers, as long as other clients take, is a head."""
    lines = [b"x-%d: %b" % (i, b"v" * 1000) for i in range(100)]
    async with link(_ok(*lines, b"content-length: 2")) as it:
        assert len((await it.fetch()).headers) == 101


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"x: " + b"v" * 300_000, id="value"),
        pytest.param(b"n" * 300_000 + b": x", id="name"),
        pytest.param(b"\r\n".join([b"x: " + b"v" * 1000] * 300), id="headers"),
    ],
)
@pytest.mark.parametrize("rest", [b"ok", b""], ids=["with a body", "alone"])
async def test_head_over_the_bound_is_no_head(link: Connect, line: bytes, rest: bytes) -> None:
    """It is refused, also where its end comes with the bytes that are too many."""
    async with link(b"HTTP/1.1 200 OK\r\n" + line + b"\r\ncontent-length: 2\r\n\r\n" + rest) as it:
        with pytest.raises(UpstreamError) as caught:
            await it.open()
        assert caught.value.fault is UpstreamFault.MALFORMED_RESPONSE


@pytest.mark.parametrize("framed", ["length", "chunked", "until the end"])
async def test_large_body(link: Connect, framed: str) -> None:
    """A body of many reads is whole."""
    data = os.urandom(MEBIBYTE) * 8

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if framed == "length":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        elif framed == "chunked":
            chunk = data[:10_007]
            chunks = b"%x\r\n%b\r\n" % (len(chunk), chunk) * 800
            writer.write(CHUNKED + chunks + b"0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + data)
            writer.close()

    async with link(serve) as it:
        expected = data[:10_007] * 800 if framed == "chunked" else data
        assert (await it.fetch()).body == expected


# The pool


async def _serve_count(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with a number that is the connection's own."""
    writer.write(b"HTTP/1.1 200 OK\r\nx-connection: %d\r\ncontent-length: 0\r\n\r\n" % id(writer))


async def test_connection_used_last_is_used_first(link: Connect) -> None:
    """One after the other use one connection, so that the others can expire."""
    gate = asyncio.Event()

    async def serve(
        received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await gate.wait()
        await _serve_count(received, reader, writer)

    async with link(serve) as it:
        tasks = [asyncio.create_task(it.fetch()) for _ in range(8)]
        await until(lambda: it.up.connections == 8)
        assert it.transport.open_connections == 8
        gate.set()
        await asyncio.gather(*tasks)
        last = {(await it.fetch()).headers[0] for _ in range(20)}
        assert len(last) == 1
        assert it.up.connections == 8
        assert it.transport.open_connections == 8


async def test_idle_connections_expire(link: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that nobody uses is closed before the upstream closes it."""
    assert transport_module._IDLE_EXPIRY_S < 2, "LiteLLM with --run_gunicorn"
    monkeypatch.setattr(transport_module, "_IDLE_EXPIRY_S", 0.1)
    async with link(OK) as it:
        for _ in range(4):
            await it.fetch()
            await asyncio.sleep(0.05)
        assert it.up.connections == 1, "each use begins its time anew"
        await until(lambda: it.transport.open_connections == 0)
        await it.fetch()
        assert it.up.connections == 2


async def test_connection_past_its_time_is_not_taken(
    link: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that expired is not used, even where the loop was too busy to close it."""
    async with link(OK) as it:
        await it.fetch()
        monkeypatch.setattr(transport_module, "_IDLE_EXPIRY_S", 0.0)
        await it.fetch()
        assert it.up.connections == 2


async def test_connections_have_a_maximum_age(
    link: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection is not used for ever, so that the upstream's workers share the load."""
    monkeypatch.setattr(transport_module, "_MAX_AGE_S", 0.2)
    async with link(OK) as it:
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 0.5:
            await it.fetch()
            await asyncio.sleep(0.01)
        assert 2 <= it.up.connections <= 4


@pytest.mark.parametrize(
    "late",
    [
        pytest.param(lambda writer: writer.write(b"\n"), id="a byte"),
        pytest.param(lambda writer: writer.write(OK), id="a response"),
        pytest.param(
            lambda writer: writer.write(b"HTTP/1.1 408 Timeout\r\n\r\n"), id="408 of a server"
        ),
        pytest.param(lambda writer: writer.close(), id="its end"),
        pytest.param(reset, id="a reset"),
    ],
)
async def test_idle_connection_that_stirs_is_closed(
    link: Connect, late: Callable[[asyncio.StreamWriter], object]
) -> None:
    """What comes on an idle connection answers nobody."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        writers.append(writer)

    async with link(serve) as it:
        await it.fetch()
        assert it.transport.open_connections == 1
        late(writers[0])
        await until(lambda: it.transport.open_connections == 0)
        assert (await it.fetch()).body == b"ok"


async def test_pause_at_the_end_is_not_the_next_one_s(link: Connect) -> None:
    """A client that is slow to take the end of a response stops nobody else's."""
    async with link(OK) as it:
        response = await it.open()

        def sink(_: bytes, last: bool) -> None:
            assert last
            response.pause()

        await response.pump(sink)
        async with asyncio.timeout(5):
            assert (await it.fetch()).body == b"ok"
            response.pause()
            assert (await it.fetch()).body == b"ok"
        assert it.up.connections == 1


@pytest.mark.parametrize("size", [70_000, 200_000, 5_000_000])
async def test_connection_in_the_pool_is_not_paused(link: Connect, size: int) -> None:
    """A response that had to wait to be taken, or was whole before, leaves a connection that
    reads."""
    body = bytes(size)
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + body
    async with link(raw) as it:
        for _ in range(5):
            async with asyncio.timeout(5):
                response = await it.open()
                await asyncio.sleep(0.02)
                assert (await read(response)).body == body
        assert it.up.connections == 1


async def test_unfinished_upload_is_not_followed_by_another_request(link: Connect) -> None:
    """A response that is over before its request is ends the connection."""

    async def rest() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(3600)

    body = Body([(b"content-length", b"100")], b"", rest)
    async with link(OK, read_body=False) as it:
        assert (await it.fetch("POST", body)).body == b"ok"
        await until(lambda: it.transport.open_connections == 0)


# Over TLS, uvloop does not tell what waits in its socket.
@pytest.mark.parametrize("kind", ["tcp", "unix"], indirect=True)
async def test_upload_that_waits_in_the_socket_is_unfinished(link: Connect) -> None:
    """A request that the upstream answered without reading leaves no connection to use."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await asyncio.sleep(3600)

    async with link(serve, read_body=False) as it:
        for count in (1, 2):
            assert (await it.fetch("POST", sized(bytes(32 * MEBIBYTE)))).body == b"ok"
            assert it.up.connections == count
            assert it.transport.open_connections == 0


# A second try


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
@pytest.mark.parametrize("close", [asyncio.StreamWriter.close, reset], ids=["closed", "reset"])
async def test_idempotent_request_is_sent_twice(
    link: Connect, method: str, close: Callable[[asyncio.StreamWriter], None]
) -> None:
    """A request that changes nothing by being sent again is, once, on a fresh connection."""
    dead = 1

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dead
        if dead:
            dead -= 1
            close(writer)
        else:
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with link(serve) as it:
        assert (await it.fetch(method)).status_code == 204
        assert (len(it.up.received), it.up.connections) == (2, 2)
        dead = 2
        with pytest.raises(UpstreamError):
            await it.fetch(method)
        assert (len(it.up.received), it.up.connections) == (4, 3)


@pytest.mark.parametrize(
    ("method", "body"),
    [
        pytest.param("POST", sized(b"{}"), id="POST"),
        pytest.param("POST", None, id="POST without a body"),
        pytest.param("PATCH", None, id="PATCH"),
        pytest.param("PUT", sized(b"{}"), id="PUT with a body"),
    ],
)
async def test_request_that_may_have_been_acted_on_is_not_sent_twice(
    link: Connect, method: str, body: Body | None
) -> None:
    """Whoever pays for a request pays once."""
    answer = iter([OK])

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(next(answer, b""))
        if len(it.up.received) > 1:
            writer.close()

    async with link(serve) as it:
        await it.fetch(method, body)
        with pytest.raises(UpstreamError) as caught:
            await it.fetch(method, body)
        assert caught.value.fault is UpstreamFault.STALE_CONNECTION
        assert len(it.up.received) == 2


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
async def test_request_of_which_no_byte_was_written_goes_elsewhere(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
    """A connection that breaks at the first write has shown the upstream nothing."""
    path = str(tmp_path / "x.sock")
    async with nothing_left():
        with socket.socket(family) as listener:
            listener.bind(path if family == socket.AF_UNIX else ("127.0.0.1", 0))
            listener.listen()
            unix = family == socket.AF_UNIX
            url = f"unix:{path}" if unix else f"http://127.0.0.1:{listener.getsockname()[1]}"
            transport = Transport(url, Timeouts())
            it = Link(transport, Upstream(url, 0))

            def answer() -> tuple[socket.socket, bytes]:
                connection, _ = listener.accept()
                request = connection.recv(65536)
                connection.sendall(OK)
                return connection, request

            first, _ = await asyncio.gather(
                asyncio.to_thread(answer), it.fetch("POST", sized(b"first"))
            )
            answering = asyncio.get_running_loop().run_in_executor(None, answer)
            # It breaks while the loop is not looking, nor does it before the request is written.
            first[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            first[0].close()
            body = chunked(b"b", b"c", first=b"a")
            fetched = await it.fetch("POST", body)
            second = await answering
            assert fetched.body == b"ok"
            assert second[1].startswith(b"POST /x HTTP/1.1\r\n")
            second[0].close()
            await transport.aclose()


# Time


async def test_connect_timeout(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """A handshake that nobody answers ends in time."""
    async with nothing_left():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            transport = Transport(url, Timeouts(connect_s=0.1), tls=client_tls)
            with pytest.raises(UpstreamError) as caught:
                await transport.open("GET", b"/", [], None)
            assert caught.value.fault is UpstreamFault.CONNECT_TIMEOUT
            assert transport.open_connections == 0


@pytest.mark.parametrize(
    "body", [None, sized(b"{}"), chunked(b"{}")], ids=["no", "sized", "chunked"]
)
async def test_first_byte_timeout(link: Connect, body: Body | None) -> None:
    """An upstream that does not answer is not waited for for ever; a 1xx is no answer."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await asyncio.sleep(3600)

    async with link(serve, first_byte_s=0.05) as it:
        with pytest.raises(UpstreamError) as caught:
            await it.open("POST", body)
        assert caught.value.fault is UpstreamFault.FIRST_BYTE_TIMEOUT
        await until(lambda: it.transport.open_connections == 0)
        assert len(it.up.received) == 1


async def test_first_byte_timeout_begins_with_the_end_of_the_request(link: Connect) -> None:
    """A client that takes its time to send is not the upstream's fault."""

    async def rest() -> AsyncIterator[bytes]:
        for _ in range(6):
            await asyncio.sleep(0.05)
            yield b"x"

    async with link(OK, first_byte_s=0.2) as it:
        body = Body([(b"content-length", b"6")], b"", rest)
        assert (await it.fetch("POST", body)).body == b"ok"
        await asyncio.sleep(0.25)  # the timer is gone


def endless() -> Body:
    async def rest() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    return Body([(b"transfer-encoding", b"chunked")], b"", rest)


def all_but_read(size: int) -> Body:
    """Make a body of which the last bytes stay in the buffer of a socket that is not read."""

    async def rest() -> AsyncIterator[bytes]:
        yield bytes(size)

    return Body([(b"content-length", b"%d" % size)], b"", rest)


@pytest.mark.parametrize("waits_in", ["the client", "the buffer"])
async def test_send_timeout(link: Connect, waits_in: str) -> None:
    """An upstream that takes nothing of a request is not waited for for ever, also where all of
    the request is written."""
    stop = asyncio.Event()

    async def serve(_: Received, __: asyncio.StreamReader, ___: asyncio.StreamWriter) -> None:
        await stop.wait()

    async with link(serve, read_body=False, send_s=0.3) as it:
        body = endless() if waits_in == "the client" else all_but_read(16 * MEBIBYTE)
        async with asyncio.timeout(10):
            with pytest.raises(UpstreamError) as caught:
                await it.open("POST", body)
        assert caught.value.fault is UpstreamFault.SEND_TIMEOUT
        await until(lambda: it.transport.open_connections == 0)
        stop.set()


async def test_send_timeout_is_not_for_an_upstream_that_is_slow(link: Connect) -> None:
    """However long it takes, as long as it takes something; nor while the client is slow."""
    size = 16 * MEBIBYTE

    async def rest() -> AsyncIterator[bytes]:
        for _ in range(16):
            yield bytes(MEBIBYTE)
        await asyncio.sleep(0.6)
        yield b"x"

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for _i in range(16):
            await reader.readexactly(MEBIBYTE)
            await asyncio.sleep(0.1)
        await reader.readexactly(1)
        writer.write(OK)

    async with link(serve, read_body=False, send_s=0.5) as it:
        body = Body([(b"content-length", b"%d" % (size + 1))], b"", rest)
        assert (await it.fetch("POST", body)).body == b"ok"


async def test_send_timeout_does_not_cut_an_answer(link: Connect) -> None:
    """An upstream that has answered may leave the rest of the request where it is."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 10\r\n\r\n")
        for _i in range(10):
            await asyncio.sleep(0.06)
            writer.write(b"x")
        await asyncio.sleep(3600)

    async with link(serve, read_body=False, send_s=0.2) as it:
        answer = await it.fetch("POST", endless())
        assert (answer.status_code, answer.body) == (413, b"x" * 10)


@pytest.mark.parametrize("way", ["pump", "chunks"])
async def test_idle_timeout(link: Connect, way: str) -> None:
    """A body that stops coming ends in a fault, one that comes slowly does not."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")
        for _i in range(5):
            await asyncio.sleep(0.05)
            writer.write(b"x")
        await asyncio.sleep(3600)

    async with link(serve, idle_s=0.15) as it:
        response = await it.open()
        pieces: list[bytes] = []
        with pytest.raises(UpstreamError) as caught:
            await take(response, way, pieces)
        assert caught.value.fault is UpstreamFault.IDLE_TIMEOUT
        assert b"".join(pieces) == b"xxxxx"


async def test_idle_timeout_does_not_count_a_slow_client(link: Connect) -> None:
    """While the reader is paused, and while the request is still sent, nothing is late."""

    async def rest() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0.3)
        yield b"b"

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
        await reader.readexactly(2)
        writer.write(b"ok")

    async with link(serve, read_body=False, idle_s=0.1) as it:
        response = await it.open("POST", Body([(b"content-length", b"2")], b"", rest))
        loop = asyncio.get_running_loop()
        pieces: list[bytes] = []

        def sink(piece: bytes, _: bool) -> None:
            pieces.append(piece)
            response.pause()
            loop.call_later(0.4, response.resume)

        async with asyncio.timeout(5):
            await response.pump(sink)
        assert b"".join(pieces) == b"okok"


# Back-pressure


async def test_pause_before_the_pump_holds(link: Connect) -> None:
    """A response that was paused before anything is pumped stays so until it is resumed."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"late")

    async with link(serve) as it:
        response = await it.open()
        response.pause()
        pieces: list[bytes] = []
        pumping = asyncio.create_task(response.pump(lambda piece, _: pieces.append(piece)))
        await asyncio.sleep(0.15)
        assert pieces == []
        response.resume()
        await asyncio.wait_for(pumping, 5)
        assert pieces == [b"late"]


async def test_body_that_nobody_takes_stops_the_upstream(link: Connect) -> None:
    """What is held of a body has a bound, before it is taken and while it is paused."""
    sent = 0

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(65536))
            sent += 65536
            await writer.drain()

    async def stalled() -> int:
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.05)
        return sent

    async with link(serve) as it:
        response = await it.open()
        assert await stalled() < 16 * MEBIBYTE
        got = 0

        def sink(piece: bytes, _: bool) -> None:
            nonlocal got
            got += len(piece)
            response.pause()

        pumping = asyncio.create_task(response.pump(sink))
        before = await stalled()
        for _ in range(3):
            response.resume()
            assert await stalled() - before < 16 * MEBIBYTE
            before = sent
        assert got < sent
        response.close()
        with pytest.raises(UpstreamError):
            await pumping


async def test_held_pieces_cost_no_more_the_more_there_are(link: Connect) -> None:
    """Many small pieces that nobody takes are held and counted one by one."""
    chunk = b"1\r\nx\r\n"

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _i in range(4000):
            writer.write(chunk)
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    async with link(serve) as it:
        response = await it.open()
        await asyncio.sleep(0.5)
        assert (await read(response)).body == b"x" * 4000


async def test_upload_that_nobody_reads_stops_the_client(link: Connect) -> None:
    """What is taken from the client is bounded by what the upstream takes."""
    taken = 0

    async def rest() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 65536
            yield bytes(65536)

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with link(serve, read_body=False) as it:
        body = Body([(b"transfer-encoding", b"chunked")], b"", rest)
        opening = asyncio.create_task(it.open("POST", body))
        before = -1
        while taken != before:
            before = taken
            await asyncio.sleep(0.1)
        assert 0 < taken < 16 * MEBIBYTE
        opening.cancel()
        await asyncio.wait([opening])
        assert it.transport.open_connections == 0


# Requests


async def test_request_on_the_wire(link: Connect) -> None:
    """Target, order and repeats go out as they are; a body that is there goes with the head."""
    async with link(OK) as it:
        headers = [(b"host", b"a"), (b"x-b", b"1"), (b"x-a", b"caf\xe9"), (b"x-b", b""),
                   (b"content-length", b"2")]  # fmt: skip
        response = await it.transport.open("POST", b"//a%2Fb?", headers, Body((), b"{}"))
        await read(response)
        (seen,) = it.up.received
        assert seen.line == b"POST //a%2Fb? HTTP/1.1"
        assert seen.headers == headers
        assert seen.body == b"{}"


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        (b"/ HTTP/1.1\r\nx: 1\r\n\r\nGET /", []),
        (b"/", [(b"x", b"1\r\ny: 2")]),
        (b"/", [(b"x", b"1\ny: 2")]),
        (b"/", [(b"x", b"1\ry: 2")]),
        (b"/", [(b"x: 1\r\ny", b"2")]),
    ],
)
async def test_line_break_in_a_head_is_refused(
    link: Connect, target: bytes, headers: RawHeaders
) -> None:
    """Nothing that is given as one request goes out as two."""
    async with link(OK) as it:
        with pytest.raises(UpstreamError) as caught:
            await it.transport.open("GET", target, headers, None)
        assert caught.value.fault is UpstreamFault.MALFORMED_REQUEST
        assert it.up.connections == 0


@pytest.mark.parametrize("first", [b"", b"first "], ids=["nothing first", "some first"])
@pytest.mark.parametrize("pieces", [[], [b"one ", b"two"], [bytes(300_000)] * 20])
@pytest.mark.parametrize("framed", ["length", "chunked"])
async def test_streamed_upload(
    link: Connect, framed: str, pieces: list[bytes], first: bytes
) -> None:
    """A body goes out as it comes, framed as its sender framed it."""
    body = chunked(*pieces, first=first)
    whole = first + b"".join(pieces)
    if framed == "length":
        body.framing = [(b"content-length", b"%d" % len(whole))]
    async with link(OK) as it:
        for _ in range(2):
            assert (await it.fetch("POST", body)).body == b"ok"
        assert [received.body for received in it.up.received] == [whole] * 2
        assert it.up.connections == 1


async def test_empty_body_is_one_write(link: Connect) -> None:
    """A body in chunks that is there already ends with the head."""
    async with link(OK) as it:
        body = Body([(b"transfer-encoding", b"chunked")], b"hi")
        assert (await it.fetch("POST", body)).body == b"ok"
        assert it.up.received[0].body == b"hi"
        body = Body([(b"transfer-encoding", b"chunked")])
        assert (await it.fetch("POST", body)).body == b"ok"
        assert it.up.received[1].body == b""


async def test_body_that_raises(link: Connect) -> None:
    """What the body raises reaches whoever waits for the response, and ends the connection."""

    async def rest() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(0.01)
        raise LookupError("gone")

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")
        await reader.readexactly(9)

    body = Body([(b"content-length", b"9")], b"", rest)

    async def never(_: Received, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.readexactly(9)

    async with link(never, read_body=False) as it:
        with pytest.raises(LookupError):
            await it.open("POST", body)
        await until(lambda: it.transport.open_connections == 0)
    async with link(serve, read_body=False) as it:
        response = await it.open("POST", body)
        with pytest.raises(LookupError):
            await response.pump(lambda *_: None)
        assert it.transport.open_connections == 0


async def test_early_refusal_reaches_the_client(link: Connect) -> None:
    """A server that refuses a body, and closes without having read it, is heard."""
    refusal = b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig"

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(refusal)
        writer.close()

    async def rest() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(65536)
            await asyncio.sleep(0)

    async with link(serve, read_body=False) as it:
        for _ in range(50):
            for framing in ((b"content-length", b"4194304"), (b"transfer-encoding", b"chunked")):
                fetched = await it.fetch("POST", Body([framing], b"", rest))
                assert (fetched.status_code, fetched.body) == (413, b"big")
        assert it.transport.open_connections == 0


async def test_refusal_is_read_before_the_next_piece_is_written(link: Connect) -> None:
    """A write that breaks the connection does not cost the answer that is there already."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await asyncio.sleep(3600)

    async def rest() -> AsyncIterator[bytes]:
        yield b"x"
        await until(lambda: writers)
        writer = writers.pop()
        writer.write(b"HTTP/1.1 413 Big\r\ncontent-length: 3\r\n\r\nbig")
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        # The loop does not look at the socket before all of this is written.
        for _ in range(10):
            yield b"x"

    async with link(serve, read_body=False) as it:
        body = Body([(b"transfer-encoding", b"chunked")], b"", rest)
        fetched = await it.fetch("POST", body)
        assert (fetched.status_code, fetched.body) == (413, b"big")


async def test_early_answer_does_not_end_the_upload(link: Connect) -> None:
    """An answer that begins before the request is over goes on together with it."""

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n")
        for _i in range(10):
            writer.write(await reader.readexactly(1))

    went = asyncio.Event()

    async def rest() -> AsyncIterator[bytes]:
        for i in range(10):
            await went.wait()
            went.clear()
            yield b"%d" % i

    async with link(serve, read_body=False) as it:
        body = Body([(b"content-length", b"10")], b"", rest)
        response = await it.open("POST", body)
        pieces: list[bytes] = []

        def sink(piece: bytes, _: bool) -> None:
            pieces.append(piece)
            went.set()

        went.set()
        await response.pump(sink)
        assert b"".join(pieces) == b"0123456789"
        assert it.transport.open_connections == 1, "both are whole"


# Taking a response


async def test_sink_that_raises(link: Connect) -> None:
    """What `sink` raises, `pump` raises; it is not called again, and the loop hears nothing."""
    calls = 0

    def sink(_: bytes, __: bool) -> None:
        nonlocal calls
        calls += 1
        raise LookupError("gone")

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _i in range(10):
            await asyncio.sleep(0)
            writer.write(b"1\r\nx\r\n")
        writer.write(b"0\r\n\r\n")

    async with link(serve) as it:
        response = await it.open()
        with pytest.raises(LookupError):
            await response.pump(sink)
        await asyncio.sleep(0.01)
        assert calls == 1
        response.close()
    async with link(OK) as it:
        response = await it.open()
        await until(lambda: response.ended)
        with pytest.raises(LookupError):
            await response.pump(sink)


async def test_sink_is_not_called_when_nobody_waits(link: Connect) -> None:
    """After `pump` was cancelled, what still comes is nobody's."""
    calls: list[bytes] = []
    more = asyncio.Event()

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no")
        await more.wait()
        writer.write(b"k")

    async with link(serve) as it:
        response = await it.open()
        pumping = asyncio.create_task(response.pump(lambda piece, _: calls.append(piece)))
        await until(lambda: calls)
        more.set()
        await asyncio.sleep(0)  # the last byte is on its way
        pumping.cancel()
        await asyncio.wait([pumping])
        await asyncio.sleep(0.01)
        assert calls == [b"o"]
        response.close()


@pytest.mark.parametrize("way", ["pump", "chunks"])
async def test_closing_a_response(link: Connect, way: str) -> None:
    """`close` may be called at any time and twice; who waits for the body is told."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
        await asyncio.sleep(3600)

    async with link(serve) as it:
        response = await it.open()
        response.close()
        response.close()
        assert it.transport.open_connections == 0
        response.pause()
        response.resume()
        with pytest.raises(UpstreamError):
            await take(response, way, [])
        response = await it.open()
        taking = asyncio.create_task(take(response, way, []))
        await asyncio.sleep(0.01)
        response.close()
        with pytest.raises(UpstreamError):
            await taking
        assert it.transport.open_connections == 0
    async with link(OK) as it:
        response = await it.open()
        await take(response, way, [])
        response.close()
        response.close()
        assert it.transport.open_connections == 1


async def test_closing_from_within_the_sink(link: Connect) -> None:
    """A sink may find that nobody wants the rest."""
    async with link(OK + OK) as it:
        response = await it.open()
        await response.pump(lambda *_: response.close())
    async with link(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok") as it:
        response = await it.open()
        with pytest.raises(UpstreamError):
            await response.pump(lambda *_: response.close())
        assert it.transport.open_connections == 0


async def test_chunks(link: Connect) -> None:
    """Iteration brings the whole body, slowly or fast, and may be left at any time."""
    data = os.urandom(MEBIBYTE)
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data
    async with link(raw) as it:
        for delay in (None, 0.0, 0.001):
            response = await it.open()
            body = b""
            async for piece in response.chunks():
                body += piece
                if delay is not None:
                    await asyncio.sleep(delay)
            assert body == data
            response.close()
        assert it.up.connections == 1
        response = await it.open()
        chunks = response.chunks()
        await anext(chunks)
        await chunks.aclose()
        response.close()
        assert it.transport.open_connections == 0


async def test_closing_the_transport(link: Connect) -> None:
    """It cuts what runs, and closes what is idle."""
    begun = asyncio.Event()

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(it.up.received) == 1:
            writer.write(OK)
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok")
        begun.set()

    async with link(serve) as it:
        tasks = [asyncio.create_task(it.fetch())]
        await asyncio.wait(tasks)
        tasks += [asyncio.create_task(it.fetch()) for _ in range(2)]
        await begun.wait()
        await it.transport.aclose()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], Fetched)
        assert all(isinstance(result, UpstreamError) for result in results[1:])
        assert it.transport.open_connections == 0


# TLS


@pytest.mark.parametrize("kind", ["tls"], indirect=True)
@pytest.mark.parametrize("polite", [True, False], ids=["close_notify", "no close_notify"])
async def test_body_that_is_paused_when_the_connection_ends(link: Connect, *, polite: bool) -> None:
    """All that was sent before the end comes, also where the reader was paused at the end."""
    data = bytes(30_000)

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (10 * len(data)))
        for _i in range(10):
            writer.write(data)
            await asyncio.sleep(0.005)
        if polite:
            writer.close()
        else:
            writer.transport.abort()

    async with link(serve) as it:
        response = await it.open()
        loop = asyncio.get_running_loop()
        size = 0

        def sink(piece: bytes, _: bool) -> None:
            nonlocal size
            size += len(piece)
            response.pause()
            loop.call_later(0.1, response.resume)

        await response.pump(sink)
        assert size == 10 * len(data)


async def test_untrusted_certificate(server_tls: ssl.SSLContext) -> None:
    """A certificate of an authority that nobody named is refused, and it is said why."""
    async with nothing_left(), upstream(OK, tls=server_tls) as up:
        transport = Transport(up.url, Timeouts())
        with pytest.raises(UpstreamError, match="certificate verify failed") as caught:
            await transport.open("GET", b"/", [], None)
        assert caught.value.fault is UpstreamFault.CONNECT_FAILED
        assert transport.open_connections == 0
        assert up.received == []


async def test_certificate_of_another(authority: Authority, client_tls: ssl.SSLContext) -> None:
    """A certificate of another host is refused, and it is said whose it is not."""
    tls = authority.server("other.test")
    async with nothing_left(), upstream(OK, tls=tls) as up:
        for url in (up.url, up.url.replace("127.0.0.1", "localhost")):
            transport = Transport(url, Timeouts(), tls=client_tls)
            with pytest.raises(UpstreamError, match="is not valid for") as caught:
                await transport.open("GET", b"/", [], None)
            assert caught.value.fault is UpstreamFault.CONNECT_FAILED
            assert transport.open_connections == 0


async def test_tls_where_there_is_none(client_tls: ssl.SSLContext) -> None:
    """An upstream that does not speak TLS cannot be reached with https."""
    async with nothing_left():
        async with upstream(OK) as up:
            transport = Transport(up.url.replace("http:", "https:"), Timeouts(), tls=client_tls)
            opening = asyncio.create_task(transport.open("GET", b"/", [], None))
            await asyncio.sleep(0.05)
            opening.cancel()  # the server waits for the end of a head
            await asyncio.wait([opening])
            assert transport.open_connections == 0

        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport = Transport(f"https://127.0.0.1:{port}", Timeouts(), tls=client_tls)
        with pytest.raises(UpstreamError, match=r".+") as caught:
            await transport.open("GET", b"/", [], None)
        assert caught.value.fault is UpstreamFault.CONNECT_FAILED
        assert transport.open_connections == 0
        server.close()


# Addresses


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_address_families(
    host: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, *, encrypted: bool
) -> None:
    """IPv4 and IPv6 addresses can be given as such."""
    tls = server_tls if encrypted else None
    async with nothing_left(), upstream(OK, host=host, tls=tls) as up:
        transport = Transport(up.url, Timeouts(), tls=client_tls)
        assert (await Link(transport, up).fetch()).body == b"ok"
        await transport.aclose()
    name = f"[{host}]" if ":" in host else host
    assert transport.authority == f"{name}:{up.port}".encode()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_name_with_two_addresses(
    host: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    *,
    encrypted: bool,
) -> None:
    """`localhost` is found where its server listens on one of its addresses alone."""
    resolve = uvloop.Loop.getaddrinfo

    async def both(loop: uvloop.Loop, name: str, port: int, **options: Any) -> list[Any]:
        if name != "localhost":
            return await resolve(loop, name, port, **options)
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", both)
    tls = server_tls if encrypted else None
    async with nothing_left(), upstream(OK, host=host, tls=tls) as up:
        url = f"{'https' if encrypted else 'http'}://localhost:{up.port}"
        transport = Transport(url, Timeouts(), tls=client_tls)
        assert (await Link(transport, up).fetch()).body == b"ok"
        await transport.aclose()
    with pytest.raises(UpstreamError) as caught:
        await transport.open("GET", b"/", [], None)
    assert caught.value.fault is UpstreamFault.CONNECT_FAILED


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "https://127.0.0.1:1", "unix:/nowhere.sock", "http://no name:1"]
)
async def test_nobody_listens(url: str) -> None:
    """An upstream that is not there is CONNECT_FAILED, with the system's words."""
    async with nothing_left():
        transport = Transport(url, Timeouts())
        with pytest.raises(UpstreamError, match=r"\w \w") as caught:
            await transport.open("GET", b"/", [], None)
        assert caught.value.fault is UpstreamFault.CONNECT_FAILED
        assert transport.open_connections == 0


async def test_cancelled_look_up_of_a_name_that_is_not_found() -> None:
    """The loop has nothing to say of a name that is not found after nobody waits for it."""
    async with nothing_left():
        transport = Transport("http://no name:1", Timeouts())
        for steps in range(4):
            opening = asyncio.create_task(transport.open("GET", b"/", [], None))
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait([opening])
        with pytest.raises(UpstreamError):  # by then the others are answered, too
            await transport.open("GET", b"/", [], None)


# The door for httpx


async def test_httpx(link: Connect) -> None:
    """An httpx client speaks through it."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"0123456789" * 1000

    async def serve(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        body = received.body or b"nothing"
        writer.write(CHUNKED.replace(b"\r\n\r\n", b"\r\nset-cookie: a\r\nset-cookie: b\r\n\r\n"))
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    async with (
        link(serve) as it,
        httpx.AsyncClient(
            transport=it.transport, trust_env=False, base_url="http://llm.test"
        ) as client,
    ):
        answer = await client.get("/a", params={"q": "1 2"}, headers={"x-a": "1"})
        assert (answer.status_code, answer.text) == (200, "nothing")
        assert answer.headers.get_list("set-cookie") == ["a", "b"]
        answer = await client.post("/b", json={"model": "m"})
        assert answer.json() == {"model": "m"}
        answer = await client.post("/c", content=pieces())
        assert answer.content == b"0123456789" * 10_000
        async with client.stream("POST", "/d", content=pieces()) as streamed:
            assert b"".join([piece async for piece in streamed.aiter_raw()]) == answer.content
        async with client.stream("POST", "/e", content=pieces()) as streamed:
            pass  # the body is not wanted
        answer = await client.post("/f")
        assert answer.text == "nothing"
        request = client.build_request("GET", "/", extensions={"target": b"//x?"})
        await client.send(request)
        lines = [received.line for received in it.up.received]
        assert lines[0] == b"GET /a?q=1+2 HTTP/1.1"
        assert lines[-1] == b"GET //x? HTTP/1.1"
        assert it.up.received[0].values(b"host") == [b"llm.test"]
        assert it.up.received[2].values(b"transfer-encoding") == [b"chunked"]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        pytest.param(b"", httpx.ReadTimeout, id="no answer"),
        pytest.param(b"garbage\r\n", httpx.RemoteProtocolError, id="malformed"),
        pytest.param(CHUNKED + b"xx\r\n", httpx.RemoteProtocolError, id="malformed body"),
        pytest.param(CHUNKED + b"2\r\nok", httpx.ReadTimeout, id="half a body"),
    ],
)
async def test_httpx_errors(link: Connect, raw: bytes, error: type[Exception]) -> None:
    """Its faults are those of httpx."""
    async with (
        link(answers(raw), first_byte_s=0.1, idle_s=0.1) as it,
        httpx.AsyncClient(
            transport=it.transport, trust_env=False, base_url="http://llm.test"
        ) as client,
    ):
        with pytest.raises(error):
            await client.get("/")
        assert it.transport.open_connections == 0


async def test_httpx_write_timeout(link: Connect) -> None:
    """Of a request that nobody takes."""

    async def serve(_: Received, __: asyncio.StreamReader, ___: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with (
        link(serve, read_body=False, send_s=0.1) as it,
        httpx.AsyncClient(transport=it.transport, trust_env=False) as client,
    ):
        with pytest.raises(httpx.WriteTimeout):
            await client.post("http://llm.test/", content=endless())


async def test_httpx_connect_errors() -> None:
    """So are those of a connection that is not there, and of a request that is none."""
    transport = Transport("http://127.0.0.1:1", Timeouts())
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://llm.test/")
        with pytest.raises(httpx.LocalProtocolError):
            await client.get("http://llm.test/", headers={"x": "1\r\ny: 2"})


# Cancellation


async def _cancelled_at(step: int, work: Awaitable[Any]) -> bool:
    """Run something and cancel it at a step of the loop; return whether it was over before."""
    task = asyncio.ensure_future(work)
    for _ in range(step):
        if task.done():
            break
        await asyncio.sleep(0)
    finished = task.done()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return finished


def _slow_chunks() -> Body:
    return chunked(*[bytes(50_000)] * 5, first=b"x")


EXCHANGES: dict[str, Callable[[], Body | None]] = {
    "GET": lambda: None,
    "POST": lambda: sized(b"{}"),
    "upload": _slow_chunks,
}


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "pooled"])
@pytest.mark.parametrize("way", ["pump", "chunks", "httpx"])
@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_cancelled_anywhere(link: Connect, exchange: str, way: str, *, warm: bool) -> None:
    """Whenever an exchange is cancelled, nothing of it stays: no socket, no task, no entry."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in (b"HTTP/1.1 100 Continue\r\n\r\n", CHUNKED, b"2\r\nok\r\n", b"0\r\n\r\n"):
            writer.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def run() -> None:
        body = EXCHANGES[exchange]()
        if way == "httpx":
            framing = dict(body.framing) if body is not None else {}
            content = _content(body) if body is not None else None
            request = httpx.Request(
                "POST" if body else "GET", "http://llm.test/", headers=framing, content=content
            )
            answer = await it.transport.handle_async_request(request)
            try:
                assert await answer.aread() == b"ok"
            finally:
                await answer.aclose()
            return
        response = await it.open("POST" if body else "GET", body)
        try:
            if way == "pump":
                await response.pump(lambda *_: None)
            else:
                assert b"".join([piece async for piece in response.chunks()]) == b"ok"
        finally:
            response.close()

    for step in itertools.count(1):
        async with link(serve, first_byte_s=60.0, idle_s=60.0) as it:
            if warm:
                await run()
                assert it.transport.open_connections == 1
            finished = await _cancelled_at(step, run())
            pooled = it.transport.open_connections
            if finished:
                assert pooled == 1
                break
            # Cancelled, it holds no connection; one that had come to its end is in the pool.
            assert pooled == len(it.transport._pool._idle)
            # And the next one is not disturbed.
            await run()
    assert step > 5


async def _content(body: Body) -> AsyncIterator[bytes]:
    piece, more = body.take()
    if piece:
        yield piece
    if more:
        async for piece in body:
            yield piece


async def test_many_exchanges_of_which_some_are_cancelled(link: Connect) -> None:
    """After thousands of exchanges, cancelled at random or not, there is what there was."""

    async def serve(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await asyncio.sleep(0)
        writer.write(CHUNKED + b"2\r\nok\r\n")
        await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    async def worker(number: int) -> None:
        for i in range(60):
            work = it.fetch("POST", sized(b"x" * 100)) if i % 2 else it.fetch()
            if i % 3:
                assert (await work).body == b"ok"
            else:
                await _cancelled_at((i * 7 + number) % 23, work)

    async with link(serve) as it:
        await asyncio.gather(*(worker(number) for number in range(32)))
        assert it.transport.open_connections == len(it.transport._pool._idle) <= 32


# An upstream on a Unix socket, as it is run


async def test_uvicorn_on_a_unix_socket(tmp_path: Path) -> None:
    """The sidecar relays to an upstream that listens on a Unix socket."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (scope["raw_path"], b" ", body):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body"})

    path = tmp_path / "litellm.sock"
    config = uvicorn.Config(app, uds=str(path), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    try:
        async with running(f"unix:{path}") as side:
            request = b"POST /v1/x%2F HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
            for _ in range(3):
                answer = await ask(side.host, request)
                assert (answer.status, answer.body) == (200, b"/v1/x%2F hello")
                assert answer.complete
            await side.sidecar.upstream.probe(5)
    finally:
        server.should_exit = True
        await serving


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test makes asyncio or uvloop log something, but of its own upstream."""
    yield
    records = [r for r in caplog.get_records("call") if r.filename != "streams.py"]
    assert [r.getMessage() for r in records if r.name == "asyncio"] == []
