"""The limit on requests that are under way: who is turned away, how, and until when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.running import Running, running, until
from tests.support.wire import Answer, Client, Received, ask, connected, upstream

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET /v1/models HTTP/1.1\r\nHost: llm.test\r\n\r\n"
HOLD = GET.replace(b"/v1/models", b"/hold")
HANDSHAKE = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: llm.test\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AQ==\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"


def post(body: bytes, target: bytes = b"/v1/messages", *headers: bytes) -> bytes:
    lines = [b"POST %b HTTP/1.1" % target, b"Host: llm.test", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body


class Gate:
    """An upstream that answers `/hold` when it is let, WebSockets and all else at once."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(
        self, received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if received.values(b"upgrade"):
            writer.write(SWITCH)
            await asyncio.sleep(3600)
        if b"/hold" in received.line:
            await self.go.wait()
        if b"/cut" in received.line:
            writer.write(OK[:-1])
            await writer.drain()
            writer.close()
        else:
            writer.write(OK)


@asynccontextmanager
async def limited(limit: int) -> AsyncIterator[tuple[Running, Gate]]:
    gate = Gate()
    async with upstream(gate) as up, running(up.url, max_concurrent_requests=limit) as side:
        yield side, gate


@asynccontextmanager
async def holding(side: Running, begin: bytes = HOLD) -> AsyncIterator[Client]:
    """Hold the only place there is."""
    before = in_flight(side)
    async with connected(side.host) as client:
        client.send(begin)
        await until(lambda: in_flight(side) == before + 1)
        yield client


def in_flight(side: Running) -> float:
    return side.value("litellm_sidecar_http_requests_in_flight")


def refused(side: Running) -> float:
    return side.value("litellm_sidecar_refusals_total", reason="too_many_requests")


def is_refusal(answer: Answer) -> bool:
    named = answer.header(b"x-sidecar-error") == b"too_many_requests"
    assert named is (answer.status == 503)
    if named:
        assert answer.header(b"retry-after") == b"1"
    return named


async def test_one_too_many_is_turned_away_in_its_dialect() -> None:
    """With 503, `retry-after` and the route's own kind of error, and it is counted."""
    async with limited(1) as (side, gate), holding(side) as first:
        anthropic = await ask(side.host, post(b"{}"))
        other = await ask(side.host, GET)
        assert is_refusal(anthropic)
        assert is_refusal(other)
        error = json.loads(anthropic.body)
        assert (error["type"], error["error"]["type"]) == ("error", "overloaded_error")
        assert json.loads(other.body)["error"]["code"] == "too_many_requests"
        assert refused(side) == 2
        assert side.value("litellm_sidecar_http_requests_total", code="503") == 2
        gate.go.set()
        assert (await first.answer()).body == b"ok"
        assert (await ask(side.host, GET)).body == b"ok"
        assert in_flight(side) == 0


async def test_connection_lives_on_behind_a_refusal() -> None:
    """The body that is not wanted is read and dropped, and the next request is served."""
    async with limited(1) as (side, gate), holding(side) as first, connected(side.host) as second:
        assert is_refusal(await second.ask(post(b"x" * 3_000_000)))
        assert is_refusal(await second.ask(GET))
        gate.go.set()
        assert (await first.answer()).body == b"ok"
        assert (await second.ask(post(b"x" * 3_000_000))).body == b"ok"


async def test_client_that_waits_for_100_is_not_asked_for_its_body() -> None:
    """It has its answer before it sends one; the connection cannot be used again."""
    request = post(b"xx", b"/v1/messages", b"Expect: 100-continue")
    async with limited(1) as (side, _), holding(side):
        answer = await ask(side.host, request[:-2])
        assert is_refusal(answer)
        assert answer.header(b"connection") == b"close"


@pytest.mark.parametrize("end", ["leaves", "is cut", "is refused"])
async def test_place_is_free_however_a_request_ends(end: str) -> None:
    """Also where the client left, the upstream broke off, or a request was turned away."""
    async with limited(1) as (side, _):
        for _round in range(5):
            if end == "is cut":
                answer = await ask(side.host, GET.replace(b"/v1/models", b"/cut"))
                assert not answer.complete
            else:
                async with holding(side):
                    if end == "is refused":
                        assert is_refusal(await ask(side.host, GET))
            await until(lambda: in_flight(side) == 0)
            assert (await ask(side.host, GET)).body == b"ok"


async def test_websockets_count() -> None:
    """One holds a place until its end; its handshake is turned away like a request, and holds
    none, even if its client stays."""
    async with limited(1) as (side, _):
        async with holding(side, HANDSHAKE) as socket_:
            assert (await socket_.reader.readline()).split()[1] == b"101"
            assert is_refusal(await ask(side.host, GET))
            async with connected(side.host) as second:
                answer = await second.ask(HANDSHAKE)
                assert is_refusal(answer)
                assert answer.header(b"connection") == b"close"
                socket_.reset()
                await until(lambda: in_flight(side) == 0)
                assert (await ask(side.host, GET)).body == b"ok"
        assert refused(side) == 2


async def test_zero_is_no_limit() -> None:
    """As many as come."""
    async with limited(0) as (side, gate):
        asked = [asyncio.create_task(ask(side.host, HOLD)) for _ in range(300)]
        await until(lambda: in_flight(side) == 300)
        gate.go.set()
        assert {(await answer).status for answer in asked} == {200}
        assert refused(side) == 0


async def test_burst_past_the_limit() -> None:
    """Of many at once exactly as many are served as may be, and all get an answer."""
    async with limited(20) as (side, gate):
        asked = [asyncio.create_task(ask(side.host, HOLD)) for _ in range(100)]
        await until(lambda: refused(side) == 80)
        assert in_flight(side) == 20
        gate.go.set()
        answers = [await answer for answer in asked]
        assert sorted(answer.status for answer in answers) == [200] * 20 + [503] * 80
        assert in_flight(side) == 0
