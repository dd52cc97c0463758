"""The client's end of the wire, on real sockets: limits, timers, order, and the end of things."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from sidecar.exchange import RefusalReason as R
from sidecar.proxy.edge import Edge, downstream_of
from tests.support.edges import App, Served, answering, read_body, serving
from tests.support.running import running, until
from tests.support.wire import Client, ask, connected, upstream

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client does is no fault of ours to be logged."""
    yield
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not loud


def get(target: bytes = b"/", *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"GET " + target + b" HTTP/" + version, b"Host: llm.test", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(*headers: bytes, target: bytes = b"/", body: bytes | None = None) -> bytes:
    """Write a request; a body given comes with its length."""
    lines = [b"POST " + target + b" HTTP/1.1", b"Host: llm.test", *headers]
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


@asynccontextmanager
async def one_client(
    make: Callable[[Served], App], **limits: float
) -> AsyncIterator[tuple[Served, Client]]:
    async with serving(make, **limits) as served, connected(served.address) as client:
        yield served, client


Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


def of(handler: Handler) -> Callable[[Served], App]:
    """Make an application of a function that does not care where it is served."""
    return lambda _: handler


class Holding:
    """An application that answers when told to, and notes that its client left."""

    def __init__(self, body: bytes = b"ok", *, begin: bytes | None = None) -> None:
        self.body = body
        self.begin = begin
        """Sent, with the head, before it waits."""
        self.targets: list[bytes] = []
        self.go = asyncio.Event()
        self.left = 0

    def __call__(self, _: Served) -> App:
        return self._run

    async def _run(self, scope: Scope, _: Receive, send: Send) -> None:
        client = downstream_of(scope)
        task = asyncio.current_task()
        assert task is not None
        client.on_left = self._leave
        self.targets.append(client.target)
        length = len(self.body) + len(self.begin or b"")
        headers = [(b"content-length", b"%d" % length)]
        if self.begin is not None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self.begin, "more_body": True})
        await self.go.wait()
        if self.begin is None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})

    def _leave(self) -> None:
        self.left += 1
        self.go.set()


# Refusals


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        pytest.param(b"GET /\r\n\r\n", 400, R.BAD_REQUEST, id="HTTP/0.9"),
        pytest.param(get(version=b"2.0"), 505, R.HTTP_VERSION, id="HTTP/2.0"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, R.HTTP_VERSION, id="h2"),
        pytest.param(b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", 501, R.CONNECT, id="CONNECT"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, R.BAD_HOST, id="no Host"),
        pytest.param(get(b"http:///"), 400, R.BAD_TARGET, id="no host in a URL"),
        pytest.param(
            post(b"Transfer-Encoding: gzip, chunked"), 501, R.UNKNOWN_TRANSFER_ENCODING, id="TE"
        ),
        pytest.param(
            get(b"/", CHUNKED, version=b"1.0"), 400, R.BAD_TRANSFER_ENCODING, id="TE in HTTP/1.0"
        ),
        pytest.param(get(b"/" + b"x" * 5000), 431, R.HEAD_TOO_LARGE, id="long target"),
        pytest.param(get(b"/", b"x: " + b"x" * 5000), 431, R.HEAD_TOO_LARGE, id="long header"),
        pytest.param(get(b"/" + b"x" * 5000)[:4900], 431, R.HEAD_TOO_LARGE, id="long half"),
        pytest.param(get(b"/", b"x: " + b"x" * (1 << 22)), 431, R.HEAD_TOO_LARGE, id="4 MB head"),
        pytest.param(post(CHUNKED) + b"x\r\n", 400, R.BAD_BODY, id="malformed chunk"),
        pytest.param(
            post(CHUNKED) + b"0\r\n" + b"x: y\r\n" * 1000, 431, R.HEAD_TOO_LARGE, id="trailers"
        ),
        # At once: more of it would not make it a request.
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, R.BAD_REQUEST, id="TLS"),
        pytest.param(b"GET / HTTP/1.1\nHost: x\n\n", 400, R.BAD_REQUEST, id="bare LF"),
        pytest.param(b"hello", 400, R.BAD_REQUEST, id="garbage"),
        pytest.param(b"A" * 25, 400, R.BAD_REQUEST, id="long method"),
    ],
)
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "byte by byte"])
async def test_refusal_is_answered_and_ends_the_connection(
    request_: bytes, status: int, reason: R, bytewise: bool
) -> None:
    """The client is told why, the refusal is counted, the application sees nothing whole."""
    async with one_client(answering(), max_head_bytes=4096) as (served, client):
        if bytewise:
            for at in range(min(len(request_), 10_000)):
                client.send(request_[at : at + 1])
                if at % 50 == 0:
                    await asyncio.sleep(0)
        else:
            client.send(request_)
        answer = await client.answer()
        assert (answer.status, answer.complete) == (status, True)
        assert answer.header(b"x-sidecar-error") == reason.value.encode()
        assert answer.header(b"connection") == b"close"
        assert await client.end() == b""
        assert served.refused == [reason]
        assert all(seen.body is None for seen in served.seen)


async def test_header_count_is_bounded() -> None:
    """Also where the head is not too long."""
    async with one_client(answering(), max_head_bytes=1 << 20) as (served, client):
        answer = await client.ask(get(b"/", *[b"a:"] * 5000))
        assert (answer.status, served.refused) == (431, [R.HEAD_TOO_LARGE])


@pytest.mark.parametrize("at", [1, 3, 4, 10, 16, 20, len(get()) - 1])
async def test_half_a_head_is_waited_for(at: int) -> None:
    """Wherever a head is cut, the rest makes it a request."""
    async with one_client(answering()) as (served, client):
        client.send(get()[:at])
        await asyncio.sleep(0.02)
        client.send(get()[at:])
        assert (await client.answer()).status == 200
        assert not served.refused


async def test_empty_lines_before_a_request_are_skipped() -> None:
    """Old clients send CR LF behind a body."""
    async with one_client(answering()) as (served, client):
        for request in (b"\r\n\r\n" + get(b"/1"), b"\r\n", b"\r\n" + get(b"/2")):
            client.send(request)
            await asyncio.sleep(0.01)
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        assert [seen.target for seen in served.seen] == [b"/1", b"/2"]


async def test_target_of_nearly_64_kib() -> None:
    """The default bound lets pass four times what LiteLLM's own server takes in pieces."""
    target = b"/" + b"x" * 65_000
    async with one_client(answering()) as (served, client):
        assert (await client.ask(get(target))).status == 200
        assert served.seen[0].target == target


# Upgrades and bodies

SMUGGLED = get(b"/smuggled") + b"\r\n\r\nx"
OFFERS = {
    "h2c": (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"),
    "h2": (b"Upgrade: HTTP/2.0, SHTTP/1.3", b"Connection: upgrade"),
    "websocket": (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x"),
    "none": (),
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("step", [1, 7, 0], ids=["byte by byte", "7 bytes", "whole"])
async def test_bodies_arrive_whole_however_they_come(offer: str, framing: str, step: int) -> None:
    """Also behind the offer of an upgrade, which is ignored; trailers never become headers."""
    if framing == "length":
        raw = post(*OFFERS[offer], body=SMUGGLED)
    else:
        end = b"0\r\nX-Trailer: 1\r\nAuthorization: Bearer sk-forged\r\n\r\n"
        raw = post(*OFFERS[offer], CHUNKED) + chunks(SMUGGLED[:5], SMUGGLED[5:], end=end)
    raw += get(b"/next")
    async with one_client(answering()) as (served, client):
        for at in range(0, len(raw), step or len(raw)):
            client.send(raw[at : at + (step or len(raw))])
            await asyncio.sleep(0)
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        assert [(seen.target, seen.body) for seen in served.seen] == [
            (b"/", SMUGGLED),
            (b"/next", b""),
        ]
        names = [name for name, _ in served.seen[0].headers]
        assert not {b"upgrade", b"x-trailer", b"authorization"} & set(names)


async def test_trailers_that_come_late_are_no_headers() -> None:
    """Neither those that come after the application has begun."""
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await answering()(Served())(scope, receive, send)

    async with one_client(of(app)) as (_, client):
        client.send(post(CHUNKED) + chunks(b"abc", end=b""))
        await until(lambda: scopes)
        assert (await client.ask(b"0\r\nX-Trailer: 1\r\n\r\n")).status == 200
        assert [name for name, _ in scopes[0]["headers"]] == [b"host", b"transfer-encoding"]


# Pipelining


@pytest.mark.parametrize("count", [2, 50])
async def test_pipelined_requests_are_answered_in_order(count: int) -> None:
    """All in one segment, with bodies of every framing between them."""
    kinds = [
        get(b"/%d"),
        post(target=b"/%d", body=b"abc"),
        post(CHUNKED, target=b"/%d") + chunks(b"abc\r\n\r\n", end=b"0\r\nx: y\r\n\r\n"),
    ]
    raw = b"".join(kinds[number % 3] % number for number in range(count))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        target = downstream_of(scope).target
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": target})

    async with one_client(of(app)) as (served, client):
        client.send(raw)
        bodies = [(await client.answer()).body for _ in range(count)]
        assert bodies == [b"/%d" % number for number in range(count)]
        assert not served.refused


async def test_next_request_is_not_begun_before_the_answer() -> None:
    """One at a time, and what comes piece by piece stays in order."""
    app = Holding()
    async with one_client(app) as (_, client):
        client.send(get(b"/1") + get(b"/2")[:9])
        await until(lambda: app.targets)
        client.send(get(b"/2")[9:])
        await asyncio.sleep(0.02)
        assert app.targets == [b"/1"]
        app.go.set()
        assert [(await client.answer()).body for _ in range(2)] == [b"ok", b"ok"]
        assert app.targets == [b"/1", b"/2"]


async def test_too_much_too_early_ends_with_the_answer() -> None:
    """More than a head is not kept: the answer comes whole, and the client has to ask again."""
    app = Holding()
    async with one_client(app, max_head_bytes=4096) as (_, client):
        client.send(get(b"/1") + post(target=b"/2", body=b"x" * 100_000))
        await until(lambda: app.targets)
        await asyncio.sleep(0.05)
        app.go.set()
        answer = await client.answer()
        assert (answer.body, answer.header(b"connection")) == (b"ok", b"close")
        assert await client.end() == b""
        assert app.targets == [b"/1"]


@pytest.mark.parametrize("early", [get(b"/2"), b"x" * 10_000], ids=["request", "too much"])
async def test_leaving_is_noticed_behind_pipelined_data(early: bytes) -> None:
    """What lies before the end of the connection does not hide it."""
    app = Holding()
    async with one_client(app, max_head_bytes=4096) as (_, client):
        client.send(get(b"/1") + early)
        await until(lambda: app.targets)
        client.writer.close()
        await until(lambda: app.left == 1)
        assert app.targets == [b"/1"]


# Leaving


@pytest.mark.parametrize("begin", [None, b"begun"], ids=["waiting", "mid-stream"])
@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
async def test_leaving_is_noticed(how: str, begin: bytes | None) -> None:
    """A client that closes, resets, or closes its sending side has left."""
    app = Holding(begin=begin)
    async with one_client(app) as (served, client):
        client.send(get())
        await until(lambda: app.targets)
        if how == "close":
            client.writer.close()
        elif how == "half-close":
            client.writer.write_eof()
        else:
            client.reset()
        await until(lambda: app.left == 1)
        await until(lambda: not served.state.connections)
        assert app.left == 1


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_is_noticed_while_the_upload_is_paused(how: str) -> None:
    """Behind an upload that the application does not take, the patrol finds it."""
    app = Holding()
    async with one_client(app) as (served, client):
        client.send(post(b"Content-Length: 100000000") + b"x" * 100_000)
        await until(lambda: app.targets and served.edge.flow.read_paused)
        client.send(b"x" * 20_000)  # not read, and yet the receive window is not full
        await asyncio.sleep(0.02)
        served.pass_time(1)
        assert app.left == 0
        client.reset() if how == "reset" else client.writer.close()
        await asyncio.sleep(0.05)
        served.pass_time(1)
        await until(lambda: app.left == 1)
        await until(lambda: not served.state.connections)


# Timers


async def test_slow_head() -> None:
    """A head has to come in time, counted from its first byte; a running one gets 408."""
    async with one_client(answering(), head_timeout_s=10) as (served, client):
        await client.ask(get())
        client.send(get()[:20])
        await until(lambda: served.edge._head)
        served.pass_time(9)
        client.send(get()[20:22])
        await asyncio.sleep(0.02)
        served.pass_time(9)
        assert not served.refused
        served.pass_time(11)
        assert (await client.answer()).status == 408
        assert await client.end() == b""
        assert served.refused == [R.SLOW_HEAD]


@pytest.mark.parametrize("framing", [b"Content-Length: 9", CHUNKED])
async def test_slow_body(framing: bytes) -> None:
    """A body may not stand still; while it comes, it may take its time."""
    async with one_client(answering(), stall_timeout_s=10) as (served, client):
        client.send(post(framing) + b"1\r\n")
        await until(lambda: served.state.tasks)
        served.pass_time(9)
        client.send(b"x")
        await asyncio.sleep(0.02)
        assert not served.refused
        served.pass_time(11)
        assert (await client.answer()).status == 408
        assert await client.end() == b""
        assert served.refused == [R.SLOW_BODY]
        await until(lambda: served.seen and served.seen[0].body is None)


@pytest.mark.parametrize("before", [b"", get()], ids=["silent from the start", "kept alive"])
async def test_idle_connection_is_closed(before: bytes) -> None:
    """Without a word, when its time is up; empty lines do not prolong it."""
    async with one_client(answering(), keep_alive_timeout_s=10) as (served, client):
        if before:
            await client.ask(before)
        await until(lambda: served.state.connections)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(0.02)
        client.send(b"\r\n\r\n")
        await asyncio.sleep(0.02)
        served.edge.check(began + 9)
        assert served.state.connections
        served.edge.check(began + 10.015)
        assert await client.end() == b""
        assert not served.refused


async def test_busy_connection_is_left_alone() -> None:
    """An answer takes as long as it takes."""
    app = Holding()
    limits = {"head_timeout_s": 1, "stall_timeout_s": 1, "keep_alive_timeout_s": 1}
    async with one_client(app, **limits) as (served, client):
        client.send(get() + b"GET /half")
        await until(lambda: app.targets)
        served.pass_time(86_400)
        app.go.set()
        assert (await client.answer()).body == b"ok"
        assert not served.refused


async def test_paused_upload_is_not_slow() -> None:
    """It is not the client that is slow where the application does not read; its time begins
    when the application reads again."""
    go = asyncio.Event()

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        await go.wait()
        await read_body(receive)

    async with one_client(of(app), stall_timeout_s=1) as (served, client):
        client.send(post(b"Content-Length: 200000") + b"x" * 100_000)
        await until(lambda: served.state.connections and served.edge.flow.read_paused)
        served.pass_time(100)
        go.set()
        await until(lambda: not served.edge.flow.read_paused)
        served.pass_time(100.5)
        assert not served.refused
        served.pass_time(102)
        assert served.refused == [R.SLOW_BODY]


BIG = 50_000_000


async def _endless(scope: Scope, _: Receive, send: Send) -> None:
    """Answer with more than any socket's buffer holds."""
    client = downstream_of(scope)
    left = asyncio.Event()
    client.on_left = left.set
    headers = [(b"content-length", b"%d" % BIG)] if scope["path"] == "/length" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    sent = 0
    while sent < BIG and not left.is_set():
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        sent += 100_000
        await asyncio.sleep(0)
    if not left.is_set():
        await send({"type": "http.response.body", "body": b""})


REQUESTS = {
    "length": get(b"/length"),
    "chunks": get(b"/"),
    "until close": get(b"/", version=b"1.0"),
}


@pytest.mark.parametrize("kind", REQUESTS)
async def test_client_that_does_not_read_is_cut(kind: str) -> None:
    """When it has taken nothing for the time; a client that takes little is left alone."""
    async with (
        serving(of(_endless), stall_timeout_s=10) as served,
        connected(served.address, limit=1) as client,
    ):
        client.send(REQUESTS[kind])
        await until(lambda: served.state.connections and served.edge.flow.write_paused)
        assert served.edge.transport.get_write_buffer_size() < 1_000_000
        served.pass_time(0)
        for _ in range(3):
            read = 0
            while read < 20_000_000 and served.edge.flow.write_paused:
                read += len(await client.reader.read(65536))
            await until(lambda: served.edge.flow.write_paused)
            served.pass_time(11)  # since it read last, no time has passed
            assert not served.refused
        served.pass_time(22)
        assert served.refused == [R.SLOW_READER]
        await until(lambda: not served.state.tasks and not served.state.connections)
        with pytest.raises(ConnectionError):
            await client.end()


async def test_buffer_that_is_as_full_as_before_is_not_stuck() -> None:
    """What the client took was written anew meanwhile."""
    async with (
        serving(of(_endless), stall_timeout_s=10) as served,
        connected(served.address, limit=1) as client,
    ):
        client.send(get())
        await until(lambda: served.state.connections and served.edge.flow.write_paused)
        served.pass_time(0)
        served.edge.resume_writing()
        served.edge.pause_writing()
        served.pass_time(11)
        assert not served.refused


# The number of connections


async def test_connection_limit() -> None:
    """One too many is told when to come again, and takes no place from those that come later."""
    async with serving(answering(), max_connections=2) as served:
        async with connected(served.address) as first, connected(served.address) as second:
            assert (await first.ask(get())).status == 200
            assert (await second.ask(get())).status == 200
            async with connected(served.address) as third, connected(served.address) as fourth:
                for client in (third, fourth):
                    answer = await client.ask(get())
                    assert (answer.status, answer.header(b"retry-after")) == (503, b"1")
                    assert answer.header(b"connection") == b"close"
                first.writer.close()
                await until(lambda: len(served.state.connections) == 1, timeout_s=1)
                assert (await ask(served.address, get())).status == 200
            assert (await second.ask(get())).status == 200
        assert served.refused == [R.TOO_MANY_CONNECTIONS] * 2


async def test_flood_at_the_connection_limit() -> None:
    """Connections beyond it are held for their clients to read why, but no more of them than a
    bound and no longer than for a while; all are counted."""
    async with serving(answering(), max_connections=0) as served, AsyncExitStack() as stack:
        served.listener.max_turned_away = 3
        clients = [await stack.enter_async_context(connected(served.address)) for _ in range(8)]
        await until(lambda: len(served.refused) == 8)
        assert len(served.listener.turned_away) == 3
        assert not served.state.connections
        answers = [await client.answer() for client in clients]
        assert sorted(answer.status for answer in answers) == [0] * 5 + [503] * 3
        served.pass_time(2.1)
        await until(lambda: not served.listener.turned_away)
        assert (await ask(served.address, get())).status == 503


async def test_file_descriptor_that_no_client_may_have() -> None:
    """A connection with one is turned away, like one beyond the limit."""
    async with serving(answering()) as served:
        served.listener.admits = lambda number: number < 0
        answer = await ask(served.address, get())
        assert (answer.status, answer.header(b"retry-after")) == (503, b"1")
        served.listener.admits = lambda number: number < 10_000
        assert (await ask(served.address, get())).status == 200


# Within a response


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(post(CHUNKED) + chunks(b"abc", end=b"x\r\n"), id="malformed chunk"),
        pytest.param(post(CHUNKED) + b"0\r\n" + b"x: y\r\n" * 20_000, id="endless trailers"),
    ],
)
async def test_nothing_is_written_into_a_running_response(bad: bytes) -> None:
    """The connection ends, short of the answer's length, and the application is told."""
    app = Holding(begin=b"begun")
    async with one_client(app) as (served, client):
        at = bad.index(b"\r\n\r\n") + 4
        client.send(bad[:at])
        await until(lambda: app.targets)
        client.send(bad[at:])
        answer = await client.answer()
        assert (answer.complete, answer.body) == (False, b"begun")
        assert app.left == 1
        assert len(served.refused) == 1


async def test_malformed_upload_before_the_answer_has_begun() -> None:
    """The client is told, and the application that it has left."""
    app = Holding()
    async with one_client(app) as (served, client):
        client.send(post(CHUNKED) + chunks(b"abc", end=b""))
        await until(lambda: app.targets)
        answer = await client.ask(b"x\r\n")
        assert (answer.status, served.refused) == (400, [R.BAD_BODY])
        assert app.left == 1
        assert await client.end() == b""


@pytest.mark.parametrize("garbage", [b"GET /next\n", b"\0\0", b"x" * 99_999])
async def test_garbage_behind_a_request_does_not_spoil_its_answer(garbage: bytes) -> None:
    """It is looked at when its turn comes, or dropped."""
    app = Holding()
    async with one_client(app) as (_, client):
        client.send(get() + garbage)
        await until(lambda: app.targets)
        app.go.set()
        answer = await client.answer()
        assert (answer.complete, answer.body) == (True, b"ok")


# Expect: 100-continue

EXPECT = post(b"Expect: 100-Continue", b"Content-Length: 5")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_100_is_sent_when_the_body_is_asked_for() -> None:
    """Once, and not before."""
    ask_for_it = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await ask_for_it.wait()
        body = await read_body(receive)
        await answering(body or b"", read=False)(Served())(scope, receive, send)

    async with one_client(of(app)) as (_, client):
        client.send(EXPECT)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), 0.1)
        ask_for_it.set()
        assert await client.reader.readexactly(len(CONTINUE)) == CONTINUE
        client.send(b"he")
        await asyncio.sleep(0.02)
        client.send(b"llo")
        assert (await client.answer()).body == b"hello"
        assert (await client.ask(get())).status == 200


async def test_http_1_0_has_no_100() -> None:
    """Such a client could not read it."""
    async with one_client(answering()) as (_, client):
        client.send(EXPECT.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await asyncio.sleep(0.05)
        client.send(b"hello")
        assert (await client.end()).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(EXPECT + b"hello", id="body sent unasked"),
        pytest.param(get(b"/", b"Expect: 100-continue"), id="no body"),
        pytest.param(post(b"Expect: 200-ok", body=b"hello"), id="other expectation"),
    ],
)
async def test_no_100_where_none_is_waited_for(request_: bytes) -> None:
    """Not where the body is here already, nor where there is none."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        assert (await waiting)["type"] == "http.disconnect"

    async with one_client(of(app)) as (_, client):
        client.send(request_)
        assert (await client.reader.readline()) == b"HTTP/1.1 200 OK\r\n"


async def test_early_answer_to_a_client_that_waits_for_100_closes() -> None:
    """What it sends next could be the body or a request."""
    async with one_client(answering(read=False, status=413)) as (_, client):
        answer = await client.ask(EXPECT)
        assert (answer.status, answer.header(b"connection")) == (413, b"close")
        client.send(get(b"/smuggled"))
        assert await client.end() == b""


# Answers that come before the end of the request


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_rest_of_an_upload_is_drained(framing: str) -> None:
    """The client reads the early answer when it has sent everything, and may go on."""
    body = b"x" * 20_000_000
    head = post(b"Content-Length: %d" % len(body)) if framing == "length" else post(CHUNKED)
    raw = body if framing == "length" else chunks(*[body[:1_000_000]] * 20)
    async with one_client(answering(read=False, status=413)) as (served, client):
        for _ in range(4):  # together more than is drained of one
            client.send(head + raw)
            await asyncio.wait_for(client.writer.drain(), 10)
            answer = await client.answer()
            assert (answer.status, answer.complete) == (413, True)
        assert (await client.ask(get(b"/next"))).status == 413
        assert [seen.target for seen in served.seen] == [b"/"] * 4 + [b"/next"]


async def test_draining_is_bounded() -> None:
    """A client that sends without end is not read for ever."""
    async with one_client(answering(read=False, status=413)) as (served, client):
        client.send(post(b"Content-Length: %d" % (1 << 40)))
        assert (await client.answer()).status == 413
        sent = 0
        while served.state.connections and sent < 200_000_000:
            client.send(b"x" * 1_000_000)
            sent += 1_000_000
            await asyncio.sleep(0.001)
        assert 64 * 1024 * 1024 < sent < 100_000_000
        assert not served.state.connections


@pytest.mark.parametrize("what", ["stalls", "malformed", "endless trailers"])
async def test_upload_that_goes_wrong_behind_its_answer(what: str) -> None:
    """There is one answer to a request: the connection ends without another."""
    async with one_client(answering(read=False), stall_timeout_s=10) as (served, client):
        client.send(post(CHUNKED) + chunks(b"abc", end=b""))
        assert (await client.answer()).body == b"ok"
        if what == "stalls":
            served.pass_time(11)
        elif what == "malformed":
            client.send(b"x\r\n")
        else:
            client.send(b"0\r\n" + b"x: y\r\n" * 20_000)
        assert await client.end() == b""
        expected = {"stalls": R.SLOW_BODY, "malformed": R.BAD_BODY}
        assert served.refused == [expected.get(what, R.HEAD_TOO_LARGE)]
        served.pass_time(3)
        await until(lambda: not served.state.connections)


async def test_lingering_ends_by_itself() -> None:
    """A client that neither closes nor stops sending is let go of after 2 s."""
    async with one_client(answering()) as (served, client):
        assert (await client.ask(b"garbage")).status == 400
        assert await client.end() == b""
        client.send(b"more")
        served.pass_time(1)
        await asyncio.sleep(0.02)
        assert served.state.connections
        served.pass_time(2.1)
        await until(lambda: not served.state.connections)


async def test_lingering_begins_when_the_answer_is_taken() -> None:
    """A client that reads slowly gets all of it, whatever it still has to send."""
    body = b"x" * 20_000_000
    async with (
        serving(answering(body, read=False), stall_timeout_s=10) as served,
        connected(served.address, limit=1) as client,
    ):
        client.send(post(b"Connection: close", b"Content-Length: 100"))
        await until(lambda: served.state.total_requests)
        served.pass_time(9)
        answer = await client.answer()
        assert (answer.body == body, answer.complete) == (True, True)
        assert not served.refused


async def test_refusal_is_read_by_a_client_that_still_sends() -> None:
    """The connection is not reset before the answer was read."""
    async with one_client(answering()) as (_, client):
        client.send(get(b"/", b"x: " + b"x" * 10_000_000))
        await asyncio.wait_for(client.writer.drain(), 10)
        answer = await client.answer()
        assert (answer.status, answer.complete) == (431, True)


# The form of answers


def status_app(status: int, *headers: tuple[bytes, bytes]) -> Handler:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await send(start)
        await send({"type": "http.response.body", "body": b""})

    return app


LENGTH = (b"content-length", b"500")
NO_LENGTH = (b"content-length", b"0")


@pytest.mark.parametrize(
    ("request_", "app", "raw"),
    [
        pytest.param(get(), status_app(204), b"204 No Content\r\n\r\n", id="204"),
        pytest.param(
            get(),
            status_app(204, NO_LENGTH),
            b"204 No Content\r\ncontent-length: 0\r\n\r\n",
            id="204 length",
        ),
        pytest.param(
            get(),
            status_app(304, LENGTH),
            b"304 Not Modified\r\ncontent-length: 500\r\n\r\n",
            id="304 length",
        ),
        pytest.param(get(), status_app(304), b"304 Not Modified\r\n\r\n", id="304"),
        pytest.param(
            get(),
            status_app(205),
            b"205 Reset Content\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            id="205",
        ),
        pytest.param(
            get(),
            status_app(205, NO_LENGTH),
            b"205 Reset Content\r\ncontent-length: 0\r\n\r\n",
            id="205 length",
        ),
        pytest.param(
            get().replace(b"GET", b"HEAD"),
            status_app(200, LENGTH),
            b"200 OK\r\ncontent-length: 500\r\n\r\n",
            id="HEAD length",
        ),
        pytest.param(get().replace(b"GET", b"HEAD"), status_app(200), b"200 OK\r\n\r\n", id="HEAD"),
        pytest.param(
            get(),
            status_app(529, (b"x-a", b"1"), NO_LENGTH, (b"x-a", b"caf\xe9")),
            b"529 \r\nx-a: 1\r\ncontent-length: 0\r\nx-a: caf\xe9\r\n\r\n",
            id="unknown status",
        ),
        pytest.param(
            get(b"/", version=b"1.0"),
            status_app(200),
            b"200 OK\r\nconnection: close\r\n\r\n",
            id="HTTP/1.0",
        ),
        pytest.param(
            get(b"/", b"Connection: keep-alive", version=b"1.0"),
            status_app(200, NO_LENGTH),
            b"200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            id="HTTP/1.0 keep-alive",
        ),
        pytest.param(
            get(b"/", b"Connection: close"),
            status_app(200, NO_LENGTH),
            b"200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            id="close",
        ),
    ],
)
async def test_form_of_answers(request_: bytes, app: Handler, raw: bytes) -> None:
    """Framed by what the client and the status allow, and the connection is kept or closed."""
    async with one_client(of(app)) as (served, client):
        client.send(request_)
        raw = b"HTTP/1.1 " + raw
        assert await client.reader.readexactly(len(raw)) == raw
        if b"connection: close" in raw:
            assert await client.end() == b""
        else:
            client.send(request_)
            assert await client.reader.readexactly(len(raw)) == raw
            assert len(served.state.connections) == 1


async def test_http_1_0_gets_no_chunks() -> None:
    """A body of unknown length ends with its connection."""
    async with one_client(answering(b"until the end", length=False)) as (_, client):
        answer = await client.ask(get(version=b"1.0"))
        assert answer.headers == [(b"connection", b"close")]
        assert (answer.body, answer.complete) == (b"until the end", True)


async def test_head_and_first_piece_go_out_together() -> None:
    """In one write; an empty first piece sends the head on alone."""
    async with one_client(answering(b"ok")) as (_, client):
        client.send(get())
        assert await client.reader.read(65536) == OK


# Answers that break off


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("how", ["return", "raise", "cancel"])
async def test_answer_that_breaks_off(
    kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What came of it is delivered, and its end never looks like one."""

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        headers = [(b"content-length", b"1000000")] if scope["path"] == "/length" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * 500_000, "more_body": True})
        if how == "raise":
            raise RuntimeError("the application's own")
        if how == "cancel":
            raise asyncio.CancelledError

    async with one_client(of(app)) as (served, client):
        client.send(REQUESTS[kind])
        # Until it has been read, a reset would rightly throw it away.
        await client.receive(b"x", 500_000)
        reading = asyncio.ensure_future(client.answer())
        while not reading.done():
            await asyncio.sleep(0.01)
            served.pass_time(3)
        answer = await reading
        assert (answer.status, answer.complete) == (200, False)
        assert len(answer.body) == 500_000
        await until(lambda: not served.state.connections)
    if how == "raise":
        assert [record.exc_info is not None for record in caplog.records] == [True]
        caplog.clear()


async def test_answer_that_is_not_begun_is_cut_without_a_byte() -> None:
    """There is nothing to say in the application's name."""

    async def app(_: Scope, __: Receive, ___: Send) -> None:
        return

    async with one_client(of(app)) as (_, client):
        client.send(get())
        assert await client.end() == b""


async def test_answer_that_breaks_off_while_the_client_still_sends() -> None:
    """What came of it is read all the same: the kernel does not throw it away."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})

    async with one_client(of(app)) as (served, client):
        client.send(post(b"Content-Length: 10000000") + b"x" * 5_000_000)
        await asyncio.wait_for(client.writer.drain(), 10)
        await asyncio.sleep(0.05)
        answer = await client.answer()
        assert (answer.body, answer.complete) == (b"begun", False)
        served.pass_time(3)
        await until(lambda: not served.state.connections)


async def test_half_close_within_a_body_until_close_is_a_reset() -> None:
    """Otherwise the client would take what it has for the whole."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async with one_client(of(app)) as (_, client):
        client.send(get(version=b"1.0"))
        assert (await client.reader.read(1000)).endswith(b"begun")
        client.writer.write_eof()
        with pytest.raises(ConnectionError):
            await client.end()


async def test_body_that_is_not_as_long_as_its_length(caplog: pytest.LogCaptureFixture) -> None:
    """An application that contradicts itself is cut, and said so."""
    for body in (b"x", b"xxx"):

        async def app(_: Scope, __: Receive, send: Send, body: bytes = body) -> None:
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        async with one_client(of(app)) as (_, client):
            assert not (await client.ask(get())).complete
    assert len(caplog.records) == 2
    caplog.clear()


# Slow clients


@pytest.mark.parametrize("late", [False, True], ids=["listens first", "listens late"])
async def test_application_is_told_that_the_client_is_slow(late: bool) -> None:
    """Within the write that fills the buffer, or the next one after the application listens."""
    told: list[str] = []
    go = asyncio.Event()

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        client = downstream_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if late:
            client.write(b"x" * 9_000_000, False)
        client.on_paused = lambda: told.append("paused")
        client.on_resumed = lambda: told.append("resumed")
        client.write(b"y" if late else b"x" * 9_000_001, False)
        assert told == ["paused"]
        await go.wait()
        client.write(b"z", True)

    async with serving(of(app)) as served, connected(served.address, limit=1) as client:
        client.send(get())
        await until(lambda: told)
        read = asyncio.ensure_future(client.answer())
        await until(lambda: told[-1] == "resumed")
        go.set()
        answer = await read
        assert (len(answer.body), answer.complete) == (9_000_002, True)


# WebSockets


class Tunnel(asyncio.Protocol):
    """Takes a connection over, as the real one does."""

    received = b""

    def __init__(self, config: object, server_state: object, app_state: object) -> None:
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        type(self).received += data
        self.transport.write(b"tunnelled")


HANDSHAKE = get(b"/v1/realtime?", b"X-A: 1", b"x-a: 2", *OFFERS["websocket"])


@pytest.mark.parametrize("before", [b"", get(b"/1")], ids=["first", "pipelined"])
async def test_handshake_is_handed_over_with_all_behind_it(
    before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was sent; from then on the connection is the tunnel's alone."""
    monkeypatch.setattr(Tunnel, "received", b"")
    async with (
        serving(answering(), ws=Tunnel) as served,
        connected(served.address) as client,
    ):
        client.send(before + HANDSHAKE + b"frame")
        if before:
            assert (await client.answer()).body == b"ok"
        await until(lambda: Tunnel.received == HANDSHAKE + b"frame")
        assert not served.state.connections
        client.send(b"\r\n\r\n")
        await until(lambda: Tunnel.received == HANDSHAKE + b"frame\r\n\r\n")
        client.writer.close()


@pytest.mark.parametrize("offer", ["h2c", "h2", "websocket"])
async def test_other_offers_are_not_handed_over(offer: str) -> None:
    """Nor is a WebSocket's that has a body."""
    body = b"abc" if offer == "websocket" else b""
    async with serving(answering(), ws=Tunnel) as served, connected(served.address) as client:
        head = get(b"/", *OFFERS[offer], b"Content-Length: %d" % len(body))
        assert (await client.ask(head + body)).status == 200
        assert served.seen[0].body == body


# Stopping


async def test_shutdown() -> None:
    """Connections close on which nothing has happened for a second, also with half a head; a
    busy one after its answer, which says so."""
    app = Holding()
    async with (
        serving(app) as served,
        connected(served.address) as idle,
        connected(served.address) as half,
        connected(served.address) as busy,
    ):
        half.send(get()[:9])
        busy.send(get(b"/busy"))
        await until(lambda: app.targets and len(served.state.connections) == 3)
        await asyncio.sleep(0.02)
        served.shut_down()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(idle.reader.read(1), 0.1)
        served.pass_time(1.1)
        assert await idle.end() == await half.end() == b""
        app.go.set()
        answer = await busy.answer()
        assert (answer.body, answer.header(b"connection")) == (b"ok", b"close")
        assert await busy.end() == b""
        served.pass_time(4)  # these clients do not close their ends
        await until(lambda: not served.state.connections)


@pytest.mark.parametrize("first", [b"", b"GET /", get()], ids=["fresh", "half", "used"])
async def test_request_that_comes_while_the_server_stops_is_served(first: bytes) -> None:
    """Its client could not know, and learns it from the answer."""
    async with one_client(answering()) as (served, client):
        client.send(first)
        if first == get():
            assert (await client.answer()).header(b"connection") is None
        await until(lambda: served.state.connections)
        served.shut_down()
        client.send(get()[len(first) :] if len(first) < len(get()) else get())
        answer = await client.answer()
        assert (answer.body, answer.header(b"connection")) == (b"ok", b"close")
        assert await client.end() == b""
        client.writer.close()
        await until(lambda: not served.state.connections)


async def test_request_that_comes_too_late_finds_the_connection_closed() -> None:
    """And not reset, as by a server that broke: its client may ask elsewhere."""
    async with one_client(answering()) as (served, client):
        assert (await client.ask(get())).body == b"ok"
        served.shut_down()
        served.pass_time(1.1)
        client.send(get())
        assert await client.end() == b""
        assert len(served.seen) == 1
        served.pass_time(4)
        await until(lambda: not served.state.connections)


async def test_answer_that_had_begun_leaves_the_connection_open() -> None:
    """Its head did not say that it closes: the next request is served, and its answer does."""
    app = Holding(begin=b"begun")
    async with one_client(app) as (served, client):
        client.send(get())
        await until(lambda: app.targets)
        await asyncio.sleep(0.02)
        served.shut_down()
        served.pass_time(5)
        app.go.set()
        answer = await client.answer()
        assert (answer.complete, answer.header(b"connection")) == (True, None)
        assert (await client.ask(get())).header(b"connection") == b"close"
        assert await client.end() == b""


async def test_connection_that_closes_is_asked_for_nothing_more() -> None:
    """It has to take what it was sent, and what else it began does not count."""
    async with (
        serving(answering(b"x" * 20_000_000), head_timeout_s=1) as served,
        connected(served.address, limit=1) as client,
    ):
        client.send(get())
        await until(lambda: served.state.total_requests)
        client.send(get()[:9])
        await until(lambda: served.edge._head)
        served.shut_down()
        served.pass_time(5)
        assert len((await client.answer()).body) == 20_000_000
        assert await client.end() == b""
        assert not served.refused


async def test_shutdown_with_an_upload_behind_its_answer() -> None:
    """The answer is not lost to the rest of the upload."""
    async with one_client(answering(b"x" * 1000, read=False)) as (served, client):
        client.send(post(b"Content-Length: 10000000"))
        await until(lambda: served.state.connections and served.edge.server_state.total_requests)
        client.send(b"x" * 1_000_000)
        served.shut_down()
        served.pass_time(1.1)
        client.send(b"x" * 1_000_000)
        await client.writer.drain()
        assert len((await client.answer()).body) == 1000
        assert await client.end() == b""
        served.pass_time(3)
        await until(lambda: not served.state.connections)


@pytest.mark.parametrize("kind", REQUESTS)
async def test_abort_within_an_answer_never_looks_like_its_end(kind: str) -> None:
    """What is left at the end of a drain is cut."""
    async with (
        serving(of(_endless)) as served,
        connected(served.address, limit=1) as client,
    ):
        client.send(REQUESTS[kind])
        await until(lambda: served.state.connections and served.edge.flow.write_paused)
        served.edge.abort()
        assert not (await client.answer()).complete
        await until(lambda: not served.state.tasks and not served.state.connections)


# The patrol, the counters, and the whole


async def test_patrol_comes_round() -> None:
    """With a sidecar's own settings, slow clients are found and counted."""
    async with (
        upstream(OK) as up,
        running(up.url, head_timeout_s=0.1, stall_timeout_s=0.1) as side,
        connected(side.host) as slow_head,
        connected(side.host) as slow_body,
    ):
        slow_head.send(b"GET / HT")
        slow_body.send(post(b"Content-Length: 3"))
        assert (await slow_head.answer()).status == 408
        assert (await slow_body.answer()).status == 408
        for reason in ("slow_head", "slow_body"):
            assert side.value("litellm_sidecar_refusals_total", reason=reason) == 1


async def test_every_refusal_is_counted() -> None:
    """By its reason."""
    bad = {
        "bad_request": b"garbage\r\n\r\n",
        "bad_host": b"GET / HTTP/1.1\r\n\r\n",
        "bad_target": get(b"http:///"),
        "bad_body": post(CHUNKED) + b"x\r\n",
        "bad_transfer_encoding": get(b"/", CHUNKED, version=b"1.0"),
        "unknown_transfer_encoding": post(b"Transfer-Encoding: gzip, chunked"),
        "connect": b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n",
        "http_version": get(version=b"2.0"),
        "head_too_large": get(b"/" + b"x" * 70_000),
        "request_too_large": post(body=b"x" * 100),
    }
    async with upstream(OK) as up, running(up.url, max_request_body_bytes=10) as side:
        for reason, raw in bad.items():
            answer = await ask(side.host, raw)
            assert answer.header(b"x-sidecar-error") == reason.encode()
        counted = {
            reason.value: side.value("litellm_sidecar_refusals_total", reason=reason.value)
            for reason in R
        }
        assert counted == {reason.value: float(reason.value in bad) for reason in R}
        assert not up.received


async def test_garbage_on_sockets_harms_nobody() -> None:
    """Seeded mutations of a conversation, cut at random: each connection ends, and nothing
    reaches the loop's exception handler or a log."""
    random_ = random.Random(4)
    odd = [b"\r", b"\n", b"\r\n\r\n", b"\0", b" ", b":", b"\xff", b"0\r\n", b"HTTP/1.0"]
    talk = (
        get(b"/1")
        + post(body=b"abc", target=b"/2")
        + post(CHUNKED, *OFFERS["h2c"], target=b"/3")
        + chunks(b"abc", b"de", end=b"0\r\nx: y\r\n\r\n")
        + EXPECT
        + b"hello"
        + get(b"/5", b"Connection: close")
    )
    async with serving(answering(length=False), max_head_bytes=300) as served:
        for _ in range(300):
            raw = bytearray(talk)
            for _mutation in range(random_.randint(0, 3)):
                at = random_.randrange(len(raw))
                raw[at : at + random_.randint(0, 40)] = random_.choice(odd)
            async with connected(served.address) as client:
                while raw:
                    cut = random_.randint(1, 200)
                    client.send(bytes(raw[:cut]))
                    del raw[:cut]
                    await asyncio.sleep(0)
                served.pass_time(1)
                client.writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    await client.end()
        await until(lambda: not served.state.connections and not served.state.tasks)
        assert served.refused
        assert served.seen


# What Edge leans on


def test_uvicorn_is_what_edge_was_written_for() -> None:
    """`Edge` overrides and calls what uvicorn does not promise. Where this fails, compare
    `edge` and `cycle` with the new uvicorn before the pin is moved."""
    assert uvicorn.__version__ == "0.54.0"
    signatures = {
        HttpToolsProtocol.__init__: "(self, config, server_state, app_state, _loop)",
        HttpToolsProtocol.connection_made: "(self, transport)",
        HttpToolsProtocol.data_received: "(self, data)",
        HttpToolsProtocol.eof_received: "(self)",
        HttpToolsProtocol.connection_lost: "(self, exc)",
        HttpToolsProtocol.pause_writing: "(self)",
        HttpToolsProtocol.resume_writing: "(self)",
        HttpToolsProtocol.on_response_complete: "(self)",
        HttpToolsProtocol.shutdown: "(self)",
        HttpToolsProtocol._start_asgi_task: "(self, cycle, app)",
    }
    for function, expected in signatures.items():
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        assert f"({', '.join(names)})" == expected, function
    # Nothing else of the base class is called by the loop or the server behind our back.
    known = {function.__name__ for function in signatures} | {
        "_get_upgrade",
        "_should_upgrade",
        "_should_upgrade_to_ws",
        "_unset_keepalive_if_required",
        "_unsupported_upgrade_warning",
        "handle_websocket_upgrade",
        "on_body",
        "on_header",
        "on_headers_complete",
        "on_message_begin",
        "on_message_complete",
        "on_url",
        "send_400_response",
        "timeout_keep_alive_handler",
    }
    own = {name for name, value in vars(HttpToolsProtocol).items() if inspect.isfunction(value)}
    assert own == known


def test_uvicorn_parts_that_edge_uses() -> None:
    """Attributes of the protocol, the flow control, the configuration and the server."""
    config = uvicorn.Config(lambda: None, http=Edge, ws="none", lifespan="off", log_config=None)
    loop = asyncio.new_event_loop()
    try:
        protocol = HttpToolsProtocol(config, ServerState(), {}, loop)
    finally:
        loop.close()
    used = "config app loop logger server_state connections tasks transport flow server client"
    for name in (*used.split(), "scheme", "cycle", "app_state"):
        assert hasattr(protocol, name), name
    assert [protocol.transport, protocol.flow, protocol.cycle] == [None] * 3
    assert protocol.connections is protocol.server_state.connections
    assert protocol.tasks is protocol.server_state.tasks
    assert protocol.server_state.total_requests == 0
    assert config.http_protocol_class is Edge
    assert config.ws_protocol_class is None
    flow = flow_control.FlowControl.__new__(flow_control.FlowControl)
    methods = "drain pause_reading resume_reading pause_writing resume_writing"
    assert all(callable(getattr(flow, name)) for name in methods.split())
    assert {"read_paused", "write_paused"} <= set(
        flow_control.FlowControl.__init__.__code__.co_names
    )
    assert flow_control.HIGH_WATER_LIMIT == 65536
    assert sorted(STATUS_LINE) == list(range(100, 600))
    assert (STATUS_LINE[200], STATUS_LINE[529]) == (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 529 \r\n")
    # The server ends connections by these alone, and waits for both sets to be empty.
    shutdown = inspect.getsource(uvicorn.Server.shutdown)
    assert "for connection in list(self.server_state.connections):" in shutdown
    assert "connection.shutdown()" in shutdown
    waiting = inspect.getsource(uvicorn.Server._wait_tasks_to_complete)
    assert "while self.server_state.connections and not self.force_exit" in waiting
    assert "while self.server_state.tasks and not self.force_exit" in waiting
    made = inspect.getsource(httptools_impl.HttpToolsProtocol.connection_made)
    for line in ("self.connections.add(self)", "self.flow = FlowControl(transport)"):
        assert line in made
