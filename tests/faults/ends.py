"""The two ends of a play: an upstream that follows scripts, and a client that does.

The upstream knows by the header `x-play` of a request which play it is in, so that many can run
at once and over the sidecar's pooled connections. Both read with h11, which is not what the
sidecar reads with.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import h11

from tests.faults.model import Script
from tests.faults.script import Read, Side, Step, Take, close, receive, take_step

__all__ = ["Answer", "Connecting", "Play", "Upstream"]

_MAX_HEAD_BYTES = 1 << 22
_PLAY = re.compile(rb"\r\nx-play: *(\w+)\r\n", re.IGNORECASE)
_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"trailer"})
_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as a client saw it."""

    status: int = 0
    """0 where no head came."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """In wire order, names in lower case."""
    body: bytes = b""
    complete: bool = False
    """Whether it ended where its framing says."""
    rest: bytes = b""
    """What came behind its end."""

    def end_to_end(self) -> list[tuple[bytes, bytes]]:
        """Headers in order, without what belongs to the connection."""
        nominated = {
            option.strip().lower()
            for name, value in self.headers
            if name == b"connection"
            for option in value.split(b",")
        } - {b"content-length", b"content-type"}  # which belong to the content for all that
        return [pair for pair in self.headers if pair[0] not in _HOP_BY_HOP | nominated]

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header."""
        return dict(reversed(self.headers)).get(name)


@dataclass(slots=True)
class Play:
    """One run of a case: what both ends do, and what they saw."""

    scripts: Sequence[Script]
    """Of the upstream: the first time it is asked, the second, and so on as the last."""
    client: Side = field(default_factory=Side)
    upstream: Side = field(default_factory=Side)
    began: int = 0
    """How often the upstream was asked."""
    over: int = 0
    """How often its script has ended."""
    fault: BaseException | None = None


class Upstream:
    """Listens on a loopback port, and follows the scripts of the plays that it is asked in."""

    def __init__(self) -> None:
        self.plays: dict[bytes, Play] = {}
        self.open: set[socket.socket] = set()
        """Connections that it has not seen the end of."""
        self.port = 0
        self._own: list[socket.socket] = []
        """The listening socket, and what keeps others out."""
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def listening(self) -> bool:
        """Whether it accepts."""
        return self._accepting is not None

    def listen(self) -> None:
        """Begin to accept; on the same port as before."""
        listener = self._bind(512)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener))

    async def fill(self) -> None:
        """Listen and accept nothing, with no room for one more connection."""
        self._bind(0)
        filler = await Connecting.to(("127.0.0.1", self.port))
        self._own.append(filler.connection)

    async def deafen(self) -> None:
        """Close the port, and all connections."""
        tasks = [*self._tasks, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._accepting = None
        for connection in self._own:
            connection.close()
        self._own.clear()

    def _bind(self, backlog: int) -> socket.socket:
        listener = socket.socket()
        self._own.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(backlog)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        return listener

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        self.open.add(connection)
        try:
            received = b""
            while True:
                while b"\r\n\r\n" not in received:
                    piece = await asyncio.get_running_loop().sock_recv(connection, 1 << 16)
                    if not piece:
                        return
                    received += piece
                at = received.index(b"\r\n\r\n") + 4
                head, received = received[:at], received[at:]
                named = _PLAY.search(head)
                play = self.plays.get(named[1]) if named else None
                if named is None or play is None:  # the sidecar's own probe
                    await asyncio.get_running_loop().sock_sendall(connection, _OK)
                    continue
                rest = await self._perform(play, named[1], connection, head, received)
                if rest is None:
                    return
                received = rest
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the other end's doing, or the lab's end
        finally:
            self.open.discard(connection)
            close(connection)

    async def _perform(
        self, play: Play, name: bytes, connection: socket.socket, head: bytes, received: bytes
    ) -> bytes | None:
        """Follow a script; returns what came behind the request, or None at the end."""
        script = play.scripts[min(play.began, len(play.scripts) - 1)]
        play.began += 1
        side = play.upstream
        side.head, side.body_bytes, side.whole = head, 0, False
        request = h11.Connection(h11.SERVER, _MAX_HEAD_BYTES)
        request.receive_data(head + received)
        try:
            for step in script:
                if isinstance(step, Read):
                    await _read_request(request, connection, side)
                elif not await take_step(step, connection, name, play.client):
                    return None
            return request.trailing_data[0] if side.whole else None
        except OSError:
            return None
        except BaseException as exc:
            play.fault = exc
            raise
        finally:
            play.over += 1


async def _read_request(request: h11.Connection, connection: socket.socket, side: Side) -> None:
    """Read the rest of a request.

    Raises:
        OSError: the connection ended before it did.
    """
    while True:
        event = request.next_event()
        if event is h11.NEED_DATA:
            data = await receive(connection)
            if not data:
                raise ConnectionAbortedError
            request.receive_data(data)
        elif isinstance(event, h11.Data):
            side.body_bytes += len(event.data)
        elif isinstance(event, h11.EndOfMessage):
            side.whole = True
            return


class Connecting:
    """A client's connection, for one answer after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    @classmethod
    async def to(cls, address: tuple[str, int]) -> Connecting:
        """Connect."""
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(connection, address)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    async def perform(self, script: Script, name: bytes, play: Play) -> Answer:
        """Follow a client's script, and return the last answer that it reads."""
        answer = Answer()
        method = "HEAD" if any(_is_head(step) for step in script) else "POST"
        for step in script:
            if isinstance(step, Read | Take):
                enough = step.body_bytes if isinstance(step, Take) else None
                answer = await self.read(play.client, method, enough)
            else:
                try:
                    if not await take_step(step, self.connection, name, play.upstream):
                        break
                except OSError:
                    pass  # closed while it was still sending: there may be an answer all the same
        play.client.done = True
        return answer

    async def read(self, side: Side, method: str = "POST", enough: int | None = None) -> Answer:
        """Read one answer to its end, however that looks.

        Args:
            enough: bytes of the body after which no more is read.
        """
        parser = h11.Connection(h11.CLIENT, _MAX_HEAD_BYTES)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        if self._rest:
            parser.receive_data(self._rest)
            self._rest = b""
        status, body, complete = 0, bytearray(), False
        headers: tuple[tuple[bytes, bytes], ...] = ()
        while not complete:
            try:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    parser.receive_data(await receive(self.connection))
            except (h11.RemoteProtocolError, OSError):
                break
            if isinstance(event, h11.Response):
                status, headers = event.status_code, tuple(event.headers)
                side.head = b"%d" % status
            elif isinstance(event, h11.Data):
                body += event.data
                side.body_bytes = len(body)
            elif isinstance(event, h11.ConnectionClosed):
                break
            complete = isinstance(event, h11.EndOfMessage)
            if enough is not None and status and len(body) >= enough:
                break
        self._rest = parser.trailing_data[0] if complete else b""
        side.whole = complete
        return Answer(status, headers, bytes(body), complete, self._rest)

    def close(self) -> None:
        """Close."""
        close(self.connection)


def _is_head(step: Step) -> bool:
    data = getattr(step, "data", b"")
    return isinstance(data, bytes) and data.startswith(b"HEAD ")
