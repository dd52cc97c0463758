"""The edge alone on a socket, before an application of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from sidecar.exchange import RefusalReason
from sidecar.proxy.edge import Edge, Limits, Listener, downstream_of

__all__ = ["Seen", "Served", "answering", "read_body", "serving"]

App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as the application saw it."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes | None
    """None if the client left before its end."""


@dataclass(slots=True)
class Served:
    """An edge on a port, and what happened at it."""

    address: tuple[str, int] = ("127.0.0.1", 0)
    state: ServerState = field(default_factory=ServerState)
    refused: list[RefusalReason] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    """What reached the loop's exception handler."""
    listener: Listener = field(init=False)

    @property
    def edge(self) -> Edge:
        """The only connection."""
        (edge,) = self.state.connections
        return cast("Edge", edge)

    def pass_time(self, seconds: float) -> None:
        """Let the patrol come round, that much later."""
        for edge in [*self.state.connections, *self.listener.turned_away]:
            cast("Edge", edge).check(asyncio.get_running_loop().time() + seconds)

    def shut_down(self) -> None:
        """Begin to stop, as the life cycle and uvicorn do."""
        self.listener.announcing = self.listener.closing = True
        for edge in list(self.state.connections):
            edge.shutdown()


async def read_body(receive: Receive) -> bytes | None:
    """Read the request's body; None if the client left."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


def answering(
    body: bytes = b"ok",
    status: int = 200,
    *,
    length: bool = True,
    read: bool = True,
) -> Callable[[Served], App]:
    """Make an application that notes its request and answers the same to each.

    Args:
        length: whether the answer has a content-length.
        read: whether the request's body is read first.
    """

    def make(served: Served) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            target = downstream_of(scope).target
            seen = Seen(
                scope["method"],
                target,
                list(scope["headers"]),
                (await read_body(receive)) if read else b"",
            )
            served.seen.append(seen)
            headers = [(b"content-length", b"%d" % len(body))] if length else []
            await send({"type": "http.response.start", "status": status, "headers": headers})
            bodiless = scope["method"] == "HEAD" or status in (204, 304)
            await send({"type": "http.response.body", "body": b"" if bodiless else body})

        return app

    return make


@asynccontextmanager
async def serving(
    make: Callable[[Served], App], *, ws: Any = "none", **limits: Any
) -> AsyncIterator[Served]:
    """Serve an application on a free port. There is no patrol but `Served.pass_time`.

    At the end nothing may have reached the loop's exception handler, and no task may be left.
    """
    served = Served()
    served.listener = Listener(Limits(**limits), served.refused.append)
    loop = asyncio.get_running_loop()
    config = Config(
        cast("Any", make(served)),
        interface="asgi3",
        http=Edge,
        ws=ws,
        lifespan="off",
        log_config=None,
        proxy_headers=False,
    )
    loop.set_exception_handler(lambda _, context: served.faults.append(context))

    def edge() -> Edge:
        return Edge(config, served.state, {}, listener=served.listener)

    server = await loop.create_server(edge, "127.0.0.1", 0)
    served.address = server.sockets[0].getsockname()
    try:
        yield served
        for task in served.state.tasks:
            task.cancel()
        if served.state.tasks:
            await asyncio.wait(served.state.tasks, timeout=5)
    finally:
        server.close()
        for connection in list(served.state.connections):
            cast("Edge", connection).abort()
        await asyncio.sleep(0)
        loop.set_exception_handler(None)
    assert not served.faults
    assert not served.state.tasks
