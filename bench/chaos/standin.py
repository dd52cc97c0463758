"""The upstream: does to each answer what its plan says, and notes what the kernel took of it.

It works on sockets itself, because a transport's buffer hides what was sent.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct

from bench.chaos.books import Attempt, Books
from bench.chaos.plans import Plan

__all__ = ["StandIn"]

_NUMBER = re.compile(rb"\r\nuser-agent: chaos/1 (\d+)\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")
_RESET = struct.pack("ii", 1, 0)
_PATIENCE_S = 10.0
"""How long the other side may take for what it has to do at once."""


class StandIn:
    """One upstream. `start` it; `restart` it as often as it pleases."""

    def __init__(self, books: Books) -> None:
        self.port = 0
        self._books = books
        self._listener: socket.socket | None = None
        self._serving: dict[asyncio.Task[None], socket.socket] = {}

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return len(self._serving)

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        # Not `sock_accept`: cancelled, it can lose a connection.
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    async def stop(self) -> None:
        """Reset every connection and listen no more."""
        assert self._listener is not None
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def restart(self, down_s: float) -> None:
        """Go away, and come back."""
        with self._books.disturbing():
            await self.stop()
            self._books.restarts += 1
            await asyncio.sleep(down_s)
            self.start()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # it is gone again
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.create_task(_Connection(self._books, connection).serve())
        self._serving[task] = connection
        # Also of a task that is cancelled before it begins.
        task.add_done_callback(lambda task: self._serving.pop(task).close())


class _Connection:
    """One connection from the sidecar."""

    def __init__(self, books: Books, connection: socket.socket) -> None:
        self._books = books
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._attempt: Attempt | None = None

    async def serve(self) -> None:
        try:
            while await self._exchange():
                pass
        except OSError:
            self._end("gone")
        except asyncio.CancelledError:
            self._end("restart")
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise
        except Exception as exc:
            self._books.faults.append(f"the stand-in failed: {exc!r}")
        finally:
            self._socket.close()

    def _end(self, ending: str) -> None:
        if self._attempt is not None:
            self._attempt.ending = ending
            self._attempt = None

    async def _exchange(self) -> bool:
        """Read a request and answer it; return whether there may be another one."""
        head, body = await self._read_head()
        if not head:
            return False
        match = _NUMBER.search(head)
        if match is None:  # the sidecar's own probe
            await self._loop.sock_sendall(
                self._socket, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
            )
            return True
        attempt = self._attempt = self._books.attempts[int(match[1])]
        attempt.seen += 1
        plan = self._books.plan_of(attempt)
        length = _LENGTH.search(head)
        missing = int(length[1]) - len(body) if length else 0
        while missing > 0:
            piece = await self._loop.sock_recv(self._socket, 256 * 1024)
            if not piece:
                self._end("gone")
                return False
            body += piece
            missing -= len(piece)
        if body != plan.request[plan.request_head :]:
            attempt.fault = "the request's body is not what the client sent"
        await self._answer(attempt, plan)
        if plan.settled:
            await self._settle(attempt, plan)
        if plan.linger_s:
            await asyncio.sleep(plan.linger_s)
        if plan.then == "hold":
            await self._hold(attempt)
        self._end(plan.then)
        if plan.then == "rst":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return plan.then == "keep"

    async def _read_head(self) -> tuple[bytes, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = await self._loop.sock_recv(self._socket, 64 * 1024)
            if not piece:
                return b"", b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        return head + b"\r\n", body

    async def _answer(self, attempt: Attempt, plan: Plan) -> None:
        attempt.sent = 0  # a request that is safe to repeat may come twice
        cuts = [cut for cut in plan.cuts if cut < plan.stop_at]
        single = len(cuts) > 100  # bytes: with a pause at each they would take a minute
        for index, (start, end) in enumerate(zip([0, *cuts], [*cuts, plan.stop_at], strict=True)):
            if plan.stall is not None and plan.stall[0] == index:
                await asyncio.sleep(plan.stall[1])
                self._look()
            elif index and (index % 8 == 0 if single else plan.gap_s):
                await asyncio.sleep(plan.gap_s)
                self._look()
            await self._send(attempt, memoryview(plan.wire)[start:end])

    def _look(self) -> None:
        """Send no more to who is gone: it would count as sent."""
        try:
            gone = not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        if gone:
            raise ConnectionResetError

    async def _send(self, attempt: Attempt, data: memoryview) -> None:
        while data:
            try:
                count = self._socket.send(data)
            except BlockingIOError:
                await self._writable()
                continue
            attempt.sent += count
            data = data[count:]

    async def _writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._socket, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(self._socket)

    async def _settle(self, attempt: Attempt, plan: Plan) -> None:
        """Wait until the client has what was sent, so that it is known to have been read."""
        target = plan.body_bytes(plan.stop_at)
        attempt.arrival = asyncio.Event()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while attempt.received < target and not (attempt.left or attempt.complete):
                    attempt.arrival.clear()
                    await attempt.arrival.wait()
        except TimeoutError:
            attempt.fault = f"{attempt.received} of {target} bytes sent came to the client"
        finally:
            attempt.arrival = None

    async def _hold(self, attempt: Attempt) -> None:
        """Wait until the sidecar closes, as it must when its client leaves."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while await self._loop.sock_recv(self._socket, 1024):
                    pass
        except TimeoutError:
            attempt.fault = "the client left, and the connection to the upstream stayed open"
