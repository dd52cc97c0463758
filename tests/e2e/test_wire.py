"""Odd requests before LiteLLM: with the sidecar they work as without it, or better."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

import pytest

from tests.support.calls import body_for
from tests.support.litellm import RED, LiteLLM
from tests.support.running import SidecarProcess
from tests.support.wire import Answer, Client, connected

pytestmark = pytest.mark.anyio

BODY = json.dumps(body_for("claude-direct", "wires")).encode()
CHUNKED_BODY = b"%x\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(BODY), BODY)


def request(line: bytes, *headers: bytes) -> bytes:
    lines = [line + b" HTTP/1.1", b"Host: llm.test", b"x-api-key: " + RED.key.encode(), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def messages(*headers: bytes) -> bytes:
    """Write the head of a call, without its framing."""
    return request(b"POST /v1/messages", b"Content-Type: application/json", *headers)


LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
# What Java's HttpClient and, through it, Spring's RestClient and Ktor offer with each request.
H2C = (
    b"Connection: Upgrade, HTTP2-Settings",
    b"Upgrade: h2c",
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)
MODELS = request(b"GET /v1/models")

# Segments to send, and the status codes that both give.
SAME: dict[str, tuple[list[bytes], list[int]]] = {
    "h2c": ([messages(*H2C, LENGTH) + BODY], [200]),
    "h2c, body apart": ([messages(*H2C, LENGTH), BODY[:99], BODY[99:]], [200]),
    "h2c, chunks": ([messages(*H2C, CHUNKED), CHUNKED_BODY], [200]),
    "empty query": ([request(b"GET /v1/models?")], [200]),
    "empty query of nothing": ([request(b"GET /x?")], [404]),
    "two slashes": ([request(b"GET //v1/models")], [404]),
    "escaped slash": ([request(b"GET /v1%2Fmodels")], [200]),
    "fragment": ([request(b"GET /v1/models#x")], [404]),
    "OPTIONS *": ([request(b"OPTIONS *")], [404]),
    "pipelined": ([MODELS + request(b"GET /x") + MODELS], [200, 404, 200]),
    "pipelined behind a body": ([messages(LENGTH) + BODY + MODELS], [200, 200]),
    "pipelined behind chunks": ([messages(CHUNKED) + CHUNKED_BODY + MODELS], [200, 200]),
    "expect": ([messages(b"Expect: 100-continue", LENGTH), BODY, MODELS], [200, 200]),
    "HTTP/1.0": ([MODELS.replace(b"HTTP/1.1", b"HTTP/1.0")], [200]),
    "20 KB of headers": ([request(b"GET /v1/models", b"x-long: " + b"x" * 20_000)], [200]),
    "two hosts": ([request(b"GET /v1/models", b"Host: b")], [400]),
}


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


async def talk(client: Client, segments: list[bytes], answers: int) -> list[Answer]:
    for segment in segments:
        client.send(segment)
        await asyncio.sleep(0.02)
    return [await client.answer() for _ in range(answers)]


def told(answer: Answer) -> object:
    """What an answer says, without what differs from call to call."""
    try:
        said = json.loads(answer.body)
    except ValueError:
        return answer.body
    for name in ("id", "usage"):
        said.pop(name, None)
    return said


@pytest.mark.parametrize("name", SAME)
async def test_as_without_the_sidecar(name: str, litellm: LiteLLM, front: SidecarProcess) -> None:
    """The same status codes and bodies, in the same order."""
    segments, statuses = SAME[name]
    said = []
    for url in (litellm.url, front.url):
        async with connected(address(url)) as client:
            answers = await talk(client, segments, len(statuses))
        assert [answer.status for answer in answers] == statuses
        assert all(answer.complete for answer in answers)
        said.append([told(answer) for answer in answers])
    if statuses != [400]:
        assert said[0] == said[1]


async def test_half_close_is_leaving(litellm: LiteLLM, front: SidecarProcess) -> None:
    """A client that closes its sending side before its answer gets none, with both."""
    for url in (litellm.url, front.url):
        async with connected(address(url)) as client:
            client.send(messages(LENGTH) + BODY)
            client.writer.write_eof()
            assert await client.end() == b""


# Segments, status code without the sidecar (0 for none in time), and with it.
BETTER: dict[str, tuple[bytes, set[int], int]] = {
    "URL as target": (request(b"GET http://llm.test/v1/models"), {404}, 200),
    "WebSocket offered by a POST": (
        messages(b"Connection: Upgrade", b"Upgrade: websocket", LENGTH) + BODY,
        {0, 400},
        200,
    ),
    "HTTP/2.0 by name": (MODELS.replace(b"HTTP/1.1", b"HTTP/2.0"), {200}, 505),
    "CONNECT": (request(b"CONNECT llm.test:443"), {404}, 501),
    "unknown method": (request(b"BREW /x"), {404}, 400),
    "two codings": (
        messages(b"Transfer-Encoding: gzip, chunked") + CHUNKED_BODY,
        {400},
        501,
    ),
}


@pytest.mark.parametrize("name", BETTER)
async def test_unlike_without_the_sidecar(
    name: str, litellm: LiteLLM, front: SidecarProcess
) -> None:
    """What the README says is different."""
    raw, without, with_it = BETTER[name]
    async with connected(address(litellm.url)) as client:
        client.send(raw)
        try:
            async with asyncio.timeout(2):
                status = (await client.answer()).status
        except TimeoutError:
            status = 0
        assert status in without
    async with connected(address(front.url)) as client:
        client.send(raw)
        assert (await client.answer()).status == with_it
