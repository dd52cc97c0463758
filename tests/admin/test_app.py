"""The admin port, apart from what it serves."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from sidecar.admin.app import create_admin
from sidecar.admin.readiness import Readiness

pytestmark = pytest.mark.anyio

SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "GET",
    "path": "/metrics",
    "headers": [],
    "query_string": b"",
    "client": None,
    "asgi": {"version": "3.0", "spec_version": "2.4"},
}


async def test_loop_turns_between_slices() -> None:
    """Whoever else has something to do gets several turns after each slice: a chunk of a stream
    needs some of them on its way through."""
    turn = 0
    turns: list[int] = []
    sent: list[Any] = []

    def render(accept: str, scraper: str | None) -> tuple[str, Iterator[bytes]]:
        def slices() -> Iterator[bytes]:
            for _ in range(20):
                turns.append(turn)
                yield b"x 1\n"

        return "text/plain", slices()

    async def probe() -> None:
        return None

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scrape = asyncio.create_task(
        create_admin(render, Readiness(probe, lambda: 0.0))(SCOPE, receive, send)
    )
    while not scrape.done():
        await asyncio.sleep(0)
        turn += 1
    assert b"".join(message.get("body", b"") for message in sent) == b"x 1\n" * 20
    assert min(b - a for a, b in itertools.pairwise(turns)) >= 4
