"""WebSockets through the sidecar: the two ends see each other, and the sidecar sees nothing."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from uvicorn.server import ServerState
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.typing import Subprotocol

from sidecar.proxy import tunnel
from tests.support.certificates import Authority
from tests.support.running import Running, running, until
from tests.support.wire import Received, ask, read_answer, upstream

pytestmark = pytest.mark.anyio

SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
MEGABYTE = 1 << 20


def wanted(target: bytes = b"/v1/realtime", *headers: bytes, method: bytes = b"GET") -> bytes:
    """Write a request for a WebSocket."""
    lines = [
        method + b" " + target + b" HTTP/1.1",
        b"Host: llm.test",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Sec-WebSocket-Version: 13",
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def requests_counted(side: Running, code: str, method: str = "GET") -> float:
    return side.value(
        "litellm_sidecar_http_requests_total", route="/v1/realtime", method=method, code=code
    )


# With the reference library at both ends

Serve = Callable[[ServerConnection], Awaitable[None]]


@asynccontextmanager
async def served(
    handler: Serve, *, drain_timeout_s: float = 2.0, **options: Any
) -> AsyncIterator[Running]:
    """Run a sidecar before a real WebSocket server."""
    async with serve(handler, "127.0.0.1", 0, ping_interval=None, **options) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with running(f"http://127.0.0.1:{port}", drain_timeout_s=drain_timeout_s) as side:
            yield side


def joined(side: Running, **options: Any) -> connect:
    url = f"ws://127.0.0.1:{side.lifecycle.port}/v1/realtime?model=m"
    return connect(url, proxy=None, ping_interval=None, **options)


async def echo(connection: ServerConnection) -> None:
    message: str | bytes
    async for message in connection:
        await connection.send(message)


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_messages_and_compression(compression: str | None) -> None:
    """Text, binary, empty and large messages come back; compression is what the two agreed on."""
    agreed: list[list[str]] = []

    async def handler(connection: ServerConnection) -> None:
        agreed.append([extension.name for extension in connection.protocol.extensions])
        await echo(connection)

    messages: list[str | bytes] = ["hello", b"\0\1\2", "", "ü" * 200_000, os.urandom(5 * MEGABYTE)]
    async with (
        served(handler, max_size=None) as side,
        joined(side, compression=compression, max_size=None) as client,
    ):
        for message in messages:
            await client.send(message)
            assert await client.recv() == message
        agreed.append([extension.name for extension in client.protocol.extensions])
    assert agreed == [["permessage-deflate"] if compression else []] * 2


async def test_fragments_stay_apart() -> None:
    """A message in three frames is three frames at the other end, in both directions."""
    fragments = ["one ", "two ", "three"]
    seen: list[Any] = []

    async def handler(connection: ServerConnection) -> None:
        seen.extend([part async for part in connection.recv_streaming()])
        await connection.send(fragments)

    async with served(handler) as side, joined(side) as client:
        await client.send(fragments)
        # The library ends a fragmented message with an empty frame.
        assert [part async for part in client.recv_streaming()] == [*fragments, ""]
    assert seen == [*fragments, ""]


async def test_pings_are_answered_by_the_other_end() -> None:
    """A ping waits for a pong of the other end: while that reads nothing there is none."""
    ready = asyncio.Event()

    async def handler(connection: ServerConnection) -> None:
        await (await connection.ping(b"from the server"))
        connection.transport.pause_reading()
        await connection.send("paused")
        await ready.wait()
        connection.transport.resume_reading()
        await echo(connection)

    async with served(handler) as side, joined(side) as client:
        assert await client.recv() == "paused"
        pong = await client.ping(b"from the client")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(pong), 0.2)
        ready.set()
        await asyncio.wait_for(pong, 2)


async def test_subprotocol_is_the_servers_choice() -> None:
    """Both offers arrive, and the server's choice comes back."""
    offers = [Subprotocol("realtime"), Subprotocol("openai-beta.realtime-v1")]
    async with (
        served(echo, subprotocols=[offers[1]]) as side,
        joined(side, subprotocols=offers) as client,
    ):
        assert client.subprotocol == offers[1]


@pytest.mark.parametrize("by", ["server", "client"])
@pytest.mark.parametrize("code", [1000, 1005, 1006, 4010])
async def test_close_codes(by: str, code: int) -> None:
    """Each end learns the other's code and reason; no code is 1005, no close frame 1006."""
    learned: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    async def end(connection: ServerConnection | ClientConnection) -> None:
        if code == 1006:
            connection.transport.abort()
        elif code == 1005:
            connection.protocol.send_close()
            for data in connection.protocol.data_to_send():
                connection.transport.write(data)
        else:
            await connection.close(code, "because")

    async def learn(connection: ServerConnection | ClientConnection) -> None:
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(connection.recv(), 2)
        learned.set_result((connection.protocol.close_code or 0, connection.close_reason or ""))

    async def handler(connection: ServerConnection) -> None:
        await (end if by == "server" else learn)(connection)
        await connection.wait_closed()

    async with served(handler) as side:
        client = await joined(side)
        await (end if by == "client" else learn)(client)
        expected = (code, "because" if code in (1000, 4010) else "")
        assert await asyncio.wait_for(learned, 2) == expected
        await asyncio.wait_for(client.wait_closed(), 2)
        await until(lambda: requests_counted(side, "101") == 1)
        assert side.value("litellm_sidecar_client_disconnects_total") == 0


async def test_refusal_as_the_library_sees_it() -> None:
    """The client's library raises what it raises without us, with the body in its hand."""

    def refuse(connection: ServerConnection, _: Any) -> Any:
        return connection.respond(401, "no key\n")

    async with served(echo, process_request=refuse) as side:
        with pytest.raises(InvalidStatus) as raised:
            await joined(side)
        assert raised.value.response.status_code == 401
        assert raised.value.response.body == b"no key\n"
        assert requests_counted(side, "401") == 1


# As bytes


@asynccontextmanager
async def opened(
    side: Running, request: bytes | None = None, **options: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a WebSocket as bytes; its 101 is read."""
    reader, writer = await asyncio.open_connection(*side.host, **options)
    try:
        writer.write(request or wanted())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        assert head.startswith(b"HTTP/1.1 101 ")
        yield reader, writer
    finally:
        writer.close()


class Accepting:
    """An upstream that takes every WebSocket, and ends it when its client has.

    Or hands it to the test, until that sets `ended`.
    """

    def __init__(self, raw: bytes = SWITCH, *, hands_over: bool = False) -> None:
        self.raw = raw
        self.hands_over = hands_over
        self.streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        self.streams = asyncio.Queue()
        self.ended = asyncio.Event()

    async def __call__(
        self, _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(self.raw)
        if self.hands_over:
            await self.streams.put((reader, writer))
            await self.ended.wait()
        else:
            await reader.read()
        writer.close()


@asynccontextmanager
async def pair(
    **settings: Any,
) -> AsyncIterator[
    tuple[
        Running,
        tuple[asyncio.StreamReader, asyncio.StreamWriter],
        tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ]
]:
    """Open one WebSocket: the sidecar, the client's streams, the upstream's."""
    accepting = Accepting(hands_over=True)
    async with (
        upstream(accepting) as up,
        running(up.url, **settings) as side,
        opened(side, limit=1024) as client,
    ):
        yield side, client, await accepting.streams.get()
        accepting.ended.set()


TARGETS = (
    b"/v1/realtime?model=gpt-realtime&x=%2F",
    b"//v1//realtime",
    b"/v1%2Frealtime",
    b"/x?",
    b"/?x?",
    b"/x?to=http://b/c",
    b"/a/../b;c",
    b"/vertex_ai/live",
    b"/%zz",
)


async def test_targets_are_exact() -> None:
    """The upstream gets the target as the client wrote it."""
    async with upstream(Accepting()) as up, running(up.url) as side:
        for target in TARGETS:
            async with opened(side, wanted(target)):
                assert up.received[-1].line == b"GET " + target + b" HTTP/1.1"


async def test_request_head() -> None:
    """Headers keep their order and repeats; those of one connection end here, but for what the
    handshake needs."""
    head = wanted(
        b"/v1/realtime",
        b"Authorization: Bearer sk-1",
        b"X-B: 1",
        b"Connection: keep-alive, x-hop, upgrade, Sec-WebSocket-Key",
        b"x-a:",
        b"X-B: 2",
        b"X-Hop: 1",
        b"Keep-Alive: 5",
        b"TE: trailers",
        b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-2",
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        b"Cookie: caf\xe9",
    )
    async with upstream(Accepting()) as up, running(up.url) as side, opened(side, head):
        assert up.received[0].headers == [
            (b"host", b"llm.test"),
            (b"upgrade", b"websocket"),
            (b"connection", b"Upgrade"),
            (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
            (b"sec-websocket-version", b"13"),
            (b"authorization", b"Bearer sk-1"),
            (b"x-b", b"1"),
            (b"x-a", b""),
            (b"x-b", b"2"),
            (b"sec-websocket-protocol", b"realtime, openai-insecure-api-key.sk-2"),
            (b"sec-websocket-extensions", b"permessage-deflate; client_max_window_bits"),
            (b"cookie", b"caf\xe9"),
            (b"x-forwarded-for", b"127.0.0.1"),
        ]


async def test_forwarded_headers_of_a_stranger_are_replaced() -> None:
    """The rule is that of every other request."""
    head = wanted(b"/", b"X-Forwarded-For: 203.0.113.7", b"X-Forwarded-Host: evil.test")
    async with (
        upstream(Accepting()) as up,
        running(up.url, trusted_proxies="10.0.0.0/8") as side,
        opened(side, head),
    ):
        (seen,) = up.received
        assert seen.values(b"x-forwarded-for") == [b"127.0.0.1"]
        assert seen.values(b"x-forwarded-proto") == [b"http"]
        assert seen.values(b"x-forwarded-host") == []


async def test_answer_head_and_what_comes_with_it() -> None:
    """Reason phrase, order and repeats of a 101 are the upstream's, an interim answer before it
    is dropped, and frames in the same segment come through."""
    raw = (
        b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
        b"HTTP/1.1 101 Go On\r\nX-B: 1\r\nUpgrade: WebSocket\r\nConnection: upgrade, x-hop\r\n"
        b"X-Hop: 1\r\nSec-WebSocket-Protocol: realtime\r\nX-A: 1\r\nX-B: 2\r\n\r\n\x81\x02hi"
    )
    async with upstream(Accepting(raw)) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(wanted())
        expected = (
            b"HTTP/1.1 101 Go On\r\nx-b: 1\r\nupgrade: WebSocket\r\nconnection: Upgrade\r\n"
            b"sec-websocket-protocol: realtime\r\nx-a: 1\r\nx-b: 2\r\n\r\n\x81\x02hi"
        )
        assert await asyncio.wait_for(reader.readexactly(len(expected)), 2) == expected
        writer.close()


async def test_answer_byte_by_byte() -> None:
    """The answer's head may come in any pieces."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in SWITCH + b"\x81\x02hi":
            writer.write(bytes([byte]))
            await asyncio.sleep(0.001)

    async with upstream(serve) as up, running(up.url) as side, opened(side) as (reader, _):
        assert await reader.readexactly(4) == b"\x81\x02hi"


async def test_after_other_requests_on_the_connection() -> None:
    """A connection that was used before can become a WebSocket."""
    answers = iter([b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", SWITCH + b"\x81\x02hi"])

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(next(answers))

    async with upstream(serve) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: llm.test\r\n\r\n")
        assert (await read_answer(reader)).body == b"ok"
        writer.write(wanted())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(4) == b"\x81\x02hi"
        writer.close()


async def test_frames_behind_the_head() -> None:
    """Frames that come in one piece with the head are held for the 101 and then passed on.

    uvicorn's own protocol drops them; one that does not hands both to the tunnel.
    """
    accepting = Accepting(hands_over=True)
    async with upstream(accepting) as up, running(up.url) as side:
        server = await asyncio.get_running_loop().create_server(
            lambda: side.sidecar.tunnel(None, ServerState(), {}),  # type: ignore[call-arg]
            "127.0.0.1",
            0,
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(wanted() + b"\x81\x82abcdhi")
        assert await (await accepting.streams.get())[0].readexactly(8) == b"\x81\x82abcdhi"
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        writer.close()
        accepting.ended.set()
        server.close()
        assert up.received[0].values(b"upgrade") == [b"websocket"]


async def test_frames_are_not_read() -> None:
    """Bytes that are no frames at all pass both ways: pings and all else are the ends' own."""
    noise = os.urandom(3 * MEGABYTE)
    async with pair() as (_, client, up):
        client[1].write(b"\x89\x04ping" + noise)
        assert await up[0].readexactly(6 + len(noise)) == b"\x89\x04ping" + noise
        up[1].write(b"\x8a\x04pong" + noise)
        assert await client[0].readexactly(6 + len(noise)) == b"\x8a\x04pong" + noise


# Refusals of the upstream


REFUSALS = {
    "401 with a length": b"HTTP/1.1 401 Unauthorized\r\nx-b: 1\r\nWWW-Authenticate: Bearer\r\n"
    b"x-b: 2\r\ncontent-length: 6\r\n\r\nno key",
    "403 chunked": b"HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\n\r\n"
    b"2\r\nno\r\n1;x=y\r\n!\r\n0\r\nx-trailer: 1\r\n\r\n",
    "404 empty": b"HTTP/1.1 404 Not Found\r\nserver: up\r\ncontent-length: 0\r\n\r\n",
    "426": b"HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\ncontent-length: 2\r\n\r\nno",
    "307, which is not followed": b"HTTP/1.1 307 Temporary Redirect\r\n"
    b"location: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
    "200": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "204": b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n",
    "529": b"HTTP/1.1 529 Overloaded\r\ncontent-length: 2\r\n\r\nno",
    "until the end": b"HTTP/1.0 403 Forbidden\r\nx-a: 1\r\n\r\nuntil the end",
    "with more behind it": b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno"
    b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond",
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_refusal_is_passed_on(name: str) -> None:
    """Status, headers and body are those of the direct call; then the connection ends, on both
    sides, also where the upstream would have kept it."""
    raw = REFUSALS[name]
    step = len(raw)
    closed = 0

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal closed
        for at in range(0, len(raw), step):
            if not writer.is_closing():
                writer.write(raw[at : at + step])
                await asyncio.sleep(0)
        if raw.startswith(b"HTTP/1.0"):
            writer.close()
        try:
            await reader.read()
        except ConnectionError:
            pass
        writer.close()
        closed += 1

    async with upstream(serve) as up, running(up.url) as side:
        direct = await ask(("127.0.0.1", up.port), wanted())
        expected = [
            pair for pair in direct.end_to_end() if pair[0] not in (b"upgrade", b"x-trailer")
        ]
        await until(lambda: closed == 1)
        for asked, size in enumerate((len(raw), 1), start=1):
            step = size
            reader, writer = await asyncio.open_connection(*side.host)
            writer.write(wanted())
            through = await asyncio.wait_for(read_answer(reader), 2)
            # What is counted is counted before the client has it.
            assert requests_counted(side, str(direct.status)) == asked
            assert await reader.read() == b""
            await until(lambda: closed == asked + 1, 1)  # noqa: B023 - called before the next
            writer.close()
            assert through.complete
            assert (through.status, through.body) == (direct.status, direct.body)
            assert through.end_to_end() == expected
            assert through.header(b"connection") == b"close"
        assert up.connections == 4  # one of them the probe's


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        pytest.param(b"content-length: 9", b"", id="length"),
        pytest.param(b"transfer-encoding: chunked", b"", id="chunked"),
        pytest.param(b"transfer-encoding: chunked", b"xx\r\n", id="bad chunk"),
    ],
)
async def test_refusal_that_breaks_off_is_cut(framing: bytes, body: bytes) -> None:
    """A body that is not whole does not look so."""
    start = b"2\r\nno\r\n" if b"chunked" in framing else b"no"

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 403 Forbidden\r\n" + framing + b"\r\n\r\n" + start)
        await asyncio.sleep(0.05)
        writer.write(body)
        writer.close()

    async with upstream(serve) as up, running(up.url) as side:
        answer = await ask(side.host, wanted())
        assert (answer.status, answer.body, answer.complete) == (403, b"no", False)
        assert side.value("litellm_sidecar_upstream_failures_total", reason="body_cut") == 1
        assert requests_counted(side, "403") == 1


# Faults


def _sends(raw: bytes) -> Callable[..., Awaitable[None]]:
    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        writer.close()

    return serve


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="not HTTP"),
        pytest.param(SWITCH.replace(b"Upgrade: websocket\r\n", b""), id="101 without Upgrade"),
        pytest.param(SWITCH[:-2] + b"x: " + b"y" * 70_000 + b"\r\n\r\n", id="large header"),
    ],
)
async def test_malformed_answer_is_502(raw: bytes) -> None:
    """What is no answer is not passed on, and is counted."""
    async with upstream(_sends(raw)) as up, running(up.url) as side:
        answer = await ask(side.host, wanted())
        assert side.value("litellm_sidecar_upstream_failures_total") == 1
        assert requests_counted(side, "502") == 1
    assert (answer.status, answer.complete) == (502, True)
    assert answer.header(b"x-sidecar-error") == b"malformed_response"
    assert answer.header(b"connection") == b"close"
    assert json.loads(answer.body)["error"]["code"] == "malformed_response"


@pytest.mark.parametrize("raw", [b"", SWITCH[:40]], ids=["no byte", "half a head"])
async def test_upstream_that_breaks_off_before_its_answer(raw: bytes) -> None:
    """No head at all is a 502 of its own kind."""
    async with upstream(_sends(raw)) as up, running(up.url) as side:
        answer = await ask(side.host, wanted())
        assert side.value("litellm_sidecar_upstream_failures_total", reason="connection_lost") == 1
    assert answer.status == 502
    assert answer.header(b"x-sidecar-error") == b"connection_lost"


async def test_no_upstream_is_502_in_the_dialect_of_the_route() -> None:
    """Without an upstream there is an answer that the route's clients can read."""
    async with running("http://127.0.0.1:9") as side:
        answer = await ask(side.host, wanted())
        anthropic = await ask(side.host, wanted(b"/v1/messages"))
        assert side.value("litellm_sidecar_upstream_failures_total", reason="connect_failed") == 2
        assert requests_counted(side, "502") == 1
    assert answer.status == anthropic.status == 502
    assert answer.header(b"x-sidecar-error") == b"connect_failed"
    assert json.loads(answer.body)["error"]["code"] == "connect_failed"
    assert json.loads(anthropic.body)["error"]["type"] == "api_error"
    assert b"127.0.0.1" not in answer.body


@asynccontextmanager
async def unreachable() -> AsyncIterator[str]:
    """An address where connections hang: a listener whose queue is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_connection_that_hangs_is_504() -> None:
    """The connect time-out holds for WebSockets."""
    async with unreachable() as url, running(url, connect_timeout_s=0.2) as side:
        answer = await ask(side.host, wanted())
        assert side.value("litellm_sidecar_upstream_failures_total", reason="connect_timeout") == 1
    assert (answer.status, answer.header(b"x-sidecar-error")) == (504, b"connect_timeout")


async def test_answer_that_does_not_come_is_504() -> None:
    """The first-byte time-out holds for the handshake, and not for what comes after it."""
    accepting = Accepting(hands_over=True)
    async with upstream(accepting) as up, running(up.url, first_byte_timeout_s=0.2) as side:
        async with opened(side) as (reader, _):
            _, writer = await accepting.streams.get()
            await asyncio.sleep(0.4)
            writer.write(b"late")
            assert await reader.readexactly(4) == b"late"
        accepting.ended.set()
        accepting.raw, accepting.ended = b"", asyncio.Event()
        answer = await ask(side.host, wanted())
        assert (answer.status, answer.header(b"x-sidecar-error")) == (504, b"first_byte_timeout")


BODY = wanted(b"/smuggled")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(wanted(b"/x", b"Host: other"), id="two hosts"),
        pytest.param(wanted().replace(b"Host: llm.test\r\n", b""), id="no host"),
    ],
)
async def test_what_is_no_request_for_a_websocket(request_: bytes) -> None:
    """It is refused; what comes behind it is neither passed on nor taken for a request, and
    does not cost the client its answer."""
    async with upstream(Accepting()) as up, running(up.url) as side:
        for together in (True, False):
            reader, writer = await asyncio.open_connection(*side.host)
            writer.write(request_ + (BODY if together else b""))
            if not together:
                await asyncio.sleep(0.02)
                writer.write(BODY * 1000)
            answer = await asyncio.wait_for(read_answer(reader), 2)
            assert (answer.status, answer.header(b"x-sidecar-error")) == (400, b"bad_host")
            assert answer.complete
            assert await asyncio.wait_for(reader.read(), 2) == b""
            writer.close()
        assert side.value("litellm_sidecar_refusals_total", reason="bad_host") == 2
    assert up.received == []


async def test_absolute_target() -> None:
    """Of an absolute target the path counts: it cannot choose the upstream."""
    request_ = wanted(b"http://evil.test/v1/realtime?x")
    async with upstream(Accepting()) as up, running(up.url) as side, opened(side, request_):
        assert up.received[0].line == b"GET /v1/realtime?x HTTP/1.1"
        assert up.received[0].values(b"host") == [b"llm.test"]


# Flow


async def stands_still(written: Callable[[], int]) -> int:
    """Wait until a count does not rise any more."""
    before = -1
    while written() != before:
        before = written()
        await asyncio.sleep(0.2)
    return before


async def pour(writer: asyncio.StreamWriter, count: list[int]) -> None:
    while True:
        writer.write(b"x" * 100_000)
        await writer.drain()
        count[0] += 100_000


@pytest.mark.parametrize("reads", ["client", "upstream"])
async def test_who_does_not_read_slows_the_other_down(reads: str) -> None:
    """What one end does not read is not taken from the other, and comes once it does read."""
    async with pair() as (_, client, up):
        reader, writer = (client[0], up[1]) if reads == "client" else (up[0], client[1])
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        count = [0]
        task = asyncio.create_task(pour(writer, count))
        sent = await stands_still(lambda: count[0])
        assert MEGABYTE // 10 < sent < 40 * MEGABYTE
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert await asyncio.wait_for(reader.readexactly(sent), 10) == b"x" * sent
        task.cancel()


async def test_frames_before_the_answer_are_held() -> None:
    """What a client says before it has its 101 is held, within a bound, and then passed on."""
    go = asyncio.Event()
    frames = os.urandom(64 * MEGABYTE)
    received = bytearray()

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await go.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        writer.write(SWITCH)
        while len(received) < len(frames):
            received.extend(await reader.read(MEGABYTE))
        writer.write(b"done")

    async with upstream(serve) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(wanted())
        await until(lambda: up.received)
        writer.write(frames)
        left = -await stands_still(lambda: -writer.transport.get_write_buffer_size())
        assert left > 24 * MEGABYTE  # the kernel has the most of what went out
        go.set()
        await reader.readuntil(b"\r\n\r\n")
        assert await asyncio.wait_for(reader.readexactly(4), 10) == b"done"
        assert received == frames
        writer.close()


async def refused_early(side: Running) -> int:
    """Send frames and do not wait for the answer; return its status, once all is closed."""
    before = await stands_still(sockets)
    reader, writer = await asyncio.open_connection(*side.host)
    writer.write(wanted() + b"x" * 64 * MEGABYTE)
    answer = await asyncio.wait_for(read_answer(reader), 3)
    assert answer.complete
    writer.close()
    await until(lambda: sockets() == before)
    return answer.status


async def test_frames_before_a_refusal_are_dropped() -> None:
    """They go nowhere, and neither cost the client its answer nor keep its connection."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")

    async with upstream(serve) as up, running(up.url) as side:
        await until(lambda: up.connections == 1)
        assert await refused_early(side) == 403
    assert len(up.received) == 1
    async with unreachable() as url, running(url, connect_timeout_s=0.5) as side:
        assert await refused_early(side) == 504


# Ends


def sockets() -> int:
    """Count this process's sockets."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(entry).startswith("socket:")
        except FileNotFoundError:
            pass
    return found


def reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.mark.parametrize("leaves", ["client", "upstream"])
@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_one_end_leaves(leaves: str, how: str) -> None:
    """Within 100 ms the other learns it, in the same manner, and no socket is left."""
    accepting = Accepting(hands_over=True)
    async with upstream(accepting) as up, running(up.url) as side:
        await until(lambda: up.connections == 1)  # the probe's
        before = await stands_still(sockets)
        async with opened(side) as client:
            end = await accepting.streams.get()
            goes, stays = (client, end) if leaves == "client" else (end, client)
            assert side.value("litellm_sidecar_http_requests_in_flight", route="/v1/realtime") == 1
            goes[1].write(b"last words")
            assert await stays[0].readexactly(10) == b"last words"
            began = monotonic()
            if how == "closes":
                goes[1].close()
                assert await stays[0].read() == b""
            else:
                reset(goes[1])
                with pytest.raises(ConnectionResetError):
                    await stays[0].read()
            assert monotonic() - began < 0.1
            stays[1].close()
            accepting.ended.set()
            await until(lambda: sockets() == before)
        failures = side.value("litellm_sidecar_upstream_failures_total", reason="body_cut")
        assert failures == ((leaves, how) == ("upstream", "resets"))
        assert requests_counted(side, "101") == 1
        assert side.value("litellm_sidecar_client_disconnects_total") == 0
        assert side.value("litellm_sidecar_http_requests_in_flight") == 0
        durations = "litellm_sidecar_http_request_duration_seconds_count"
        assert side.value(durations, route="/v1/realtime") == 1


@pytest.mark.parametrize("first", ["client", "upstream"])
async def test_end_of_one_direction_leaves_the_other(first: str) -> None:
    """An end that says no more still hears: a close frame that comes late is not lost."""
    async with pair() as (side, client, up):
        one, other = (client, up) if first == "client" else (up, client)
        one[1].write(b"my last")
        one[1].write_eof()
        assert await other[0].read() == b"my last"
        await asyncio.sleep(0.05)
        other[1].write(b"x" * MEGABYTE)
        other[1].write_eof()
        assert await one[0].read() == b"x" * MEGABYTE
        assert requests_counted(side, "101") == 1


@pytest.mark.parametrize("stays", ["client", "upstream"])
async def test_end_that_does_not_follow_is_cut(stays: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One end that ignores the other's leaving is waited for, but not for ever, unless it is
    still reading what was said."""
    monkeypatch.setattr(tunnel, "_LINGER_S", 0.2)
    accepting = Accepting(hands_over=True)
    async with upstream(accepting) as up, running(up.url) as side:
        # The connection of the first probe comes, and goes when nobody has used it.
        await until(lambda: up.connections == 1 and not side.sidecar.upstream.open_connections)
        before = await stands_still(sockets)
        async with opened(side, limit=1024) as client:
            end = await accepting.streams.get()
            goes, slow = (end, client) if stays == "client" else (client, end)
            said = b"x" * 16 * MEGABYTE
            slow[0]._transport.pause_reading()  # type: ignore[attr-defined]
            goes[1].write(said)
            goes[1].close()
            for _ in range(12):
                await asyncio.sleep(0.1)
                slow[0]._transport.resume_reading()  # type: ignore[attr-defined]
                said = said[len(await slow[0].readexactly(MEGABYTE)) :]
            assert await slow[0].read() == said
            await until(lambda: sockets() == before + 1)  # the slow end's own
            accepting.ended.set()


LEAVES = ["closes", "resets"]


@pytest.mark.parametrize("how", LEAVES)
async def test_client_that_leaves_before_the_answer(how: str) -> None:
    """The upstream learns it within 100 ms, and it is counted as left."""
    gone = asyncio.Event()

    async def serve(_: Received, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()
        gone.set()

    async with upstream(serve) as up, running(up.url) as side:
        await until(lambda: up.connections == 1)
        before = await stands_still(sockets)
        _, writer = await asyncio.open_connection(*side.host)
        writer.write(wanted())
        await until(lambda: up.received)
        (reset if how == "resets" else asyncio.StreamWriter.close)(writer)
        async with asyncio.timeout(0.1):
            await gone.wait()
        await until(lambda: sockets() == before)
        assert requests_counted(side, "499") == 1
        assert side.value("litellm_sidecar_client_disconnects_total", route="/v1/realtime") == 1
        assert side.value("litellm_sidecar_http_requests_in_flight") == 0


async def test_client_that_leaves_in_the_middle_of_a_refusal() -> None:
    """A refusal that its client does not wait for is given up."""
    gone = asyncio.Event()

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 9\r\n\r\nno")
        await reader.read()
        gone.set()

    async with upstream(serve) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(wanted())
        await reader.readuntil(b"no")
        writer.close()
        await asyncio.wait_for(gone.wait(), 1)
        await until(lambda: requests_counted(side, "499") == 1)


@pytest.mark.parametrize("how", LEAVES)
async def test_client_that_leaves_while_it_is_connected(how: str) -> None:
    """A connection that is still being made is given up."""
    async with unreachable() as url, running(url, connect_timeout_s=60) as side:
        before = await stands_still(sockets)
        _, writer = await asyncio.open_connection(*side.host)
        writer.write(wanted())
        await until(lambda: sockets() == before + 3)
        (reset if how == "resets" else asyncio.StreamWriter.close)(writer)
        await until(lambda: sockets() == before)
        assert requests_counted(side, "499") == 1


async def test_cancellation_at_any_moment_leaves_nothing() -> None:
    """Whenever a client goes, nothing is left of its tunnel, and each is counted once."""
    async with serve(echo, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with running(f"http://127.0.0.1:{port}") as side:
            before = await stands_still(sockets)
            tasks = asyncio.all_tasks()
            for turn in range(300):
                _, writer = await asyncio.open_connection(*side.host)
                writer.write(wanted())
                for _ in range(turn % 30):
                    await asyncio.sleep(0)
                (reset if turn % 2 else asyncio.StreamWriter.close)(writer)
            await until(lambda: sockets() == before)
            await until(lambda: len(asyncio.all_tasks() - tasks) == 0)
            assert side.value("litellm_sidecar_http_requests_in_flight") == 0
            counted = side.value("litellm_sidecar_http_requests_total", route="/v1/realtime")
            assert counted == side.value(
                "litellm_sidecar_http_request_duration_seconds_count", route="/v1/realtime"
            )
            assert 200 < counted <= 300  # some were gone before their head was read
            assert side.value("litellm_sidecar_internal_errors_total") == 0


async def test_broken_accounts_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in counting is contained."""

    def fail(*_: object) -> None:
        raise RuntimeError("accounts")

    async with served(echo) as side:
        monkeypatch.setattr(side.sidecar.ledger, "submit", fail)
        async with joined(side) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
        await until(
            lambda: side.value("litellm_sidecar_internal_errors_total", room="account") == 1
        )


async def test_fault_of_ours_is_502(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in the sidecar costs this WebSocket alone."""

    async def fail(_: object) -> None:
        raise RuntimeError("sk-secret-1")

    async with served(echo) as side:
        with monkeypatch.context() as patch:
            patch.setattr(side.sidecar.upstream, "dial", fail)
            answer = await ask(side.host, wanted())
        assert (answer.status, answer.header(b"x-sidecar-error")) == (502, b"internal_error")
        assert b"sk-" not in answer.body
        assert side.value("litellm_sidecar_internal_errors_total", room="proxy") == 1
        async with joined(side) as client:
            await client.send("hello")
            assert await client.recv() == "hello"


# Over TLS


@asynccontextmanager
async def encrypted(handler: Serve, directory: Path) -> AsyncIterator[Running]:
    """Run a sidecar before a WebSocket server that is reached over TLS."""
    authority = Authority(directory)
    pem, context = authority.file, authority.server("127.0.0.1")
    options: dict[str, Any] = {"ping_interval": None, "max_size": None, "ssl": context}
    async with serve(handler, "127.0.0.1", 0, **options) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with running(f"https://127.0.0.1:{port}", upstream_ca_file=str(pem)) as side:
            yield side


@pytest.mark.parametrize("by", ["server", "client"])
async def test_tls_messages_and_close(by: str, tmp_path: Path) -> None:
    """What is said last comes before the end, in both directions."""
    message = os.urandom(8 * MEGABYTE)
    learned: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def handler(connection: ServerConnection) -> None:
        assert await connection.recv() == message
        await connection.send(message)
        if by == "server":
            await connection.close(4010)
        await connection.wait_closed()
        learned.set_result(connection.close_code or 0)

    async with encrypted(handler, tmp_path) as side, joined(side, max_size=None) as client:
        await client.send(message)
        assert await client.recv() == message
        if by == "client":
            await client.close(4010)
        await asyncio.wait_for(client.wait_closed(), 2)
        assert client.close_code == 4010
        assert await asyncio.wait_for(learned, 2) == 4010
        await until(lambda: requests_counted(side, "101") == 1)


@pytest.mark.parametrize("leaves", ["server", "client"])
async def test_tls_end_that_is_cut(leaves: str, tmp_path: Path) -> None:
    """The loss of one end is the loss of the other within 100 ms."""
    lost = asyncio.Event()

    async def handler(connection: ServerConnection) -> None:
        if leaves == "server":
            await connection.recv()
            connection.transport.abort()
        await connection.wait_closed()
        lost.set()

    async with encrypted(handler, tmp_path) as side, joined(side) as client:
        before = await stands_still(sockets)
        await client.send("go")
        if leaves == "client":
            client.transport.abort()
        async with asyncio.timeout(0.1):
            await client.wait_closed()
            await lost.wait()
        assert client.close_code == 1006
        await until(lambda: sockets() == before - 4)


async def test_tls_end_that_does_not_read_slows_the_other_down(tmp_path: Path) -> None:
    """Flow control reaches through the encryption."""
    count = [0]

    async def handler(connection: ServerConnection) -> None:
        while True:
            await connection.send(b"x" * 100_000)
            count[0] += 100_000
            await asyncio.sleep(0)  # to send need not give the loop its turn

    async with encrypted(handler, tmp_path) as side, opened(side, limit=1024) as (reader, writer):
        sent = await stands_still(lambda: count[0])
        assert MEGABYTE // 10 < sent < 40 * MEGABYTE
        await asyncio.wait_for(reader.readexactly(sent), 10)
        writer.transport.abort()


async def test_tls_end_that_leaves_while_it_does_not_read(tmp_path: Path) -> None:
    """A client that is held back for it learns it too, and does not stay."""
    go = asyncio.Event()

    async def handler(connection: ServerConnection) -> None:
        connection.transport.pause_reading()
        await go.wait()
        connection.transport.close()

    async with encrypted(handler, tmp_path) as side:
        before = await stands_still(sockets)
        async with opened(side, limit=1024) as (reader, writer):
            count = [0]
            task = asyncio.create_task(pour(writer, count))
            await stands_still(lambda: count[0])
            go.set()
            assert await asyncio.wait_for(reader.read(), 2) == b""
            task.cancel()
        await until(lambda: sockets() == before)


# The drain


async def test_drain_lets_it_end() -> None:
    """A WebSocket that runs when the drain begins goes on until its ends are done with it."""
    async with served(echo, drain_timeout_s=30.0) as side, joined(side) as client:
        side.lifecycle.stop()
        await until(lambda: side.sidecar.readiness.draining)
        await asyncio.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            await joined(side)
        await client.send("still there")
        assert await client.recv() == "still there"
        assert not side.task.done()
        await client.close()
        await asyncio.wait_for(asyncio.shield(side.task), 1)
        assert requests_counted(side, "101") == 1


async def test_drain_cuts_it_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """When the time is up both connections are cut, without a close frame of ours."""
    caplog.set_level("INFO")
    learned: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def handler(connection: ServerConnection) -> None:
        await connection.wait_closed()
        learned.set_result(connection.close_code or 0)

    async with served(handler, drain_timeout_s=0.3) as side, joined(side) as client:
        began = monotonic()
        side.lifecycle.stop()
        with pytest.raises(ConnectionClosedError):
            await client.recv()
        assert 0.3 < monotonic() - began < 1
        assert client.close_code == 1006
        assert await asyncio.wait_for(learned, 1) == 1006
        await asyncio.wait_for(asyncio.shield(side.task), 2)
        assert requests_counted(side, "101") == 1
        assert side.value("litellm_sidecar_http_requests_in_flight") == 0
    (drained,) = [record for record in caplog.records if record.message == "drained"]
    assert (drained.ended, drained.cut) == (0, 1)  # type: ignore[attr-defined]
