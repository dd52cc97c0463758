"""The admin port: metrics, probes, and a page that says where they are.

It knows Starlette and what it is handed: a way to render metrics, and the state of readiness.
It must not know what is counted.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from sidecar import __version__
from sidecar.admin.guard import Access, Guard
from sidecar.admin.readiness import Readiness

__all__ = ["create_admin", "rehearse"]

Render = Callable[[str, str | None], tuple[str, Iterator[bytes]]]
"""Takes an Accept header and the address of a Prometheus scraper (None for anybody else);
returns the content type and the text in slices."""

_TURNS = 5
"""Turns of the loop between two slices. A chunk of a stream takes a few of them on its way
through the sidecar; with one alone it would wait for a slice at each of its steps."""

# RFC 9110 section 12.5.3: a weight of zero refuses it.
_GZIP = re.compile(r"(?:^|,)\s*gzip\s*(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))(?:;|,|$)", re.IGNORECASE)

_PAGE = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>LiteLLM cache sidecar</title>
<meta name="viewport" content="width=device-width">
<h1>LiteLLM cache sidecar {__version__}</h1>
<p>Counts the provider's prompt cache in front of LiteLLM.</p>
<ul><li><a href="metrics">/metrics</a> for Prometheus</li>
<li><a href="healthz">/healthz</a>: the process answers</li>
<li><a href="readyz">/readyz</a>: it takes requests, and LiteLLM can be reached</li></ul>
</html>
"""


def create_admin(render: Render, readiness: Readiness, access: Access) -> Guard:
    """Make the application on the admin port."""

    async def metrics(request: Request) -> Response:
        # Prometheus names its time-out in each scrape; curl and browsers do not.
        scraper = None
        if "x-prometheus-scrape-timeout-seconds" in request.headers and request.client:
            scraper = request.client.host
        content_type, slices = render(request.headers.get("accept", ""), scraper)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        if _GZIP.search(request.headers.get("accept-encoding", "")):
            headers["content-encoding"] = "gzip"
            slices = _compressed(slices)
        return StreamingResponse(_paced(slices), headers=headers)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        reason = await readiness.reason()
        if reason is None:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"{reason}\n", status_code=503)

    async def index(_: Request) -> Response:
        policy = {"content-security-policy": "default-src 'none'"}
        return HTMLResponse(_PAGE, headers=policy)

    admin = Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/", index),
        ]
    )
    return Guard(admin, access)


async def rehearse() -> None:
    """Send a streamed answer to nobody.

    What Starlette imports for its first one takes 12 to 19 ms: done before the sidecar serves,
    that stops nobody's stream.
    """

    async def receive() -> Message:
        await asyncio.Future()
        raise AssertionError

    async def send(_: Message) -> None:
        pass

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    await StreamingResponse(_paced(iter(())))(scope, receive, send)


async def _paced(slices: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Let the loop run after each slice."""
    for piece in slices:
        if piece:
            yield piece
        for _ in range(_TURNS):
            await asyncio.sleep(0)


def _compressed(slices: Iterator[bytes]) -> Iterator[bytes]:
    # Level 1 takes a quarter of the default's time, and the text shrinks tenfold all the same.
    compressor = zlib.compressobj(1, wbits=31)
    for piece in slices:
        yield compressor.compress(piece)
    yield compressor.flush()
