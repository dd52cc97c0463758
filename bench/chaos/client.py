"""The clients: as many as are asked for, each making one exchange after the other by its plan."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from itertools import count
from typing import cast

import httptools

from bench.chaos.books import Attempt, Books
from bench.chaos.plans import Leaving, Plan

__all__ = ["drive"]

_RESET = struct.pack("ii", 1, 0)
_HUNG_S = 60.0
_CLOSED_WITHIN_S = 10.0
_RETRY_S = 0.02


class _Connection(asyncio.Protocol):
    """One connection to the sidecar, with one exchange at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._attempt: Attempt | None = None
        self._over: asyncio.Future[None] = self._loop.create_future()
        self.closed = False

    async def run(self, attempt: Attempt, plan: Plan) -> None:
        """Make an exchange, and say in `attempt` what came of it."""
        self._attempt, self._plan = attempt, plan
        self._over = self._loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        leaving = plan.leaving
        sent = len(plan.request)
        if leaving is not None and leaving.when == "head":
            sent = leaving.amount
        elif leaving is not None and leaving.when == "body":
            sent = plan.request_head + leaving.amount
        attempt.head_written = sent >= plan.request_head
        began = self._loop.time()
        self._transport.write(plan.request[:sent])
        if leaving is not None and leaving.when != "answered":
            pause_s = leaving.amount / 1000 if leaving.when == "asked" else 0.001
            await asyncio.wait([self._over], timeout=pause_s)
            if not self._over.done():
                self._leave(leaving)
        await asyncio.wait([self._over], timeout=_HUNG_S)
        if not self._over.done():
            attempt.fault = attempt.fault or "no end came"
            self._transport.abort()
        if attempt.left and leaving is not None and leaving.how == "half":
            await self._await_close(attempt)
        self._attempt = None
        if attempt.complete and plan.undisturbed:
            attempt.took_s = self._loop.time() - began
        if not attempt.complete or attempt.left or sent < len(plan.request):
            self._transport.abort()
            self.closed = True
        attempt.left = attempt.left or not attempt.complete
        attempt.arrived()

    def close(self) -> None:
        """Be done with the connection."""
        self._transport.close()

    def _leave(self, leaving: Leaving) -> None:
        assert self._attempt is not None
        self._attempt.left = True
        if leaving.how == "half":
            self._transport.write_eof()
        elif leaving.how == "fin":
            self._transport.close()
        else:
            peer = self._transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
        self._finish()

    async def _await_close(self, attempt: Attempt) -> None:
        """A client that sends no more has left: the sidecar closes."""
        deadline = self._loop.time() + _CLOSED_WITHIN_S
        while not self.closed:
            if self._loop.time() > deadline:
                attempt.fault = "the client left, and its connection stayed open"
                return
            await asyncio.sleep(0.001)

    def _finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    # What the loop tells it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        attempt = self._attempt
        if attempt is None:
            self.closed = True
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            attempt.fault = f"what came is no answer: {exc}"
            self._finish()
        attempt.arrived()
        leaving = self._plan.leaving
        if (
            leaving is not None
            and leaving.when == "answered"
            and attempt.status_code
            and not attempt.own_error
            and attempt.received >= leaving.amount
            and not (attempt.complete or attempt.left)
        ):
            self._leave(leaving)

    def eof_received(self) -> None:
        self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._attempt is not None:
            self._finish()

    # What the parser tells it

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._attempt is not None
        if name.lower() == b"x-sidecar-error":
            self._attempt.own_error = value.decode()

    def on_headers_complete(self) -> None:
        assert self._attempt is not None
        self._attempt.status_code = self._parser.get_status_code()
        if self._plan.client_pause_s:
            self._transport.pause_reading()
            self._loop.call_later(self._plan.client_pause_s, self._resume)

    def _resume(self) -> None:
        if not self.closed:
            self._transport.resume_reading()

    def on_body(self, piece: bytes) -> None:
        attempt = self._attempt
        assert attempt is not None
        if attempt.own_error:
            return
        expected = self._plan.body[attempt.received : attempt.received + len(piece)]
        if piece != expected:
            attempt.fault = f"the body differs behind byte {attempt.received}"
        attempt.received += len(piece)

    def on_message_complete(self) -> None:
        assert self._attempt is not None
        self._attempt.complete = True
        self._finish()


async def _connect(books: Books, port: int) -> _Connection:
    """Connect; while the sidecar is away, try again."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return (await loop.create_connection(_Connection, "127.0.0.1", port))[1]
        except OSError:
            books.refused += 1
            await asyncio.sleep(_RETRY_S)


async def drive(
    books: Books, port: int, *, clients: int, until: Callable[[], bool], rate: float | None = None
) -> None:
    """Make exchanges until there are enough.

    Args:
        rate: how many are begun in a second, by a schedule that does not wait for answers; as
            many as go if not given.
    """
    loop = asyncio.get_running_loop()
    began, turns = loop.time(), count()

    async def work() -> None:
        connection: _Connection | None = None
        while not until():
            if rate is not None:
                await asyncio.sleep(began + next(turns) / rate - loop.time())
            if connection is None or connection.closed:
                connection = await _connect(books, port)
            attempt, plan = books.begin()
            await connection.run(attempt, plan)
            attempt.plan = None
            lost = plan.leaving is None and not attempt.status_code
            if lost or attempt.own_error == "connect_failed":
                await asyncio.sleep(_RETRY_S)  # the sidecar, or the upstream, is away
        if connection is not None:
            connection.close()

    await asyncio.gather(*(work() for _ in range(clients)))
