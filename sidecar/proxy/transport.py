"""The way to the upstream: HTTP/1.1 over TCP, TLS or a Unix socket.

`Transport.open` sends a request and gives back the response once its head has come;
`Transport.handle_async_request` is the same way for callers that speak httpx. What this module
knows is connections: their pool, their framing (RFC 9112), their faults. What it must not know
is what a request or a body means.

The contract:

- One exchange at a time on a connection. One that was read to its end goes back to the pool;
  any byte, or the end, of a connection in the pool closes it.
- Framing is strict: what `httptools` accepts and RFC 9112 does not is refused here. A response
  that is malformed is an `UpstreamError`; none of it is passed on as if it were whole.
- Memory is bounded: a body that nobody takes pauses the socket, an upload waits until the
  socket takes it.
- Cancellation at any `await` closes the connection of the exchange and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import ssl
import sys
import termios
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import httptools
import httpx

from sidecar.errors import UpstreamError
from sidecar.exchange import RawHeaders, UpstreamFault

__all__ = ["RequestBody", "Timeouts", "Transport", "UpstreamResponse"]

_IDLE_EXPIRY_S = 1.5
"""How long an idle connection is kept. LiteLLM closes its side after 5 s (uvicorn's default),
or 2 s with `--run_gunicorn`; a request must not meet that."""
_MAX_AGE_S = 60.0
"""How long a connection is used again. Several workers of LiteLLM share a listening socket, and
each keeps the connections that it once accepted: new ones let the load spread anew."""
_MAX_HEAD_BYTES = 256 * 1024
"""Longest response head, and longest run of chunk headers or trailers without any body; nginx
takes 4 or 8 KiB for a head, h11 (as httpx's client) 100 KiB."""
_HIGH_WATER_BYTES = 64 * 1024
"""How much of a body is held for a reader that does not come, before the socket is paused."""
_TICK_S = 1.0
"""How often it is looked whether the upstream takes what it is sent."""
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})  # RFC 9110 9.2.2
_DEAD = frozenset({UpstreamFault.STALE_CONNECTION, UpstreamFault.CONNECTION_LOST})

P = TypeVar("P", bound=asyncio.Protocol)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Time-outs of one exchange, in seconds; None for none."""

    connect_s: float | None = None
    send_s: float | None = None
    """While the upstream takes nothing of a request that it has not answered."""
    first_byte_s: float | None = None
    """From the end of the request to the response's head."""
    idle_s: float | None = None
    """Between two pieces of the response's body, while somebody takes them."""


class RequestBody(Protocol):
    """A request's body, as its sender hands it over."""

    def take(self) -> tuple[bytes, bool]:
        """Return what is there already, and whether more is to come. Called once, first."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the rest, in pieces that are not empty."""


class _MalformedError(Exception):
    """Raised in a callback of the parser, to stop it."""


class UpstreamResponse:
    """A response whose head has come and whose body comes.

    The body is taken by `take` and `pump`, or by iteration. Whoever opened a response closes it.
    """

    __slots__ = (
        "_bodiless",
        "_connection",
        "_dry_bytes",
        "_error",
        "_held_bytes",
        "_interim",
        "_keep_alive",
        "_last_at",
        "_loop",
        "_over",
        "_parser",
        "_paused",
        "_pieces",
        "_send_timer",
        "_sent",
        "_sink",
        "_surplus",
        "_timeouts",
        "_timer",
        "_until_eof",
        "_upload",
        "_waiter",
        "ended",
        "headers",
        "on_body",
        "status_code",
    )

    def __init__(self, connection: _Connection, method: str, timeouts: Timeouts) -> None:
        self.status_code = 0
        self.headers: list[tuple[bytes, bytes]] = []
        """In wire order, names in lower case."""
        self.ended = False
        """Whether the body has come to its end; some of it may still have to be taken."""
        self._connection = connection
        self._loop = connection.loop
        self._timeouts = timeouts
        self._bodiless = method == "HEAD"
        self._pieces: list[bytes] = []
        # The parser calls it by name, for each chunk: without a step of Python's.
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._over: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes, bool], None] | None = None
        self._held_bytes = 0
        self._dry_bytes = 0
        self._interim = False
        self._keep_alive = False
        self._paused = False
        self._until_eof = False
        self._surplus = False
        self._error: Exception | None = None
        self._upload: asyncio.Task[None] | None = None
        self._sent = False
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._last_at = 0.0

    # For the caller

    def take(self) -> bytes:
        """Return what has come of the body and was not taken yet."""
        pieces = self._pieces
        self._held_bytes = 0
        if len(pieces) == 1:
            return pieces.pop()
        body = b"".join(pieces)
        pieces.clear()
        return body

    async def pump(self, sink: Callable[[bytes, bool], None]) -> None:
        """Hand each piece of the body to `sink` as it comes, until the end.

        `sink` is called with what came at once and whether it was the last, from within the
        socket's own callback: a piece goes from one socket to the other without a task being
        woken for it. The last call may bring no bytes.

        Raises:
            UpstreamError: the body ended before its end; `sink` has had what came of it.
            Exception: what `sink` raised.
        """
        over = self._over = self._loop.create_future()
        self._sink = sink
        try:
            if self._pieces or self.ended:
                self._deliver(sink)
            if self._error is not None and not over.done():
                over.set_exception(self._error)
            if not self._paused:
                self.resume()
            if self._timeouts.idle_s is not None:
                self._watch_idle(self._timeouts.idle_s)
            await over
        finally:
            self._over = self._sink = None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of the body as they come.

        Raises:
            UpstreamError: the body ended before its end.
        """
        while True:
            if piece := self.take():
                yield piece
            elif self._error is not None:
                raise self._error
            elif self.ended:
                return
            else:
                self.resume()
                if self._timeouts.idle_s is not None:
                    self._timer = self._loop.call_later(
                        self._timeouts.idle_s, self._fault, UpstreamFault.IDLE_TIMEOUT
                    )
                self._waiter = self._loop.create_future()
                await self._waiter

    def pause(self) -> None:
        """Stop reading from the upstream, until `resume`."""
        self._paused = True
        if not self.ended:  # else the connection is in the pool, or somebody else's
            self._connection.pause_reading()

    def resume(self) -> None:
        """Go on reading, after `pause`."""
        self._paused = False
        if not self.ended:
            self._last_at = self._loop.time()
            self._connection.resume_reading()

    def close(self) -> None:
        """Let go of the response. A connection that is not at its end is closed."""
        if not self.ended and self._error is None:
            self.fail(UpstreamError(UpstreamFault.BODY_CUT, "the response was closed"))

    # For the transport

    async def head(self) -> None:
        """Wait for the head.

        Raises:
            UpstreamError: none came.
            Exception: what the request's body raised.
        """
        if self._error is None and not self.status_code:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None and not self.status_code:
            raise self._error

    def sent(self) -> None:
        """Note that all of the request was written."""
        self._sent = True
        self._last_at = self._loop.time()
        waiting = not self.status_code and self._error is None
        if self._timeouts.first_byte_s is not None and waiting:
            self._timer = self._loop.call_later(
                self._timeouts.first_byte_s, self._fault, UpstreamFault.FIRST_BYTE_TIMEOUT
            )

    def watch_sending(self) -> None:
        """Begin to look from time to time whether the upstream takes what was written."""
        limit = self._timeouts.send_s
        if limit is not None and self._send_timer is None and not self.status_code:
            self._check_sending(limit, min(limit, _TICK_S), -1, self._loop.time())

    async def upload(self, body: RequestBody, *, chunked: bool) -> None:
        """Write the rest of a request while its response may already come.

        An upstream that does not want the rest answers and closes. To write to it then would
        break the connection before the answer is read, so nothing is written behind its end.
        """
        connection = self._connection
        try:
            async for piece in body:
                if connection.hung_up():
                    return
                connection.write(_framed(piece) if chunked else piece)
                if connection.write_paused:
                    self.watch_sending()
                    await connection.drain()
            if chunked:
                if connection.hung_up():
                    return
                connection.write(b"0\r\n\r\n")
            self.watch_sending()
            self.sent()
        except Exception as exc:  # the body's own: it belongs to whoever waits for the response
            self.fail(exc)

    def start_upload(self, body: RequestBody, *, chunked: bool) -> None:
        """Begin `upload` in a task, which ends with the response."""
        self._upload = self._loop.create_task(self.upload(body, chunked=chunked))

    def fail(self, error: Exception) -> None:
        """End the exchange with an error, if it has not ended yet."""
        if self.ended or self._error is not None:
            return
        self._error = error
        self._stop()
        self._connection.abandon(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._over is not None and not self._over.done():
            self._over.set_exception(error)

    def feed(self, data: bytes) -> None:
        """Take what the connection received."""
        malformed = False
        held = len(self._pieces)
        self._dry_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # Behind the end of a response this is surplus, and the response is whole.
            malformed = not self.ended
            self._surplus = True
        if len(self._pieces) > held:
            self._dry_bytes = 0
            if self._bodiless:
                self._pieces.clear()
                self._surplus = True  # a body where none can be
        else:
            malformed = malformed or (not self.ended and self._dry_bytes > _MAX_HEAD_BYTES)
        if self.status_code:
            if self._sink is None:
                self._held_bytes += len(data)
            self._progress(malformed)
        elif malformed:
            self._fault(UpstreamFault.MALFORMED_RESPONSE)

    def _progress(self, malformed: bool) -> None:
        """Pass on what a read brought, once there is a head."""
        if self.ended:
            self._complete()
        waiter, sink = self._waiter, self._sink
        if waiter is not None and not waiter.done():
            if self._timer is not None:
                self._timer.cancel()
            waiter.set_result(None)
        if sink is not None:
            self._last_at = self._loop.time()
            if self._pieces or self.ended:
                self._deliver(sink)
        elif self._held_bytes > _HIGH_WATER_BYTES and not self.ended:
            self._connection.pause_reading()  # until somebody takes it
        if malformed:
            self._fault(UpstreamFault.MALFORMED_RESPONSE)

    def eof(self) -> None:
        """Take note that the upstream closed its side."""
        if not self.status_code:
            self._fault(UpstreamFault.STALE_CONNECTION)
        elif self._until_eof:
            self.ended = True
            self._progress(malformed=False)
        else:
            self._fault(UpstreamFault.BODY_CUT)

    def lost(self) -> None:
        """Take note that the connection broke."""
        lost = UpstreamFault.BODY_CUT if self.status_code else UpstreamFault.CONNECTION_LOST
        self._fault(lost)

    def _fault(self, fault: UpstreamFault) -> None:
        self.fail(UpstreamError(fault))

    def _deliver(self, sink: Callable[[bytes, bool], None]) -> None:
        over = self._over
        assert over is not None
        if over.done():
            return  # the wait was cancelled, or `sink` has failed
        try:
            sink(self.take(), self.ended)
        except Exception as exc:  # it must not surface in the loop; `pump` raises it
            if not over.done():
                over.set_exception(exc)
            return
        if self.ended and not over.done():
            over.set_result(None)

    def _complete(self) -> None:
        """Give the connection back at the response's end."""
        reusable = self._sent and self._keep_alive and not self._surplus
        reusable = reusable and self._connection.flushed
        self._stop()
        if reusable:
            self._connection.release(self)
        else:
            self._connection.abandon(self)

    def _stop(self) -> None:
        """Stop what runs beside the response."""
        if self._timer is not None:
            self._timer.cancel()
        if self._send_timer is not None:
            self._send_timer.cancel()
        if self._upload is not None and not self._upload.done():
            self._upload.cancel()
        del self._parser  # it and this object hold each other

    def _check_sending(self, limit: float, tick: float, before: int, since: float) -> None:
        self._send_timer = None
        unsent = self._connection.unsent
        # One that has answered may leave the rest of the request where it is.
        if not unsent or self.status_code or self.ended or self._error is not None:
            return
        now = self._loop.time()
        if unsent != before:
            since = now
        if now - since >= limit:
            self._fault(UpstreamFault.SEND_TIMEOUT)
        else:
            self._send_timer = self._loop.call_later(
                tick, self._check_sending, limit, tick, unsent, since
            )

    def _watch_idle(self, idle_s: float) -> None:
        """Check from time to time whether the body still comes."""
        if self.ended or self._error is not None:
            return
        now = self._loop.time()
        if self._connection.read_paused or not self._sent:
            self._last_at = now  # it is the client that takes its time
        due = self._last_at + idle_s
        if now >= due:
            self._fault(UpstreamFault.IDLE_TIMEOUT)
        else:
            self._timer = self._loop.call_at(due, self._watch_idle, idle_s)

    # For the parser, which calls these by name

    def on_message_begin(self) -> None:
        if self.ended:
            raise _MalformedError  # a second response, to nobody's request

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status_code:  # trailers come this way, too
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        status_code = parser.get_status_code()
        if not 100 <= status_code <= 599 or status_code == 101:
            raise _MalformedError  # no final status, or a switch that nobody asked for
        version = parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise _MalformedError
        headers = self.headers
        # Its end may come with the bytes that are too many.
        if self._dry_bytes > _MAX_HEAD_BYTES and (
            sum(len(name) + len(value) for name, value in headers) > _MAX_HEAD_BYTES
        ):
            raise _MalformedError
        names = [name for name, _ in headers]
        if status_code < 200:
            # It has no body (RFC 9112 section 6.3), but the parser would read one.
            if b"content-length" in names or b"transfer-encoding" in names:
                raise _MalformedError
            self._interim = True
            headers.clear()
            return
        coded = b"transfer-encoding" in names
        if coded:
            # The parser takes other codings for bodies that end with the connection, or
            # removes `chunked` and leaves the rest; it also takes a coding from HTTP/1.0.
            codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
            if codings != [b"chunked"] or version == "1.0":
                raise _MalformedError
        self._keep_alive = parser.should_keep_alive()
        if status_code == 204 or status_code == 304:
            self._bodiless = True
        if self._bodiless:
            self.ended = True
            # The parser, which does not know of HEAD, would take chunks without a word.
            self._keep_alive = self._keep_alive and not coded
        elif not coded and b"content-length" not in names:
            self._until_eof = True
        self.status_code = status_code

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self.ended = True


class _Connection(asyncio.Protocol):
    """One connection to the upstream."""

    __slots__ = (
        "_poller",
        "_pool",
        "_response",
        "_transport",
        "_writable",
        "born_at",
        "idle_at",
        "loop",
        "read_paused",
        "write_paused",
    )

    def __init__(self, pool: _Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.read_paused = False
        self.write_paused = False
        self.idle_at = self.born_at = loop.time()
        self._pool = pool
        self._poller: select.poll | None = None
        self._response: UpstreamResponse | None = None
        self._transport: asyncio.Transport | None = None
        self._writable: asyncio.Future[None] | None = None

    # What the exchange does with it

    @property
    def usable(self) -> bool:
        """Whether a request can be written to it."""
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, response: UpstreamResponse) -> None:
        """Begin an exchange, whose response takes what comes from now on."""
        self._response = response

    @property
    def unsent(self) -> int:
        """How many bytes that were written the other side has not taken.

        Those that wait in the kernel are among them: over TLS uvloop shows no others.
        """
        if self._transport is None:
            return 0
        connection: socket.socket = self._transport.get_extra_info("socket")
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        return self._transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    @property
    def flushed(self) -> bool:
        """Whether the socket has taken all that was written."""
        return self._transport is not None and self._transport.get_write_buffer_size() == 0

    def hung_up(self) -> bool:
        """Whether the upstream has closed its side, behind what was not read yet."""
        if self._transport is None or self._transport.is_closing():
            return True
        if not hasattr(select, "POLLRDHUP"):
            return False  # only Linux tells
        if self._poller is None:
            self._poller = select.poll()
            self._poller.register(self._transport.get_extra_info("socket"), select.POLLRDHUP)
        return bool(self._poller.poll(0))

    def write(self, data: bytes) -> bool:
        """Write; what does not fit into the socket is held, see `write_paused`.

        Returns:
            False if nothing was written, because the connection is broken.
        """
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(data)
        return not self._transport.is_closing()

    async def drain(self) -> None:
        """Wait until the socket takes more, or is closed."""
        if self.write_paused and self._transport is not None:
            self._writable = self.loop.create_future()
            await self._writable

    def pause_reading(self) -> None:
        """Let the upstream wait."""
        if not self.read_paused and self.usable:
            assert self._transport is not None
            self.read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self.read_paused and self.usable:
            assert self._transport is not None
            self.read_paused = False
            self._transport.resume_reading()

    def release(self, response: UpstreamResponse) -> None:
        """End an exchange and keep the connection for another."""
        if self._response is response:
            self._response = None
            # A paused socket would not notice that the upstream closes it.
            self.resume_reading()
            self._pool.give(self)

    def abandon(self, response: UpstreamResponse) -> None:
        """End an exchange and the connection with it."""
        if self._response is response:
            self._response = None
            self.abort()

    def abort(self) -> None:
        """Close at once; what is not sent yet is dropped."""
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    # What the loop tells it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._pool.connections.add(self)
        limit = getattr(transport, "set_read_buffer_limits", None)
        if limit is not None:
            # uvloop's TLS throws away what a paused reader has not read yet when the socket
            # ends. The socket is paused with the first such byte, so that its end stays behind.
            limit(1, 0)

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            self.abort()  # nothing was asked: whatever this is, it answers nobody
        else:
            self._response.feed(data)

    def eof_received(self) -> None:
        if self._response is not None:
            self._response.eof()
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        self.resume_writing()
        response, self._response = self._response, None
        if response is not None:
            response.lost()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)


class _Pool:
    """Idle connections; the one used last is taken first, so that the others can expire."""

    def __init__(self) -> None:
        self.connections: set[_Connection] = set()
        """All that are open."""
        self._idle: dict[_Connection, None] = {}  # in the order in which they became idle
        self._sweeper: asyncio.TimerHandle | None = None
        self.closed = False

    def take(self, now: float) -> _Connection | None:
        """Take a connection that can be used; None if there is none."""
        while self._idle:
            connection, _ = self._idle.popitem()
            fresh = now - connection.idle_at < _IDLE_EXPIRY_S
            if fresh and now - connection.born_at < _MAX_AGE_S and connection.usable:
                return connection
            connection.abort()
        return None

    def give(self, connection: _Connection) -> None:
        """Put a connection back."""
        if self.closed or not connection.usable:
            connection.abort()
            return
        connection.idle_at = connection.loop.time()
        self._idle[connection] = None
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(_IDLE_EXPIRY_S, self._sweep, connection.loop)

    def forget(self, connection: _Connection) -> None:
        """Take a connection out for good."""
        self._idle.pop(connection, None)
        self.connections.discard(connection)

    def close(self) -> None:
        """Close all connections, those in use too."""
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in list(self.connections):
            connection.abort()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long."""
        self._sweeper = None
        due = loop.time() - _IDLE_EXPIRY_S
        for connection in list(self._idle):
            if connection.idle_at > due:
                self._sweeper = loop.call_at(connection.idle_at + _IDLE_EXPIRY_S, self._sweep, loop)
                break
            connection.abort()


class Transport(httpx.AsyncBaseTransport):
    """The one upstream.

    Args:
        url: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`.
        timeouts: applied to each exchange.
        tls: how an https upstream is checked; the system's certificates if not given.
        has_room: whether there is a file descriptor for the last of so many new connections.
    """

    def __init__(
        self,
        url: str,
        timeouts: Timeouts,
        *,
        tls: ssl.SSLContext | None = None,
        has_room: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._timeouts = timeouts
        self._has_room = has_room
        self._dialling = 0
        self._pool = _Pool()
        self._path: str | None = None
        self._tls: ssl.SSLContext | None = None
        self._host, self._port = "", 0
        parts = urlsplit(url)
        self.authority = b"localhost"
        """`host:port`, for requests that come without a Host."""
        if parts.scheme == "unix":
            self._path = parts.path
        else:
            self._host = parts.hostname or ""
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
            self.authority = parts.netloc.encode("idna")
            if parts.scheme == "https":
                self._tls = tls or ssl.create_default_context()

    @property
    def open_connections(self) -> int:
        """How many connections there are, idle ones included."""
        return len(self._pool.connections)

    async def open(
        self, method: str, target: bytes, headers: RawHeaders, body: RequestBody | None
    ) -> UpstreamResponse:
        """Send a request and wait for the response's head.

        A request without a body and with an idempotent method is sent a second time, on a new
        connection, if its connection turned out to be dead. Any other may have been acted on,
        and paid for, unless not a byte of it could be written.

        Args:
            target: as it is to stand in the request line.
            headers: as they are to stand in the head. `content-length` or `transfer-encoding`
                says how the body is framed.
            body: None for a request without one.

        Raises:
            UpstreamError: no head came.
            Exception: what the body raised.
        """
        lines = [b"%b: %b\r\n" % pair for pair in headers]
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode("latin-1"), target, b"".join(lines))
        if not head.count(b"\r") == head.count(b"\n") == len(headers) + 2:
            raise UpstreamError(UpstreamFault.MALFORMED_REQUEST, "a line break in the head")
        chunked = body is not None and b"transfer-encoding" in [name for name, _ in headers]
        connection = self._pool.take(asyncio.get_running_loop().time())
        if connection is None:
            connection = await self._connect()
        try:
            return await self._exchange(connection, method, head, body, chunked)
        except UpstreamError as error:
            if body is not None or method not in _IDEMPOTENT or error.fault not in _DEAD:
                raise
        return await self._exchange(await self._connect(), method, head, None, chunked)

    async def dial(self, factory: Callable[[], P]) -> P:
        """Connect a protocol to the upstream, outside the pool.

        If this fails, or is cancelled, the protocols that `factory` made are of no use any
        more, and `connection_lost` need not have been called (uvloop).

        Raises:
            UpstreamError: there is no connection to be had.
        """
        # Those that are being made may not have theirs yet.
        if not self._has_room(self._dialling + 1):
            raise UpstreamError(UpstreamFault.NO_FILE_DESCRIPTORS)
        self._dialling += 1
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                if self._path is None:
                    return await self._dial_host(factory)
                loop = asyncio.get_running_loop()
                return (await loop.create_unix_connection(factory, self._path))[1]
        except TimeoutError:
            raise UpstreamError(UpstreamFault.CONNECT_TIMEOUT) from None
        except OSError as exc:
            raise UpstreamError(UpstreamFault.CONNECT_FAILED, str(exc)) from None
        finally:
            self._dialling -= 1

    async def _dial_host(self, factory: Callable[[], P]) -> P:
        # uvloop's create_connection could resolve the name, but when it is cancelled meanwhile,
        # and the name then is not found, the loop complains of an exception nobody retrieved.
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        faults: dict[str, None] = {}
        for *_, address in found:
            try:
                _, protocol = await loop.create_connection(
                    factory,
                    str(address[0]),
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
            except OSError as exc:
                faults[str(exc) or type(exc).__name__] = None
            else:
                return protocol
        raise OSError("; ".join(faults))

    async def probe(self, timeout_s: float) -> int:
        """Ask for LiteLLM's liveness endpoint and return the status code.

        Raises:
            UpstreamError: no head came in time.
        """
        headers = [(b"host", self.authority)]
        try:
            async with asyncio.timeout(timeout_s):
                response = await self.open("GET", b"/health/liveliness", headers, None)
        except TimeoutError:
            raise UpstreamError(UpstreamFault.FIRST_BYTE_TIMEOUT) from None
        response.close()
        return response.status_code

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request for httpx; the extension `target` replaces its URL's path and query."""
        target: bytes = request.extensions.get("target", request.url.raw_path)
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        framed = any(name in (b"content-length", b"transfer-encoding") for name, _ in headers)
        body = _StreamBody(request.stream) if framed else None
        try:
            response = await self.open(request.method, target, headers, body)
        except UpstreamError as error:
            raise _httpx_error(error) from None
        return httpx.Response(
            response.status_code, headers=response.headers, stream=_ResponseStream(response)
        )

    async def aclose(self) -> None:
        """Close all connections, and cut the exchanges that use one."""
        self._pool.close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        made: list[_Connection] = []

        def make() -> _Connection:
            made.append(_Connection(self._pool, loop))
            return made[-1]

        try:
            connection = await self.dial(make)
            if self._pool.closed:
                raise UpstreamError(UpstreamFault.CONNECT_FAILED, "the transport is closed")
        except BaseException:
            # uvloop closes a connection whose making is cancelled without telling it, and over
            # TLS waits for the other side first.
            for lost in made:
                lost.abort()
            raise
        return connection

    async def _exchange(
        self,
        connection: _Connection,
        method: str,
        head: bytes,
        body: RequestBody | None,
        chunked: bool,
    ) -> UpstreamResponse:
        response = self._begin(connection, method)
        try:
            first, more = (b"", False) if body is None else body.take()
            if chunked:
                first = _framed(first) if first else b""
                first += b"" if more else b"0\r\n\r\n"
            # One write: a request whose body is there goes out in one segment.
            message = head + first
            if not connection.write(message):
                response.close()
                connection = await self._connect()
                response = self._begin(connection, method)
                if not connection.write(message):
                    raise UpstreamError(UpstreamFault.CONNECTION_LOST)
            if more:
                assert body is not None
                response.start_upload(body, chunked=chunked)
            else:
                if not connection.flushed:
                    response.watch_sending()
                response.sent()
            await response.head()
        except BaseException:
            response.close()
            raise
        return response

    def _begin(self, connection: _Connection, method: str) -> UpstreamResponse:
        response = UpstreamResponse(connection, method, self._timeouts)
        connection.begin(response)
        return response


def _framed(piece: bytes) -> bytes:
    """Frame a piece as one chunk (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


class _StreamBody:
    """A request's body that httpx streams."""

    def __init__(self, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> None:
        assert isinstance(stream, httpx.AsyncByteStream)
        self._stream = stream

    def take(self) -> tuple[bytes, bool]:
        return b"", True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            if piece:
                yield piece


class _ResponseStream(httpx.AsyncByteStream):
    """A response's body, for httpx."""

    def __init__(self, response: UpstreamResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._response.chunks()) as pieces:
                async for piece in pieces:
                    yield piece
        except UpstreamError as error:
            raise _httpx_error(error) from None

    async def aclose(self) -> None:
        self._response.close()


_HTTPX_ERRORS: dict[UpstreamFault, type[httpx.TransportError]] = {
    UpstreamFault.CONNECT_FAILED: httpx.ConnectError,
    UpstreamFault.CONNECT_TIMEOUT: httpx.ConnectTimeout,
    UpstreamFault.SEND_TIMEOUT: httpx.WriteTimeout,
    UpstreamFault.FIRST_BYTE_TIMEOUT: httpx.ReadTimeout,
    UpstreamFault.IDLE_TIMEOUT: httpx.ReadTimeout,
    UpstreamFault.CONNECTION_LOST: httpx.ReadError,
    UpstreamFault.MALFORMED_REQUEST: httpx.LocalProtocolError,
}


def _httpx_error(error: UpstreamError) -> httpx.TransportError:
    return _HTTPX_ERRORS.get(error.fault, httpx.RemoteProtocolError)(str(error))
