"""The admin port, apart from what it serves."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from sidecar.admin.app import create_admin
from sidecar.admin.guard import Access
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


async def _reachable() -> None:
    return None


READINESS = Readiness(_reachable, lambda: 0.0)


@pytest.mark.parametrize(
    ("accepted", "gzipped"),
    [
        (b"gzip", True),
        (b"deflate, GZIP;q=0.5, *;q=0", True),
        (b"br,gzip ;q=1", True),
        (b"gzip;q=0", False),
        (b"identity, gzip; q=0.000, br", False),
        (b"xgzip", False),
        (b"identity", False),
        (b"", False),
    ],
)
async def test_gzip_is_sent_to_who_takes_it(accepted: bytes, gzipped: bool) -> None:
    """The weights of Accept-Encoding are respected."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    admin = create_admin(lambda _, __: ("text/plain", iter([b"x 1\n"])), READINESS, Access())
    await admin(SCOPE | {"headers": [(b"accept-encoding", accepted)]}, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    assert ((b"content-encoding", b"gzip") in sent[0]["headers"]) is gzipped
    assert (gzip.decompress(body) if gzipped else body) == b"x 1\n"


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

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scrape = asyncio.create_task(create_admin(render, READINESS, Access())(SCOPE, receive, send))
    while not scrape.done():
        await asyncio.sleep(0)
        turn += 1
    assert b"".join(message.get("body", b"") for message in sent) == b"x 1\n" * 20
    assert min(b - a for a, b in itertools.pairwise(turns)) >= 4
