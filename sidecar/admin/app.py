"""The admin port: metrics, probes, the live page and the documents that it shows.

It knows Starlette and what it is handed: a way to render metrics, the state of readiness, and
what makes documents. It must not know what is counted.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from sidecar.admin import page
from sidecar.admin.guard import Access, Guard
from sidecar.admin.readiness import Readiness

__all__ = ["WINDOWS", "create_admin", "rehearse"]

Render = Callable[[str, str | None], tuple[str, Iterator[bytes]]]
"""Takes an Accept header and the address of a Prometheus scraper (None for anybody else);
returns the content type and the text in slices."""

Document = Callable[[str], Awaitable[bytes]]
"""Takes the name of a window; returns JSON."""

WINDOWS = ("15m", "1h", "6h", "start")
"""Names of windows; the first is meant where none is named."""

_PIECE_BYTES = 32 * 1024
"""How much of a document is compressed in one go: well under 1 ms."""

_TURNS = 5
"""Turns of the loop between two slices. A chunk of a stream takes a few of them on its way
through the sidecar; with one alone it would wait for a slice at each of its steps."""

# RFC 9110 section 12.5.3: a weight of zero refuses it.
_GZIP = re.compile(r"(?:^|,)\s*gzip\s*(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))(?:;|,|$)", re.IGNORECASE)


def create_admin(
    render: Render,
    readiness: Readiness,
    access: Access,
    documents: Mapping[str, Document] | None = None,
) -> Guard:
    """Make the application on the admin port. The files of the page are read for it.

    Args:
        documents: what `/api/v1/` serves, by name; `docs/api.md` describes each.
    """

    files = page.read_files()

    async def metrics(request: Request) -> Response:
        # Prometheus names its time-out in each scrape; curl and browsers do not.
        scraper = None
        if "x-prometheus-scrape-timeout-seconds" in request.headers and request.client:
            scraper = request.client.host
        content_type, slices = render(request.headers.get("accept", ""), scraper)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        return _streamed(request, slices, headers)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        reason = await readiness.reason()
        if reason is None:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"{reason}\n", status_code=503)

    async def index(request: Request) -> Response:
        return page.answer(request, files["index.html"], gzipped=_takes_gzip(request))

    async def file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            return PlainTextResponse("There is no such file.\n", 404)
        return page.answer(request, found, gzipped=_takes_gzip(request))

    async def sign_in(request: Request) -> Response:
        # The page itself, which asks for the token when the documents are refused.
        answer = page.answer(
            request, files["index.html"], gzipped=_takes_gzip(request), status_code=401
        )
        answer.headers["cache-control"] = "no-store"
        return answer

    def serve(document: Document) -> Callable[[Request], Awaitable[Response]]:
        async def served(request: Request) -> Response:
            window = request.query_params.get("window", WINDOWS[0])
            if window not in WINDOWS:
                return PlainTextResponse(f"window is one of {', '.join(WINDOWS)}.\n", 400)
            text = await document(window)
            pieces = (text[at : at + _PIECE_BYTES] for at in range(0, len(text), _PIECE_BYTES))
            headers = {"content-type": "application/json", "cache-control": "no-store"}
            return _streamed(request, pieces, headers | {"vary": "accept-encoding"})

        return served

    admin = Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/", index),
            Route(f"{page.STATIC}{{name:path}}", file),
            *[
                Route(f"/api/v1/{name}", serve(document))
                for name, document in (documents or {}).items()
            ],
        ]
    )
    return Guard(admin, access, sign_in)


def _takes_gzip(request: Request) -> bool:
    return bool(_GZIP.search(request.headers.get("accept-encoding", "")))


def _streamed(request: Request, slices: Iterator[bytes], headers: dict[str, str]) -> Response:
    if _takes_gzip(request):
        headers["content-encoding"] = "gzip"
        slices = _compressed(slices)
    return StreamingResponse(_paced(slices), headers=headers)


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
