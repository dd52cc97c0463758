"""HTTP as bytes: an upstream that sends what a test writes, and a client that reads all of it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h11

__all__ = [
    "Answer",
    "Client",
    "Received",
    "Upstream",
    "ask",
    "connected",
    "read_answer",
    "upstream",
]

HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Received:
    """A request as an upstream saw it."""

    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        """The request line."""
        return self.head.split(b"\r\n")[0]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Header pairs in order, names in lower case."""
        pairs = [line.partition(b":") for line in self.head.split(b"\r\n")[1:] if line]
        return [(name.lower(), value.strip(b" ")) for name, _, value in pairs]

    def values(self, name: bytes) -> list[bytes]:
        """All values of a header."""
        return [value for key, value in self.headers if key == name]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as a client saw it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    complete: bool
    """Whether it ended where its framing says; a cut connection gives False."""

    def end_to_end(self) -> list[tuple[bytes, bytes]]:
        """Headers in order, without what belongs to the connection."""
        return [pair for pair in self.headers if pair[0] not in HOP_BY_HOP]

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header."""
        return dict(reversed(self.headers)).get(name)


Handler = Callable[[Received, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class Upstream:
    """A raw upstream and what it has seen."""

    url: str
    port: int
    received: list[Received] = field(default_factory=list)
    connections: int = 0


@asynccontextmanager
async def upstream(
    handler: Handler | bytes,
    *,
    read_body: bool = True,
    host: str = "127.0.0.1",
    path: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Upstream]:
    """Serve with a handler, or with the same bytes for each request.

    The handler is called after the request was read and its connection stays open afterwards,
    unless it closes it.

    Args:
        read_body: whether to read the request's body, too; else that is the handler's.
        path: of the Unix socket to serve on, instead of a port of `host`.
        tls: to serve with.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        seen.connections += 1
        try:
            while not writer.is_closing():
                received = await _read_request(reader, read_body=read_body)
                if b"/health/" in received.line:  # the sidecar's own probe
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                seen.received.append(received)
                if isinstance(handler, bytes):
                    writer.write(handler)
                    await writer.drain()
                else:
                    await handler(received, reader, writer)
        except (asyncio.IncompleteReadError, OSError):  # the latter of TLS, too
            pass
        except asyncio.CancelledError:
            pass  # the end; asyncio's server takes a cancelled handler for a failed one
        except RuntimeError:
            if not writer.is_closing():
                raise  # else it is uvloop's word for writing to a closed connection
        finally:
            tasks.discard(task)
            writer.close()

    if path is not None:
        server = await asyncio.start_unix_server(serve, path, limit=1 << 20)
        seen = Upstream(f"unix:{path}", 0)
    else:
        server = await asyncio.start_server(serve, host, 0, limit=1 << 20, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        seen = Upstream(f"{'https' if tls else 'http'}://{name}:{port}", port)
    try:
        yield seen
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_request(reader: asyncio.StreamReader, *, read_body: bool) -> Received:
    head = await reader.readuntil(b"\r\n\r\n")
    received = Received(head[:-4], b"")
    if not read_body:
        return received
    body = b""
    if received.values(b"transfer-encoding"):
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif lengths := received.values(b"content-length"):
        body = await reader.readexactly(int(lengths[0]))
    return Received(head[:-4], body)


async def read_answer(reader: asyncio.StreamReader, method: str = "GET") -> Answer:
    """Read one response to its end, however that looks."""
    return (await _read(reader, method, b""))[0]


async def _read(reader: asyncio.StreamReader, method: str, rest: bytes) -> tuple[Answer, bytes]:
    """Read one response, of which `rest` was read before; return what was read behind it, too."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    status, headers, body = 0, [], []
    complete = False
    if rest:
        parser.receive_data(rest)
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError:
            break
        if event is h11.NEED_DATA:
            try:
                parser.receive_data(await reader.read(65536))
            except ConnectionError:
                break
        elif isinstance(event, h11.Response):
            status, headers = event.status_code, list(event.headers)
        elif isinstance(event, h11.Data):
            body.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            complete = True
            break
        elif isinstance(event, h11.ConnectionClosed):
            break
    trailing = parser.trailing_data[0] if complete else b""
    return Answer(status, headers, b"".join(body), complete), trailing


class Client:
    """A client that sends what a test says, and reads one answer after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._rest = b""

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    async def answer(self, method: str = "GET") -> Answer:
        """Read one answer."""
        async with asyncio.timeout(10):
            answer, self._rest = await _read(self.reader, method, self._rest)
        return answer

    async def receive(self, byte: bytes, count: int) -> None:
        """Wait until a byte has come this often; `answer` and `end` still give all."""
        async with asyncio.timeout(10):
            while self._rest.count(byte) < count:
                piece = await self.reader.read(1 << 20)
                assert piece, "the connection ended before"
                self._rest += piece

    async def ask(self, request: bytes) -> Answer:
        """Send a request and read its answer."""
        self.send(request)
        return await self.answer("HEAD" if request.startswith(b"HEAD") else "GET")

    async def end(self) -> bytes:
        """Read to the end of the connection.

        Raises:
            ConnectionError: it was reset.
        """
        async with asyncio.timeout(10):
            return self._rest + await self.reader.read()

    def reset(self) -> None:
        """Leave at once."""
        # With uvloop alone, an abort sends FIN like a close.
        linger = struct.pack("ii", 1, 0)
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


@asynccontextmanager
async def connected(address: tuple[str, int], *, limit: int = 1 << 16) -> AsyncIterator[Client]:
    """Connect a client.

    Args:
        limit: about how much it reads that nobody asks for.
    """
    reader, writer = await asyncio.open_connection(*address, limit=limit)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def ask(
    address: tuple[str, int],
    request: bytes,
    *,
    source: str | None = None,
    timeout_s: float = 10.0,
) -> Answer:
    """Send the bytes of one request and read the answer.

    Args:
        source: the loopback address to come from.
    """
    local = (source, 0) if source else None
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(*address, local_addr=local)
        try:
            writer.write(request)
            return await read_answer(reader, "HEAD" if request.startswith(b"HEAD") else "GET")
        finally:
            writer.close()
