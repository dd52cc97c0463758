"""The relay against a bare upstream: the bytes, the order of things, and the faults."""

from __future__ import annotations

import asyncio
import gc
import gzip
import hashlib
import itertools
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import quote

import brotli
import pytest
import zstandard

from sidecar.exchange import (
    Dialect,
    End,
    Observation,
    RawHeaders,
    RequestFacts,
    Route,
    Status,
    Tap,
)
from sidecar.observe.tap import tap_for
from tests.support.bodies import event, stream
from tests.support.running import running, until
from tests.support.wire import Answer, Received, ask, connected, read_answer, upstream

pytestmark = pytest.mark.anyio

DATE = b"date: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: litellm\r\n"
USAGE = {"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": 2101}
STREAM = stream(USAGE, {"output_tokens": 16})
POST = (
    b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: llm.test\r\nx-api-key: sk-secret-1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 14\r\n\r\n" + b'{"model": "m"}'
)


def response(
    body: bytes = b"", status: bytes = b"200 OK", *headers: bytes, length: bool = True
) -> bytes:
    lines = [b"HTTP/1.1 " + status, DATE.rstrip(), *headers]
    if length:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(pieces: list[bytes], *headers: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = response(b"", b"200 OK", *headers, b"transfer-encoding: chunked", length=False)
    return head + framed + b"0\r\n\r\n"


def get(target: bytes = b"/x", *headers: bytes, method: bytes = b"GET") -> bytes:
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: llm.test", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


# What the client sees

SSE_TYPE = b"content-type: text/event-stream"
RESPONSES = {
    "repeated set-cookie": response(b"hi", b"200 OK", b"set-cookie: a=1", b"set-cookie: b=2"),
    "order and case": response(b"hi", b"200 OK", b"X-B: 1", b"x-a: 2", b"X-B: 3"),
    "empty value": response(b"hi", b"200 OK", b"x-empty:"),
    "latin-1 value": response(b"hi", b"200 OK", b"x-name: caf\xe9 \xff"),
    "no content": response(b"", b"204 No Content", length=False),
    "reset content": response(b"", b"205 Reset Content"),
    "not modified with a length": response(
        b"", b"304 Not Modified", b"content-length: 500", b'etag: "x"', length=False
    ),
    "status 299": response(b"hi", b"299 Odd"),
    "status 529": response(b'{"type":"error"}', b"529 Overloaded"),
    "status 404": response(b"nope", b"404 Not Found"),
    "status 500": response(b"oops", b"500 Internal Server Error"),
    "redirect": response(b"", b"307 Temporary Redirect", b"location: http://elsewhere/x"),
    "empty body": response(b""),
    "empty chunked body": chunked([]),
    "1-byte chunks": chunked([bytes([i]) for i in range(256)]),
    "stream": chunked([STREAM[i : i + 100] for i in range(0, len(STREAM), 100)], SSE_TYPE),
    "close-delimited": response(b"until the end", b"200 OK", b"connection: close", length=False),
    "gzip": response(gzip.compress(STREAM), b"200 OK", SSE_TYPE, b"content-encoding: gzip"),
    "br": response(brotli.compress(STREAM), b"200 OK", SSE_TYPE, b"content-encoding: br"),
    "zstd": response(
        zstandard.ZstdCompressor().compress(STREAM), b"200 OK", SSE_TYPE, b"content-encoding: zstd"
    ),
    "unknown coding": response(b"\0\1\2", b"200 OK", SSE_TYPE, b"content-encoding: x-odd"),
    "damaged coding": response(b"\0\1\2", b"200 OK", SSE_TYPE, b"content-encoding: gzip"),
    "hop-by-hop": response(
        b"hi", b"200 OK", b"keep-alive: timeout=5", b"connection: keep-alive, x-hop", b"x-hop: 1"
    ),
    "ours in name only": response(b"hi", b"200 OK", b"via: 1.1 x", b"x-sidecar-error: theirs"),
}


@pytest.mark.parametrize(
    "request_", [POST, get(), get(method=b"HEAD")], ids=["POST", "GET", "HEAD"]
)
@pytest.mark.parametrize("name", RESPONSES)
async def test_response_is_what_a_direct_client_gets(name: str, request_: bytes) -> None:
    """Status, header order and repeats, and body are those of the direct call."""
    raw = RESPONSES[name]
    if request_.startswith(b"HEAD"):
        raw = raw[: raw.index(b"\r\n\r\n") + 4]

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        if b"connection: close" in raw:
            writer.close()

    async with upstream(serve) as up, running(up.url) as side:
        direct = await ask(("127.0.0.1", up.port), request_)
        through = await ask(side.host, request_)
    assert through.complete
    assert direct.complete
    assert (through.status, through.body) == (direct.status, direct.body)
    expected = [p for p in direct.end_to_end() if name != "hop-by-hop" or p[0] != b"x-hop"]
    assert through.end_to_end() == expected
    if b"content-length:" not in raw and through.body:
        assert through.header(b"transfer-encoding") == b"chunked"


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(get(b"/a%2Fb//c/../d;x=%zz?q=1&q=%20"), id="odd target"),
        pytest.param(get(b'/"<>|{}^`'), id="odd characters"),
        pytest.param(get(b"*", method=b"OPTIONS"), id="OPTIONS *"),
        pytest.param(get(method=b"DELETE"), id="DELETE"),
        pytest.param(get(method=b"PROPFIND"), id="PROPFIND"),
        pytest.param(get(b"/", b"X-B: 1", b"x-a: caf\xe9", b"X-B: 2", b"x-empty:"), id="headers"),
        pytest.param(get(b"/", b"Cookie: a=1", b"Cookie: b=2"), id="cookies"),
        pytest.param(
            get(b"/", b"Authorization: Bearer sk-1", b"Accept-Encoding: gzip, br"), id="credentials"
        ),
        pytest.param(POST, id="body with a length"),
        pytest.param(get(b"/", b"Content-Length: 0", method=b"POST"), id="empty body"),
        pytest.param(
            get(b"/", b"Transfer-Encoding: chunked", method=b"PUT")
            + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
            id="chunked body",
        ),
        pytest.param(b"GET /old HTTP/1.0\r\nHost: llm.test\r\n\r\n", id="HTTP/1.0"),
    ],
)
async def test_request_is_what_a_direct_client_sends(request_: bytes) -> None:
    """Method, exact target, header order and repeats, and body reach the upstream."""
    async with upstream(response(b"ok")) as up, running(up.url) as side:
        await ask(("127.0.0.1", up.port), request_)
        assert (await ask(side.host, request_)).status == 200
    direct, through = up.received
    assert through.line.split(b" ")[:2] == direct.line.split(b" ")[:2]
    added = [(b"x-forwarded-for", b"127.0.0.1")]
    assert sorted(through.headers) == sorted(direct.headers + added)
    kept = [pair for pair in through.headers if pair not in added]
    framing = (b"transfer-encoding", b"chunked")
    assert [p for p in kept if p != framing] == [p for p in direct.headers if p != framing]
    assert through.body == direct.body


async def test_connection_headers_stay_on_their_hop() -> None:
    """What belongs to the client's connection, or is nominated, does not go on; framing,
    Host and credentials cannot be nominated away."""
    request = get(
        b"/",
        b"Connection: x-hop, content-length, host, authorization, keep-alive",
        b"Keep-Alive: 5",
        b"Proxy-Connection: x",
        b"TE: trailers",
        b"Trailer: x",
        b"Expect: 100-continue",
        b"X-Hop: 1",
        b"Authorization: Bearer sk-1",
        b"Content-Length: 2",
        method=b"POST",
    )
    async with upstream(response(b"ok")) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(request)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await read_answer(reader)).status == 200
        writer.close()
    (seen,) = up.received
    names = [name for name, _ in seen.headers]
    assert names == [b"host", b"authorization", b"content-length", b"x-forwarded-for"]
    assert seen.body == b"hi"


async def test_no_headers_of_ours_are_added() -> None:
    """`date` and `server` come from the upstream alone; there is no `via`."""
    bare = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    async with upstream(bare) as up, running(up.url) as side:
        answer = await ask(side.host, get())
    assert answer.headers == [(b"content-length", b"0")]


async def test_connections_are_kept_on_both_sides() -> None:
    """Two requests on one client connection use one upstream connection."""
    async with upstream(response(b"ok")) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        for _ in range(5):
            writer.write(POST)
            assert (await read_answer(reader)).body == b"ok"
        writer.close()
    assert up.connections <= 2  # one of them was the probe's


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_exchanges_leave_no_cycles_of_references(framing: str) -> None:
    """What an exchange held, headers with keys among it, is freed when it ends, and not when
    the collector comes by."""
    raw = response(STREAM, b"200 OK", SSE_TYPE) if framing == "length" else chunked([STREAM] * 3)
    upload = get(b"/v1/messages", b"Transfer-Encoding: chunked", method=b"POST")
    async with upstream(raw) as up, running(up.url) as side:
        for request_ in (POST, get(), upload + b"2\r\n{}\r\n0\r\n\r\n"):
            assert (await ask(side.host, request_)).complete
        gc.collect()
        gc.disable()
        try:
            for request_ in (POST, get(), upload + b"2\r\n{}\r\n0\r\n\r\n"):
                assert (await ask(side.host, request_)).complete
            await asyncio.sleep(0.05)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = {
                type(garbage).__name__
                for garbage in gc.garbage
                if type(garbage).__module__.startswith("sidecar.")
            }
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert ours <= {"Edge"}, "a connection may refer to itself, an exchange may not"


# Large bodies, slow sides, the first byte


async def test_first_event_passes_before_the_second_is_sent() -> None:
    """The first event reaches the client while the upstream still holds the second."""
    held = asyncio.Event()
    first, rest = STREAM[:200], STREAM[200:]

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = response(b"", b"200 OK", SSE_TYPE, b"transfer-encoding: chunked", length=False)
        writer.write(head + b"%x\r\n%b\r\n" % (len(first), first))
        await held.wait()
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))

    async with upstream(serve) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(POST)
        async with asyncio.timeout(5):
            received = b""
            while first not in received:
                received += await reader.read(65536)
            held.set()
            while not received.endswith(b"0\r\n\r\n"):
                received += await reader.read(65536)
        writer.close()
        assert side.value("litellm_cached_tokens_metric_total", model="m") == 2101


async def test_50_megabytes_both_ways() -> None:
    """Large bodies come out as they went in."""
    piece = bytes(range(256)) * 4096
    count = 50

    async def serve(
        received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        digest = hashlib.sha256()
        left = int(received.values(b"content-length")[0])
        assert left == count * len(piece)
        while left:
            data = await reader.read(min(left, 1 << 20))
            digest.update(data)
            left -= len(data)
        writer.write(
            response(
                b"",
                b"200 OK",
                b"x-digest: " + digest.hexdigest().encode(),
                b"content-length: %d" % (count * len(piece)),
                length=False,
            )
        )
        for _part in range(count):
            writer.write(piece)
            await writer.drain()

    expected = hashlib.sha256(piece * count)
    async with upstream(serve, read_body=False) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(get(b"/", b"Content-Length: %d" % (count * len(piece)), method=b"POST"))
        for _ in range(count):
            writer.write(piece)
            await writer.drain()
        answer = await read_answer(reader)
        writer.close()
    assert answer.complete
    assert hashlib.sha256(answer.body).digest() == expected.digest()
    assert answer.header(b"x-digest") == expected.hexdigest().encode()


@pytest.mark.parametrize("at_once", [0, 4_000_000], ids=["bit by bit", "much at once"])
async def test_slow_client_slows_the_upstream_down(at_once: int) -> None:
    """What the client does not read is not fetched: the upstream's writes block, also where
    what comes with the head is more already than the client takes."""
    sent = 0

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        head = response(b"", b"200 OK", b"content-length: 200000000", length=False)
        writer.write(head + b"x" * at_once)
        for _part in range(1000):
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    async with upstream(serve) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host, limit=1)
        writer.write(get())
        await until(lambda: sent > 0)
        before = -1
        while sent != before:  # until it stands still
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 40_000_000
        writer.transport.abort()
        del reader


# Faults of the upstream


async def test_head_has_an_answer_of_our_own_too() -> None:
    """What the sidecar says in its own name comes without its body, and the connection goes on."""

    async def wait(_: Received, __: asyncio.StreamReader, ___: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with running("http://127.0.0.1:9") as side, connected(side.host) as client:
        for _ in range(2):
            answer = await client.ask(get(b"/v1/models", method=b"HEAD"))
            assert (answer.status, answer.body, answer.complete) == (502, b"", True)
            assert int(answer.header(b"content-length") or 0) > 50
    async with (
        upstream(wait) as up,
        running(up.url, max_concurrent_requests=1) as side,
        connected(side.host) as first,
        connected(side.host) as second,
    ):
        first.send(POST)
        await until(lambda: len(up.received) == 1)
        answer = await second.ask(get(b"/v1/models", method=b"HEAD"))
        assert (answer.status, answer.complete) == (503, True)


async def test_no_upstream_is_502_in_the_dialect_of_the_route() -> None:
    """Without an upstream each request gets a 502 that its client can read."""
    async with running("http://127.0.0.1:9") as side:
        anthropic = await ask(side.host, POST)
        other = await ask(side.host, get(b"/v1/models"))
        assert side.value("litellm_sidecar_upstream_failures_total", reason="connect_failed") == 2
        assert (
            side.value("litellm_sidecar_observations_total", status="error", model="unknown") == 1
        )
    assert anthropic.status == other.status == 502
    assert anthropic.header(b"x-sidecar-error") == b"connect_failed"
    error = json.loads(anthropic.body)
    assert error["type"] == "error"
    assert error["error"]["type"] == "api_error"
    assert json.loads(other.body)["error"]["code"] == "connect_failed"
    for answer in (anthropic, other):
        assert b"127.0.0.1" not in answer.body
        assert b"sk-" not in answer.body


Serve = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _reset(writer: asyncio.StreamWriter) -> None:
    # With uvloop alone, an abort sends FIN like a close.
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()


async def _hang(_: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def _sends(raw: bytes) -> Serve:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        writer.close()

    return serve


@pytest.mark.parametrize(
    ("serve", "status", "reason"),
    [
        pytest.param(_close, 502, b"stale_connection", id="closed"),
        pytest.param(_reset, 502, b"connection_lost", id="reset"),
        pytest.param(_hang, 504, b"first_byte_timeout", id="hangs"),
        pytest.param(_sends(b"garbage\r\n\r\n"), 502, b"malformed_response", id="garbage"),
        pytest.param(_sends(b"HTTP/1.1 200 OK\r\nx"), 502, b"stale_connection", id="half a head"),
        pytest.param(
            _sends(b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n"),
            502,
            b"malformed_response",
            id="status 600",
        ),
        pytest.param(
            _sends(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"),
            502,
            b"malformed_response",
            id="status 101",
        ),
        pytest.param(
            _sends(b"HTTP/1.1 200 OK\r\ncontent-length: 2, 3\r\n\r\nhi"),
            502,
            b"malformed_response",
            id="two lengths",
        ),
    ],
)
async def test_upstream_that_gives_no_head(serve: Serve, status: int, reason: bytes) -> None:
    """Whatever the upstream does instead of answering, the client is told, and once."""

    async def handler(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(writer)

    async with upstream(handler) as up, running(up.url, first_byte_timeout_s=0.3) as side:
        answer = await ask(side.host, POST)
        assert (answer.status, answer.header(b"x-sidecar-error")) == (status, reason)
        assert side.value("litellm_sidecar_upstream_failures_total", reason=reason.decode()) == 1
    assert len(up.received) == 1, "a POST is never sent twice"


async def test_idempotent_request_is_sent_again_once() -> None:
    """A GET whose connection turns out dead gets a second one; a POST does not."""
    calls = itertools.count()

    async def handler(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if next(calls) % 2:
            writer.write(response(b"ok"))
        else:
            writer.close()

    async with upstream(handler) as up, running(up.url) as side:
        assert (await ask(side.host, get())).body == b"ok"
        assert (await ask(side.host, POST)).status == 502


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            response(b"", b"200 OK", SSE_TYPE, b"content-length: 9999", length=False)
            + STREAM[:-60],
            id="short of its length",
        ),
        pytest.param(
            chunked([STREAM], SSE_TYPE)[: -len(b"0\r\n\r\n") - 60], id="in the middle of a chunk"
        ),
        pytest.param(chunked([STREAM[:-60]], SSE_TYPE)[: -len(b"0\r\n\r\n")], id="between chunks"),
    ],
)
async def test_upstream_that_dies_in_the_body_cuts_the_client(raw: bytes) -> None:
    """A body that broke off is never ended as if it were whole; what it said is counted."""
    async with (
        upstream(lambda _, __, writer: _sends(raw)(writer)) as up,
        running(up.url) as side,
    ):
        direct = await ask(("127.0.0.1", up.port), POST)
        through = await ask(side.host, POST)
        assert not through.complete
        assert (through.status, through.body) == (direct.status, direct.body)
        assert side.value("litellm_sidecar_upstream_failures_total", reason="body_cut") == 1
        assert side.value("litellm_sidecar_observations_total", status="partial", model="m") == 1
        assert side.value("litellm_sidecar_input_tokens_total", cache="read") == 2101


async def test_upstream_that_dies_under_an_http_1_0_client() -> None:
    """Its body would end with the connection: a reset says that it did not."""
    raw = chunked([STREAM[:-60]], SSE_TYPE)[: -len(b"0\r\n\r\n")]
    async with (
        upstream(lambda _, __, writer: _sends(raw)(writer)) as up,
        running(up.url) as side,
    ):
        answer = await ask(side.host, POST.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (answer.status, answer.body, answer.complete) == (200, STREAM[:-60], False)


async def test_idle_upstream_is_cut_after_its_time() -> None:
    """With an idle time-out set, a body that stops coming is cut."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked([STREAM[:200]], SSE_TYPE)[:-5])
        await asyncio.sleep(3600)

    async with upstream(serve) as up, running(up.url, idle_timeout_s=0.3) as side:
        answer = await ask(side.host, POST)
        assert (answer.complete, answer.body) == (False, STREAM[:200])
        assert side.value("litellm_sidecar_upstream_failures_total", reason="idle_timeout") == 1


# The client


async def test_upstream_that_does_not_take_the_request_is_504() -> None:
    """The client, whose upload waits, is told; its connection lives on."""

    async def serve(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if received.line.startswith(b"GET"):
            writer.write(response(b"ok"))
        else:
            await asyncio.sleep(3600)

    size = 30_000_000
    async with (
        upstream(serve, read_body=False) as up,
        running(up.url, send_timeout_s=0.3) as side,
        connected(side.host) as client,
    ):
        client.send(POST.replace(b"Length: 14", b"Length: %d" % size)[:-14] + bytes(size))
        answer = await client.answer()
        assert (answer.status, answer.header(b"x-sidecar-error")) == (504, b"send_timeout")
        assert json.loads(answer.body)["type"] == "error"
        assert (await client.ask(get())).body == b"ok"
        assert side.value("litellm_sidecar_upstream_failures_total", reason="send_timeout") == 1


async def test_client_that_leaves_closes_the_upstream() -> None:
    """Within 100 ms of the client's leaving the upstream's connection is closed, and what
    the stream had said is counted as partial."""
    start = event("message_start", {"message": {"usage": USAGE}})
    gone = asyncio.Event()

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = response(b"", b"200 OK", SSE_TYPE, b"transfer-encoding: chunked", length=False)
        writer.write(head + b"%x\r\n%b\r\n" % (len(start), start))
        assert await reader.read() == b""
        gone.set()

    async with upstream(serve) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(POST)
        received = b""
        while start not in received:
            received += await reader.read(65536)
        writer.close()
        async with asyncio.timeout(0.1):
            await gone.wait()
        await until(lambda: side.value("litellm_sidecar_client_disconnects_total") == 1)
        assert side.value("litellm_sidecar_http_requests_total", code="499") == 1
        assert side.value("litellm_sidecar_observations_total", status="partial", model="m") == 1
        assert side.value("litellm_cached_tokens_metric_total", model="m") == 2101
        assert side.value("litellm_sidecar_output_tokens_total") == 1
        assert side.value("litellm_sidecar_http_requests_in_flight") == 0


@pytest.mark.parametrize("sent", [len(POST), len(POST) - 5], ids=["waiting", "uploading"])
async def test_client_that_leaves_before_the_head(sent: int) -> None:
    """A client that does not wait for its answer, or does not finish its request."""
    gone = asyncio.Event()

    async def serve(_: Received, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()
        while not reader.at_eof():
            await reader.read()
        gone.set()

    async with upstream(serve, read_body=False) as up, running(up.url) as side:
        _, writer = await asyncio.open_connection(*side.host)
        writer.write(POST[:sent])
        await until(lambda: up.received)
        writer.close()
        async with asyncio.timeout(2):
            await gone.wait()
        await until(lambda: side.value("litellm_sidecar_http_requests_total", code="499") == 1)
        assert side.value("litellm_sidecar_internal_errors_total") == 0


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(get(b"/", b"Host: other"), 400, id="two hosts"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", 200, id="no host in HTTP/1.0"),
        pytest.param(b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="control in target"),
        pytest.param(b"NONSENSE\r\n\r\n", 400, id="no request line"),
        pytest.param(get(b"/", b"Content-Length: x"), 400, id="odd length"),
        pytest.param(
            get(b"/", b"Content-Length: 3", b"Transfer-Encoding: chunked"), 400, id="two framings"
        ),
    ],
)
async def test_malformed_requests(request_: bytes, status: int) -> None:
    """What is not a request gets 400, and nothing of it reaches the upstream."""
    async with upstream(response(b"ok")) as up, running(up.url) as side:
        assert (await ask(side.host, request_)).status == status
        assert len(up.received) == (1 if status == 200 else 0)


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(POST, id="length"),
        pytest.param(
            get(b"/v1/messages", b"Transfer-Encoding: chunked", method=b"POST")
            + b"e\r\n"
            + POST[-14:]
            + b"\r\n0\r\n\r\n",
            id="chunked",
        ),
    ],
)
async def test_body_over_the_limit_is_413(request_: bytes) -> None:
    """A body over the limit is refused in the dialect, and the connection lives on."""
    async with upstream(response(b"ok")) as up, running(up.url, max_request_body_bytes=13) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(request_)
        answer = await read_answer(reader)
        assert (answer.status, answer.header(b"x-sidecar-error")) == (413, b"request_too_large")
        assert json.loads(answer.body)["error"]["type"] == "request_too_large"
        writer.write(get())
        assert (await read_answer(reader)).body == b"ok"
        writer.close()


async def test_body_over_the_limit_with_expect_closes() -> None:
    """A client that waits for 100 Continue is refused before it sends its body."""
    request = POST.replace(b"Content-Type", b"Expect: 100-continue\r\nContent-Type")
    async with upstream(response(b"ok")) as up, running(up.url, max_request_body_bytes=13) as side:
        answer = await ask(side.host, request[:-14])
        assert (answer.status, answer.header(b"connection")) == (413, b"close")


async def test_413_is_read_by_a_client_that_still_sends() -> None:
    """The rest of the upload is read, so that the answer is not lost with it."""
    async with upstream(response(b"ok")) as up, running(up.url, max_request_body_bytes=13) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(get(b"/", b"Content-Length: 20000000", method=b"POST") + b"x" * 20_000_000)
        await asyncio.wait_for(writer.drain(), 10)
        assert (await read_answer(reader)).status == 413
        writer.write(get())
        assert (await read_answer(reader)).body == b"ok"
        writer.close()


@pytest.mark.parametrize("together", [True, False], ids=["one segment", "two segments"])
@pytest.mark.parametrize("protocol", [b"h2c", b"HTTP/2.0, x", b"websocket"])
async def test_body_behind_an_upgrade_is_never_taken_for_a_request(
    together: bool, protocol: bytes
) -> None:
    """A request that offers an upgrade works as if it did not, and keeps its body."""
    smuggled = get(b"/smuggled")
    head = get(
        b"/v1/messages",
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: " + protocol,
        b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
        b"Content-Length: %d" % len(smuggled),
        method=b"POST",
    )
    async with upstream(response(b"ok")) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(head + smuggled if together else head)
        if not together:
            await asyncio.sleep(0.05)
            writer.write(smuggled)
        assert (await read_answer(reader)).body == b"ok"
        writer.write(get(b"/next"))
        assert (await read_answer(reader)).body == b"ok"
        writer.close()
    assert [seen.line.split(b" ")[1] for seen in up.received] == [b"/v1/messages", b"/next"]
    assert up.received[0].body == smuggled
    assert not up.received[0].values(b"upgrade")


# X-Forwarded-*

FORGED = (
    b"X-Forwarded-For: 203.0.113.7",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Host: evil.test",
    b"X-Forwarded-Port: 443",
)


@pytest.mark.parametrize(
    ("source", "sent", "expected"),
    [
        pytest.param("127.0.0.1", (), {b"for": [b"127.0.0.1"]}, id="trusted, nothing"),
        pytest.param(
            "127.0.0.1",
            FORGED,
            {
                b"for": [b"203.0.113.7"],
                b"proto": [b"https"],
                b"host": [b"evil.test"],
                b"port": [b"443"],
            },
            id="trusted, all",
        ),
        pytest.param(
            "127.0.0.1",
            (b"X-Forwarded-For: a, b", b"X-Forwarded-For: c"),
            {b"for": [b"a, b", b"c"]},
            id="trusted, as they came",
        ),
        pytest.param(
            "127.0.0.2", (), {b"for": [b"127.0.0.2"], b"proto": [b"http"]}, id="untrusted, nothing"
        ),
        pytest.param(
            "127.0.0.2",
            FORGED,
            {b"for": [b"127.0.0.2"], b"proto": [b"http"]},
            id="untrusted, forged",
        ),
        pytest.param(
            "127.0.0.2",
            (b"Connection: x-forwarded-for, x-forwarded-proto", *FORGED),
            {b"for": [b"127.0.0.2"], b"proto": [b"http"]},
            id="untrusted, nominated",
        ),
    ],
)
async def test_forwarded_headers(
    source: str, sent: tuple[bytes, ...], expected: dict[bytes, list[bytes]]
) -> None:
    """LiteLLM sees what it would have seen without us, and nothing forged."""
    ok = response(b"ok")
    async with upstream(ok) as up, running(up.url, trusted_proxies="127.0.0.1/32") as side:
        await ask(side.host, get(b"/", *sent), source=source)
    (seen,) = up.received
    forwarded = [n.removeprefix(b"x-forwarded-") for n, _ in seen.headers if b"forwarded" in n]
    assert {name: seen.values(b"x-forwarded-" + name) for name in forwarded} == expected


async def test_forged_headers_of_a_client_that_is_gone() -> None:
    """A client that resets its connection behind its request has no address to be found, and
    is not believed for it."""
    async with upstream(response(b"ok")) as up, running(up.url, trusted_proxies="10.0.0.0/8") as s:
        await until(lambda: up.connections == 1)
        client = socket.create_connection(s.host)
        client.sendall(get(b"/key/generate", *FORGED, b"Content-Length: 0", method=b"POST"))
        # Both arrive before the loop takes the connection.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await until(lambda: s.value("litellm_sidecar_http_requests_total") == 1)
        await asyncio.sleep(0.05)
    for seen in up.received:
        assert [name for name, _ in seen.headers if b"forwarded" in name] == [b"x-forwarded-proto"]
        assert seen.values(b"x-forwarded-proto") == [b"http"]


# An observer that fails


class Broken:
    """An observer that raises on every call, from the one that is named on."""

    def __init__(self, works: str = "") -> None:
        self._works = works

    @property
    def first_token_seen(self) -> bool:
        self._fail("first_token")
        return False

    def _fail(self, name: str) -> None:
        if name not in self._works:
            raise RuntimeError(f"{name} with sk-secret-1")

    def read_request(self, route: Route, dialect: Dialect, headers: RawHeaders) -> Broken:
        self._fail("read_request")
        return self

    def tap(self, dialect: Dialect, status_code: int, headers: RawHeaders) -> Broken:
        self._fail("tap")
        return self

    def feed(self, chunk: bytes) -> None:
        self._fail("feed")

    def finish(self, end: End | None = None) -> object:
        self._fail("finish")
        if end is None:  # the reader of the request is asked for steps
            self._fail("steps")
            return iter(())
        return Observation(Status.COMPLETE)

    def facts(self) -> RequestFacts:
        self._fail("facts")
        return RequestFacts()


@pytest.mark.parametrize(
    ("works", "status"),
    [
        pytest.param("", "invalid", id="everything"),
        pytest.param("tap read_request", "invalid", id="reading"),
        pytest.param("tap read_request feed", "invalid", id="the first token"),
        pytest.param("tap read_request feed first_token", "invalid", id="the end"),
        pytest.param("tap read_request feed first_token finish", "complete", id="the request"),
        pytest.param("tap read_request feed first_token finish steps", "complete", id="facts"),
    ],
)
async def test_broken_observer_changes_no_byte(
    works: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Observation can fail in any way: the response is the same, and the fault is counted."""
    raw = chunked([STREAM[i : i + 50] for i in range(0, len(STREAM), 50)], SSE_TYPE)
    broken = Broken(works)
    async with upstream(raw) as up, running(up.url, observer=broken) as side:  # type: ignore[arg-type]
        answers: list[Answer] = [await ask(side.host, POST) for _ in range(3)]
        direct = await ask(("127.0.0.1", up.port), POST)
        assert side.value("litellm_sidecar_internal_errors_total", room="observe") >= 3
        assert side.value("litellm_sidecar_observations_total", status=status) == 3
        assert side.value("litellm_sidecar_http_requests_total", code="200") == 3
    assert answers == [direct] * 3
    assert sum(record.message == "internal_error" for record in caplog.records) == 1
    assert "sk-secret-1" not in caplog.text


@pytest.mark.parametrize(("method", "in_flight"), [("_take_answer", 0), ("begin", -1)])
async def test_broken_accounts_change_no_byte(
    method: str, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can the ledger's failing reach a response."""
    async with upstream(response(STREAM, b"200 OK", SSE_TYPE)) as up, running(up.url) as side:
        monkeypatch.setattr(side.sidecar.ledger, method, lambda *_: 1 / 0)
        answer = await ask(side.host, POST)
        assert (answer.complete, answer.body) == (True, STREAM)
        assert side.value("litellm_sidecar_internal_errors_total", room="account") == 1
        assert side.value("litellm_sidecar_http_requests_in_flight") == in_flight


class Slow:
    """An observer whose reader of requests takes many steps to know the model.

    Args:
        steps: how many; None for ever more.
        fails: whether it fails at their end.
    """

    def __init__(self, steps: int | None, *, fails: bool = False) -> None:
        self._steps = steps
        self._fails = fails
        self._facts = RequestFacts()

    def read_request(self, route: Route, dialect: Dialect, headers: RawHeaders) -> Slow:
        return Slow(self._steps, fails=self._fails)

    def tap(self, dialect: Dialect, status_code: int, headers: RawHeaders) -> Tap:
        return tap_for(dialect, status_code, headers)

    def feed(self, chunk: bytes) -> None:
        pass

    def finish(self) -> Iterator[None]:
        for _ in itertools.count() if self._steps is None else range(self._steps):
            yield
        if self._fails:
            raise RuntimeError("the last step")
        self._facts = RequestFacts(model="asked")

    def facts(self) -> RequestFacts:
        return self._facts


@pytest.mark.parametrize("size", [70_000, 400_000])
@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize(
    ("slow", "model", "failed"),
    [
        pytest.param(Slow(100), "asked", 0, id="many steps"),
        pytest.param(Slow(None), "unknown", 0, id="no end"),
        pytest.param(Slow(100, fails=True), "unknown", 1, id="a failure"),
    ],
)
async def test_answer_that_comes_before_its_request_is_read(
    slow: Slow, model: str, failed: int, rewritten: bool, size: int
) -> None:
    """What is left to read is read then; the answer waits no longer for it than a moment."""
    body = b" " * size  # more than is read in one go
    raw = get(b"/v1/messages", b"Content-Length: %d" % len(body), method=b"POST") + body
    up_ = upstream(response(STREAM, b"200 OK", SSE_TYPE))
    rewrite = "openai" if rewritten else "off"
    async with up_ as up, running(up.url, observer=slow, rewrite_usage=rewrite) as side:
        answer = await ask(side.host, raw)
        assert answer.complete
        assert side.value("litellm_sidecar_output_tokens_total", model=model) == 16
        assert side.value("litellm_sidecar_internal_errors_total", room="observe") == failed


async def test_requests_are_read_while_the_upstream_works() -> None:
    """All that wait are, each in its turn; one that has no end keeps nobody from an answer."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(response(STREAM, b"200 OK", SSE_TYPE))

    for slow, model in ((Slow(100), "asked"), (Slow(None), "unknown")):
        async with upstream(serve) as up, running(up.url, observer=slow) as side:
            answers = await asyncio.gather(*[ask(side.host, POST) for _ in range(20)])
            assert all(answer.complete for answer in answers)
            assert side.value("litellm_sidecar_output_tokens_total", model=model) == 320
            assert side.value("litellm_sidecar_internal_errors_total") == 0


async def test_model_in_the_path_is_the_one_that_was_asked_for() -> None:
    """An ARN comes percent-encoded, and a body that says otherwise is not believed."""
    arn = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc"
    target = f"/bedrock/model/{quote(arn, safe='')}/converse"
    body = b'{"model": "other", "messages": []}'
    raw = get(target.encode(), b"Content-Length: %d" % len(body), method=b"POST") + body
    usage = {"inputTokens": 7, "outputTokens": 16, "cacheReadInputTokens": 2101}
    answer = response(
        json.dumps({"usage": usage}).encode(), b"200 OK", b"content-type: application/json"
    )
    async with (
        upstream(lambda _, __, writer: _sends(answer)(writer)) as up,
        running(up.url) as side,
    ):
        assert (await ask(side.host, raw)).complete
        labels = {"model": arn, "provider": "bedrock", "cache": "read"}
        assert side.value("litellm_sidecar_input_tokens_total", **labels) == 2101
        assert (
            side.value(
                "litellm_sidecar_observations_total", route="/bedrock/{endpoint}", status="complete"
            )
            == 1
        )
