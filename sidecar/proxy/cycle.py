"""One request and its response, as ASGI sees them, and a little more than ASGI shows.

What this module knows is how a body is handed over and how a response is framed. The
connection, its limits and its end are in `edge`.

The application gets its cycle in `scope["extensions"]["sidecar"]`, see `Downstream`. What
belongs to the connection is ours: an application sends neither `connection` nor
`transfer-encoding`, and names in lower case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from starlette.types import Message, Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

if TYPE_CHECKING:
    from sidecar.proxy.edge import Edge

__all__ = ["Cycle", "Downstream", "downstream_of"]


class Downstream(Protocol):
    """What the application may know of its client, beyond ASGI."""

    target: bytes
    """The request target in origin form, otherwise as it was sent."""
    on_left: Callable[[], None] | None
    """Called once when the client has left before its response was complete."""
    on_paused: Callable[[], None] | None
    """Called when the client takes less than it is sent; may be called again."""
    on_resumed: Callable[[], None] | None
    """Called when it takes more again."""

    def take_body(self) -> tuple[bytes, bool]:
        """Return what has come of the request's body, and whether more is to come."""

    def begin(self, status_code: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin the response. Its head goes out with the first piece of the body."""

    def write(self, data: bytes, last: bool) -> None:
        """Send a piece of the response's body without waiting for the client to take it."""

    @property
    def behind(self) -> bool:
        """Whether the client has to take something first; `drain` waits for that."""

    async def drain(self) -> None:
        """Wait until the client has taken more, or has left."""


def downstream_of(scope: Scope) -> Downstream:
    """Return what the edge knows of this request's client."""
    return cast("Downstream", scope["extensions"]["sidecar"])


class Cycle:
    """One request and its response.

    Args:
        edge: the connection.
        scope: of the request.
        target: of the request.
        keep_alive: whether the connection may be used again.
    """

    __slots__ = (
        "_arrived",
        "_chunked",
        "_edge",
        "_end_told",
        "_head",
        "_more_body",
        "_pieces",
        "_remaining",
        "_scope",
        "_size",
        "_waits_for_100",
        "disconnected",
        "keep_alive",
        "on_left",
        "on_paused",
        "on_resumed",
        "response_complete",
        "response_started",
        "target",
    )

    def __init__(self, edge: Edge, scope: dict[str, Any], target: bytes, keep_alive: bool) -> None:
        self.target = target
        self.keep_alive = keep_alive
        self.on_left: Callable[[], None] | None = None
        self.on_paused: Callable[[], None] | None = None
        self.on_resumed: Callable[[], None] | None = None
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self._edge = edge
        self._scope = scope
        self._waits_for_100 = False
        self._more_body = False
        self._pieces: list[bytes] = []
        self._size = 0
        self._end_told = False
        self._arrived: asyncio.Future[None] | None = None
        self._head = b""
        self._chunked = False
        self._remaining: int | None = None

    async def run_asgi(self, app: Callable[..., Awaitable[None]]) -> None:
        """Run the application; a response that it leaves incomplete is cut."""
        edge = self._edge
        try:
            await app(self._scope, self.receive, self.send)
        except BaseException as exc:
            # Also when it was cancelled: the server lets nobody wait for this task.
            if not isinstance(exc, asyncio.CancelledError):
                edge.logger.error("Exception in ASGI application", exc_info=exc)
        if not self.response_complete and not self.disconnected:
            edge.cut()
        # The scope holds this object, and the callbacks hold the application's: left as they
        # are, only the collector of cycles would free them, and the credentials in them.
        self._scope = {}
        self.on_left = self.on_paused = self.on_resumed = None

    @property
    def until_close(self) -> bool:
        """Whether the end of the connection would be the end of the response's body."""
        return self.response_started and self._remaining is None and not self._chunked

    # The request

    def expect_body(self) -> None:
        """Take note that the request has a body; a client that waits for 100 gets one."""
        self._more_body = True
        if self._scope["http_version"] == "1.1":
            expect = [value.lower() for name, value in self._scope["headers"] if name == b"expect"]
            self._waits_for_100 = expect == [b"100-continue"]

    def take(self, piece: bytes, more: bool) -> None:
        """Take a piece of the body from the edge."""
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size > HIGH_WATER_LIMIT:
                self._edge.flow.pause_reading()
        self._more_body = more
        self._waits_for_100 = False  # the client did not
        self._wake()

    def take_body(self) -> tuple[bytes, bool]:
        """Return what has come of the request's body, and whether more is to come."""
        body = b"".join(self._pieces) if len(self._pieces) != 1 else self._pieces[0]
        self._pieces.clear()
        self._size = 0
        self._end_told = not self._more_body
        return body, self._more_body

    async def receive(self) -> Message:
        """The application's `receive`."""
        while not self.disconnected and not self.response_complete:
            if self._pieces or not (self._more_body or self._end_told):
                body, more = self.take_body()
                return {"type": "http.request", "body": body, "more_body": more}
            if self._waits_for_100:
                self._waits_for_100 = False
                self._edge.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._edge.flow.resume_reading()
            self._arrived = self._edge.loop.create_future()
            await self._arrived
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        """Take note that the client has left, or is to be treated as if it had."""
        if self.disconnected or self.response_complete:
            return
        self.disconnected = True
        self._pieces.clear()
        self._wake()
        if self.on_left is not None:
            self.on_left()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    # The response

    async def send(self, message: Message) -> None:
        """The application's `send`.

        The head waits for the first piece of the body, which may be empty, as ASGI has it: so
        both go out in one segment where both are there.
        """
        if self.behind:
            await self.drain()
        if message["type"] == "http.response.start":
            self.begin(message["status"], message["headers"])
        else:
            self.write(message.get("body", b""), not message.get("more_body", False))

    @property
    def behind(self) -> bool:
        """Whether the client has to take something first; `drain` waits for that."""
        return self._edge.flow.write_paused and not self.disconnected

    async def drain(self) -> None:
        """Wait until the client has taken more, or has left."""
        await self._edge.flow.drain()

    def begin(self, status_code: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin the response. Its head goes out with the first piece of the body."""
        self.response_started = True
        if self._waits_for_100:
            # Whether what comes next is the body or a request, nobody could tell.
            self.keep_alive = False
        if self._edge.listener.announcing:
            self.keep_alive = False
        if status_code not in (204, 304) and self._scope["method"] != "HEAD":
            for name, value in headers:
                if name == b"content-length":
                    self._remaining = int(value)
            if self._remaining is None:
                if self._scope["http_version"] == "1.1":
                    self._chunked = True
                    headers = [*headers, (b"transfer-encoding", b"chunked")]
                else:
                    self.keep_alive = False
        else:
            self._remaining = 0
        if not self.keep_alive:
            headers = [*headers, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % pair for pair in headers]
        self._head = b"%b%b\r\n" % (STATUS_LINE[status_code], b"".join(lines))

    def write(self, data: bytes, last: bool) -> None:
        """Send a piece of the response's body without waiting for the client to take it.

        Raises:
            RuntimeError: the body is not as long as its head says.
        """
        if self.disconnected:
            return
        if self._remaining is not None and data:
            self._remaining -= len(data)
        if self._remaining is not None and (self._remaining < 0 or (last and self._remaining)):
            raise RuntimeError("the response's body is not as long as its content-length")
        head, self._head = self._head, b""
        if self._chunked:
            end = b"0\r\n\r\n" if last else b""
            data = b"%b%x\r\n%b\r\n%b" % (head, len(data), data, end) if data else head + end
        elif head:
            data = head + data
        edge = self._edge
        if data:
            edge.transport.write(data)
        if last:
            self.response_complete = True
            self._wake()
            edge.on_response_complete()
        elif self.on_paused is not None and edge.flow.write_paused:
            # The loop says so once, when the application may not have listened yet. It says so
            # within the write that makes it so, and needs no callback of its own.
            self.on_paused()
