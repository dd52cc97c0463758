"""WebSockets before a real LiteLLM, directly and through the sidecar: the same in every respect."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from tests.e2e.test_byte_identity import VARYING
from tests.support.calls import request, samples, send
from tests.support.litellm import RED, LiteLLM
from tests.support.running import SidecarProcess, sidecar_process
from tests.support.wire import Received, upstream

pytestmark = pytest.mark.anyio

KEY = {"Authorization": f"Bearer {RED.key}"}
REALTIME = "/v1/realtime?model=claude-direct"
CREATE = json.dumps({"type": "response.create", "input": "Hello", "max_output_tokens": 64})
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "a model without realtime": (REALTIME, {"additional_headers": KEY}),
    "the other spelling": ("/realtime?model=claude-direct", {"additional_headers": KEY}),
    "a model that does not exist": ("/v1/realtime?model=none", {"additional_headers": KEY}),
    "no model": ("/v1/realtime", {"additional_headers": KEY}),
    "an unknown key": (REALTIME, {"additional_headers": {"Authorization": "Bearer sk-nobody"}}),
    "no key": (REALTIME, {}),
    "a key among the subprotocols": (
        REALTIME,
        {
            "subprotocols": [
                Subprotocol("realtime"),
                Subprotocol(f"openai-insecure-api-key.{RED.key}"),
            ]
        },
    ),
    "a response": ("/v1/responses?model=claude-direct", {"additional_headers": KEY}),
    "Vertex": ("/vertex_ai/live", {"additional_headers": KEY}),
    "a path without WebSockets": ("/v1/messages", {"additional_headers": KEY}),
    "no such path": ("/nothing/here", {"additional_headers": KEY}),
}


async def transcript(url: str, target: str, options: dict[str, Any]) -> list[object]:
    """Open a WebSocket and write down all that the other end does, to its end."""
    seen: list[object] = []
    address = url.replace("http://", "ws://") + target
    try:
        async with asyncio.timeout(20), connect(address, proxy=None, **options) as connection:
            answer = connection.response
            assert answer is not None
            seen.append(
                (
                    101,
                    [name.lower() for name, _ in answer.headers.raw_items()],
                    connection.subprotocol,
                )
            )
            seen.append([extension.name for extension in connection.protocol.extensions])
            if "responses" in target:  # LiteLLM waits for its client, and then has an answer
                await connection.send(CREATE)
                event: dict[str, Any] = {}
                while event.get("type") != "response.completed":
                    event = json.loads(await connection.recv())
                    seen.append((event["type"], event.get("delta")))
                await connection.close(4010, "enough")
            try:
                while True:
                    seen.append(await connection.recv())
            except ConnectionClosed:
                seen.append((connection.close_code, connection.close_reason))
    except InvalidStatus as refused:
        answer = refused.response
        headers = [(name.lower(), value) for name, value in answer.headers.raw_items()]
        own = {"connection", "transfer-encoding"}
        kept = [
            (name, None if VARYING.fullmatch(name.encode()) else value)
            for name, value in headers
            if name not in own
        ]
        seen.append((answer.status_code, answer.reason_phrase, kept, answer.body))
    return seen


@pytest.mark.parametrize("name", ASKED)
async def test_litellm_answers_as_it_does_directly(
    name: str, litellm: LiteLLM, front: SidecarProcess
) -> None:
    """Refusals, errors as messages, close codes and reasons are LiteLLM's own, and so is what
    the two agree on."""
    target, options = ASKED[name]
    direct = await transcript(litellm.url, target, options)
    through = await transcript(front.url, target, options)
    assert through == direct


async def metrics(sidecar: SidecarProcess) -> list[tuple[str, dict[str, str], float]]:
    answer = await send(sidecar.admin_url, request("GET", "/metrics"))
    return samples(answer.body.decode())


async def test_end_that_does_not_read_costs_no_memory(tmp_path: Path) -> None:
    """200 WebSockets whose clients do not read, each before an upstream that never stops."""
    clients = 200
    switch = b"HTTP/1.1 101 Go\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n"
    sent = 0

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(switch)
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    head = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    async with upstream(serve) as up:
        with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": up.url}) as sidecar:
            before = sidecar.resident_bytes()
            writers = []
            for _ in range(clients):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", sidecar.port, limit=1024
                )
                writer.write(head)
                await reader.readuntil(b"\r\n\r\n")
                writers.append(writer)
            stood_at = -1
            while sent != stood_at:
                stood_at = sent
                await asyncio.sleep(0.3)
            assert sent > 100_000_000  # most of it is with the kernel
            grown = sidecar.resident_bytes() - before
            # uvloop reads 256 KiB at a time, and that is where it stops.
            assert grown < clients * 400_000
            for writer in writers:
                writer.transport.abort()
            name = "litellm_sidecar_http_requests_in_flight"

            async def in_flight() -> float:
                return sum(value for found, _, value in await metrics(sidecar) if found == name)

            async with asyncio.timeout(5):
                while await in_flight():  # noqa: ASYNC110 - a process
                    await asyncio.sleep(0.05)
