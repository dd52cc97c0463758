"""The relay where the usage of answers is rewritten, and where that is off."""

from __future__ import annotations

import asyncio
import gzip
import re
from typing import Any

import pytest
from starlette.types import Message

from sidecar.exchange import Rewrite
from sidecar.observe import rewrite
from sidecar.proxy.relay import Relay
from tests.proxy.test_relay import (
    POST,
    SSE_TYPE,
    STREAM,
    USAGE,
    _sends,
    chunked,
    get,
    response,
)
from tests.support.bodies import event, message
from tests.support.running import Running, running, until
from tests.support.wire import Answer, Received, ask, upstream

pytestmark = pytest.mark.anyio

JSON_TYPE = b"content-type: application/json"
ADDED = b',"prompt_tokens_details":{"cached_tokens":2101}'
BODY = message(USAGE)
START = event("message_start", {"message": {"usage": USAGE}})
VALIDATORS = (
    b'ETag: "x"',
    b"Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT",
    b"Content-MD5: AAAA",
    b"Digest: sha-256=AAAA",
    b"Content-Digest: sha-256=:AAAA:",
    b"Repr-Digest: sha-256=:AAAA:",
)


def results(side: Running) -> dict[str, float]:
    """Return `rewrites_total` by result, without the zeros."""
    name = "litellm_sidecar_rewrites_total"
    found = {result.value: side.value(name, result=result) for result in Rewrite}
    return {result: count for result, count in found.items() if count}


async def both(
    raw: bytes, request: bytes = POST, **settings: Any
) -> tuple[Answer, Answer, dict[str, float]]:
    """Ask an upstream directly and through a sidecar that rewrites."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        if b"connection: close" in raw:
            writer.close()

    values = {"rewrite_usage": "openai"} | settings
    async with upstream(serve) as up, running(up.url, **values) as side:
        direct = await ask(("127.0.0.1", up.port), request)
        through = await ask(side.host, request)
        return direct, through, results(side)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(response(BODY, b"200 OK", JSON_TYPE, *VALIDATORS, b"x-a: 1"), id="length"),
        pytest.param(
            chunked([BODY[i : i + 7] for i in range(0, len(BODY), 7)], JSON_TYPE, *VALIDATORS),
            id="chunked",
        ),
        pytest.param(
            response(BODY, b"200 OK", JSON_TYPE, b"connection: close", length=False),
            id="close-delimited",
        ),
    ],
)
async def test_json_answer(raw: bytes) -> None:
    """The member is in the usage, the length follows, and what would deny it is dropped."""
    direct, through, counted = await both(raw)
    assert direct.body == BODY
    assert through.complete
    end = BODY.index(b"}", BODY.index(b'"usage": {"input'))
    assert through.body == BODY[:end] + ADDED + BODY[end:]
    dropped = {line.partition(b":")[0].lower() for line in VALIDATORS}
    length = b"%d" % len(through.body)
    assert through.end_to_end() == [
        (name, length if name == b"content-length" else value)
        for name, value in direct.end_to_end()
        if name not in dropped
    ]
    assert counted == {"rewritten": 1}


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            chunked(
                [STREAM[i : i + 100] for i in range(0, len(STREAM), 100)], SSE_TYPE, *VALIDATORS
            ),
            id="chunked",
        ),
        pytest.param(response(STREAM, b"200 OK", SSE_TYPE), id="length"),
        pytest.param(
            response(STREAM, b"200 OK", SSE_TYPE, b"connection: close", length=False),
            id="close-delimited",
        ),
    ],
)
async def test_stream(raw: bytes) -> None:
    """The member is in start and delta; how long a stream will be is not said."""
    _, through, counted = await both(raw)
    assert through.complete
    assert through.body.count(ADDED) == 2
    assert through.body.replace(ADDED, b"") == STREAM
    assert through.header(b"transfer-encoding") == b"chunked"
    assert through.header(b"content-length") is None
    assert through.header(b"etag") is None
    assert counted == {"rewritten": 1}


NO_TRANSFORM = b"cache-control: no-cache, no-transform"
UNREPORTED = message({"input_tokens": 7})
HUGE = message(USAGE | {"pad": "x" * (4 * 1024 * 1024)})
UNTOUCHED = {
    "unreported": (response(UNREPORTED, b"200 OK", JSON_TYPE, *VALIDATORS), "unreported"),
    "no JSON": (response(b'{"usage":}', b"200 OK", JSON_TYPE, *VALIDATORS), "unreadable"),
    "empty": (response(b"", b"200 OK", JSON_TYPE), "missing"),
    "html": (response(BODY, b"200 OK", b"content-type: text/html", *VALIDATORS), "missing"),
    "over the bound": (response(HUGE, b"200 OK", JSON_TYPE, *VALIDATORS), "oversized"),
    "over the bound, chunked": (chunked([HUGE], JSON_TYPE), "oversized"),
    "coded": (
        response(gzip.compress(BODY), b"200 OK", JSON_TYPE, b"content-encoding: gzip", *VALIDATORS),
        "encoded",
    ),
    "coded stream": (
        response(gzip.compress(STREAM), b"200 OK", SSE_TYPE, b"content-encoding: gzip"),
        "encoded",
    ),
    "forbidden": (response(BODY, b"200 OK", JSON_TYPE, NO_TRANSFORM, *VALIDATORS), "no_transform"),
    "partial content": (
        response(
            BODY,
            b"206 Partial Content",
            JSON_TYPE,
            b"content-range: bytes 0-1/2",
            b"accept-ranges: bytes",
            *VALIDATORS,
        ),
        None,
    ),
    "no content": (response(b"", b"204 No Content", length=False), None),
    "error": (response(BODY, b"400 Bad Request", JSON_TYPE, *VALIDATORS), None),
    "error of a provider": (response(BODY, b"529 Overloaded", JSON_TYPE), None),
}


@pytest.mark.parametrize("name", UNTOUCHED)
async def test_what_passes_untouched(name: str) -> None:
    """Head and body are those of the direct answer, and why is counted."""
    raw, result = UNTOUCHED[name]
    direct, through, counted = await both(raw)
    assert through.complete
    assert (through.status, through.body) == (direct.status, direct.body)
    assert through.end_to_end() == direct.end_to_end()
    assert counted == ({result: 1} if result else {})


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(get(b"/v1/messages"), id="GET"),
        pytest.param(get(b"/v1/messages", method=b"HEAD"), id="HEAD"),
        pytest.param(POST.replace(b"?beta", b"/count_tokens?beta"), id="count_tokens"),
        pytest.param(POST.replace(b"/v1/messages", b"/v1/chat/completions"), id="chat"),
        pytest.param(
            POST.replace(b"x-api-key", b"Cache-Control: no-transform\r\nx-api-key"), id="forbidden"
        ),
    ],
)
async def test_requests_whose_answers_pass_untouched(request_: bytes) -> None:
    """What is not observed is not rewritten, and its request goes on as it came."""
    raw = response(BODY, b"200 OK", JSON_TYPE, *VALIDATORS)
    if request_.startswith(b"HEAD"):
        raw = raw[: -len(BODY)]
    request_ = request_.replace(b"Host:", b"Accept-Encoding: gzip, br\r\nHost:")
    async with upstream(raw) as up, running(up.url, rewrite_usage="openai") as side:
        direct = await ask(("127.0.0.1", up.port), request_)
        through = await ask(side.host, request_)
        forbidden = b"no-transform" in request_
        assert results(side) == ({"no_transform": 1} if forbidden else {})
    assert (through.status, through.headers, through.body) == (
        direct.status,
        direct.headers,
        direct.body,
    )
    assert up.received[-1].values(b"accept-encoding") == [b"gzip, br"]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        pytest.param({}, [b"gzip", b"br"], id="off"),
        pytest.param({"rewrite_usage": "openai"}, [b"identity"], id="on"),
        pytest.param(
            {"rewrite_usage": "openai-full", "rewrite_only": "model:x"}, [b"identity"], id="a model"
        ),
        pytest.param(
            {"rewrite_usage": "openai", "rewrite_only": "user-agent:other/*"},
            [b"gzip", b"br"],
            id="another client",
        ),
    ],
)
async def test_identity_is_asked_for(settings: dict[str, Any], asked: list[bytes]) -> None:
    """Where the answer may have to be rewritten, LiteLLM is asked not to code it."""
    request = POST.replace(b"Host:", b"Accept-Encoding: gzip\r\nAccept-Encoding: br\r\nHost:")
    async with (
        upstream(response(BODY, b"200 OK", JSON_TYPE)) as up,
        running(up.url, **settings) as side,
    ):
        await ask(side.host, request)
        await ask(side.host, POST)
    first, second = up.received
    assert first.values(b"accept-encoding") == asked
    assert second.values(b"accept-encoding") == ([b"identity"] if asked == [b"identity"] else [])


@pytest.mark.parametrize(
    ("only", "request_", "expected"),
    [
        pytest.param("model:m", POST, {"rewritten": 1}, id="the model"),
        pytest.param("model:other,user-agent:x/*", POST, {}, id="none of them"),
        pytest.param(
            "model:other, user-agent:x/*",
            POST.replace(b"Host:", b"User-Agent: X/1\r\nHost:"),
            {"rewritten": 1},
            id="the user agent",
        ),
        pytest.param(
            "model:m",
            POST.replace(b"Host:", b"Content-Encoding: gzip\r\nHost:"),
            {"unknown_model": 1},
            id="a request that is not read",
        ),
    ],
)
async def test_limits(only: str, request_: bytes, expected: dict[str, float]) -> None:
    """Only answers to the requests that are named are rewritten."""
    raw = response(BODY, b"200 OK", JSON_TYPE)
    direct, through, counted = await both(raw, request_, rewrite_only=only)
    assert counted == expected
    assert (through.body == direct.body) is ("rewritten" not in expected)


async def test_metrics_are_those_without_it() -> None:
    """What is counted is what the upstream sent, whatever is made of it."""
    shown = []
    for setting in ("off", "openai", "openai-full"):
        async with (
            upstream(chunked([STREAM], SSE_TYPE)) as up,
            running(up.url, rewrite_usage=setting) as side,
        ):
            for _ in range(3):
                assert (await ask(side.host, POST)).complete
            shown.append(
                {
                    (sample.name, *sample.labels.items()): sample.value
                    for family in side.sidecar.registry.collect()
                    for sample in family.samples
                    if re.search(r"(tokens|responses|observations|metric)_total$", sample.name)
                }
            )
    assert shown[0] == shown[1] == shown[2]
    names = {name: value for (name, *_), value in shown[0].items()}
    assert names["litellm_cached_tokens_metric_total"] == 6303


# When bytes go out


async def read_until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    received = b""
    async with asyncio.timeout(5):
        while not received.endswith(end):
            received += await reader.read(65536)
    return received


async def test_a_stream_passes_as_it_comes() -> None:
    """The head, half a line without usage, and a line with usage whose event has not ended,
    are at the client while the upstream holds the rest."""
    pieces = [
        b"event: content_block_delta\ndata: {",
        b'"delta":{"text":"half a',
        b'"}}\n\n',
        START.removesuffix(b"\n"),
        b"\n",
    ]
    said = asyncio.Queue[bytes | None]()

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            response(b"", b"200 OK", SSE_TYPE, b"transfer-encoding: chunked", length=False)
        )
        while (piece := await said.get()) is not None:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")

    async with upstream(serve) as up, running(up.url, rewrite_usage="openai") as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(POST)
        await read_until(reader, b"\r\n\r\n")
        for piece in pieces:
            said.put_nowait(piece)
            expected = piece.replace(b"2101}", b"2101" + ADDED + b"}")
            framed = b"%x\r\n%b\r\n" % (len(expected), expected)
            assert await read_until(reader, framed) == framed
        said.put_nowait(None)
        await read_until(reader, b"0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("only", ["model:other", "user-agent:other"])
async def test_the_head_of_other_json_answers_is_not_held(only: str) -> None:
    """An answer that is not rewritten passes as if the switch were off: its head at once."""
    held = asyncio.Event()

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = response(BODY, b"200 OK", JSON_TYPE)
        writer.write(raw[:-50])
        await held.wait()
        writer.write(raw[-50:])

    async with (
        upstream(serve) as up,
        running(up.url, rewrite_usage="openai", rewrite_only=only) as side,
    ):
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(POST)
        assert await read_until(reader, BODY[:-50])
        held.set()
        assert await read_until(reader, BODY[-50:]) == BODY[-50:]
        writer.close()


async def test_slow_client_slows_a_rewritten_stream_down() -> None:
    """What the client does not read is not fetched, also where the stream is rewritten."""
    sent = 0

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(response(b"", b"200 OK", SSE_TYPE, b"content-length: 100000000", length=False))
        for _part in range(1000):
            writer.write(b"data: " + b"x" * 99_992 + b"\n\n")
            await writer.drain()
            sent += 100_000

    async with upstream(serve) as up, running(up.url, rewrite_usage="openai") as side:
        _, writer = await asyncio.open_connection(*side.host, limit=1)
        writer.write(POST)
        await until(lambda: sent > 0)
        before = -1
        while sent != before:  # until it stands still
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 40_000_000
        writer.transport.abort()


# Broken answers


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(response(BODY, b"200 OK", JSON_TYPE, *VALIDATORS)[:-1], id="JSON, last byte"),
        pytest.param(response(BODY, b"200 OK", JSON_TYPE)[: -len(BODY)], id="JSON, head alone"),
        pytest.param(chunked([BODY[:-1]], JSON_TYPE)[: -len(b"0\r\n\r\n")], id="JSON, chunked"),
        pytest.param(
            chunked([STREAM[: len(STREAM) - 200]], SSE_TYPE)[: -len(b"0\r\n\r\n")], id="stream"
        ),
        pytest.param(
            chunked([START[:-3]], SSE_TYPE)[: -len(b"0\r\n\r\n")], id="stream, in a usage line"
        ),
    ],
)
async def test_answer_that_breaks_off(raw: bytes) -> None:
    """The client gets the bytes that came, and sees that they are not all."""
    async with (
        upstream(lambda _, __, writer: _sends(raw)(writer)) as up,
        running(up.url, rewrite_usage="openai") as side,
    ):
        direct = await ask(("127.0.0.1", up.port), POST)
        through = await ask(side.host, POST)
        assert not through.complete
        assert through.status == 200
        assert through.body.replace(ADDED, b"") == direct.body
        if b"content-length" in raw:
            assert through.headers == direct.headers
        assert side.value("litellm_sidecar_upstream_failures_total", reason="body_cut") == 1
        assert side.value("litellm_sidecar_observations_total", status="partial") == 1


async def test_client_that_leaves_while_its_answer_is_held() -> None:
    """The upstream is closed, as it is where nothing is held."""
    gone = asyncio.Event()

    async def serve(
        _: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(response(BODY, b"200 OK", JSON_TYPE)[:-50])
        assert await reader.read() == b""
        gone.set()

    async with upstream(serve) as up, running(up.url, rewrite_usage="openai") as side:
        _, writer = await asyncio.open_connection(*side.host)
        writer.write(POST)
        await until(lambda: up.received)
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(2):
            await gone.wait()
        await until(lambda: side.value("litellm_sidecar_http_requests_total", code="499") == 1)
        assert side.value("litellm_sidecar_internal_errors_total") == 0


@pytest.mark.parametrize("kind", ["wanted", "transformer", "edit", "feed"])
@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(
            chunked([STREAM[i : i + 50] for i in range(0, len(STREAM), 50)], SSE_TYPE), id="stream"
        ),
        pytest.param(chunked([BODY[:-9], BODY[-9:]], JSON_TYPE), id="JSON, chunked"),
        pytest.param(response(BODY, b"200 OK", JSON_TYPE), id="JSON"),
    ],
)
async def test_broken_rewriter_loses_no_byte(
    kind: str, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewriting can fail in any way: the answer passes as it came, and the fault is counted."""

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    broken = {
        "wanted": (rewrite.Rewriter, "wanted"),
        "transformer": (rewrite.Rewriter, "transformer"),
        "edit": (rewrite._Editor, "edit"),
        "feed": (rewrite._Hold, "look"),
    }
    monkeypatch.setattr(*broken[kind], fail)
    if kind == "wanted":
        monkeypatch.setattr(rewrite.Rewriter, "transformer", lambda *_: None)
    async with upstream(raw) as up, running(up.url, rewrite_usage="openai") as side:
        direct = await ask(("127.0.0.1", up.port), POST)
        through = await ask(side.host, POST)
        assert (through.complete, through.body) == (True, direct.body)
        assert side.value("litellm_sidecar_internal_errors_total", room="observe") == 1
        assert side.value("litellm_sidecar_observations_total", status="invalid") == 0


# With it off


async def test_results_are_at_zero_from_the_start() -> None:
    """Every result is there before the first answer; with the switch off there is none."""
    for setting, count in (("off", 0), ("openai", len(Rewrite))):
        async with running("http://127.0.0.1:9", rewrite_usage=setting) as side:
            samples = [
                sample
                for family in side.sidecar.registry.collect()
                for sample in family.samples
                if sample.name == "litellm_sidecar_rewrites_total"
            ]
        assert [sample.value for sample in samples] == [0] * count


class Given:
    """An upstream and its answer, whose chunks are known objects."""

    authority = b"llm.test"
    status_code = 200

    def __init__(self, kind: bytes, chunks: list[bytes]) -> None:
        self.headers = [(b"content-type", kind), (b"etag", b'"x"')]
        self._chunks = chunks
        self.asked: list[tuple[bytes, bytes]] = []

    async def open(self, method: str, target: bytes, headers: Any, body: Any) -> Given:
        self.asked = headers
        assert body.take() == (POST[-14:], False)
        return self

    ended = False

    def take(self) -> bytes:
        return self._chunks[0]

    async def pump(self, sink: Any) -> None:
        for chunk in self._chunks[1:]:
            sink(chunk, chunk is self._chunks[-1])

    def pause(self) -> None:
        pass

    resume = close = pause


class Client:
    """A client, and what it was sent."""

    target = b"/v1/messages"
    on_left = on_paused = on_resumed = None
    behind = False

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.written: list[tuple[bytes, bool]] = []

    def begin(self, status_code: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers = headers

    def take_body(self) -> tuple[bytes, bool]:
        return POST[-14:], False

    def write(self, data: bytes, last: bool) -> None:
        self.written.append((data, last))


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
async def test_with_it_off_nothing_is_between_upstream_and_client(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no rewriter, and none of its code runs: the very chunks of the upstream are
    sent, one by one."""
    chunks = (
        [STREAM[:100], STREAM[100:300], STREAM[300:]] if b"event" in kind else [BODY[:9], BODY[9:]]
    )
    client = Client()

    async def receive() -> Message:
        raise AssertionError("the body has come")

    async def send(_: Message) -> None:
        raise AssertionError("the client is written to")

    async with running("http://127.0.0.1:9") as side:
        own = side.sidecar.relay
        assert own.rewriting is None
        given = Given(kind, chunks)
        relay = Relay(given, own.observer, own.accounts, own.forwarded)  # type: ignore[arg-type]
        for name in ("wanted", "transformer", "__init__"):
            monkeypatch.delattr(rewrite.Rewriter, name)
        headers = [(b"host", b"x"), (b"content-length", b"14"), (b"accept-encoding", b"br")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/messages",
            "http_version": "1.1",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "headers": headers,
            "extensions": {"sidecar": client},
        }
        await relay(scope, receive, send)
    assert given.asked[: len(headers)] == headers
    assert client.headers == given.headers
    assert [last for _, last in client.written] == [False] * (len(chunks) - 1) + [True]
    assert all(data is chunk for (data, _), chunk in zip(client.written, chunks, strict=True))
