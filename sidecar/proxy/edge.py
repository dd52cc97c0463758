"""The client's end of the wire: what has to be right before there is an ASGI application.

A subclass of uvicorn's httptools protocol, given to it by `Config(http=…)`. uvicorn keeps the
sockets, the connections and the tasks; what is received and sent on a connection is ours. What
this module knows is HTTP/1.1 framing (RFC 9112), limits and timers. What it must not know is
what is asked, or of whom.

The contract:

- A head is kept until it is whole, checked, and given to a parser of its own. What has two
  meanings is refused: two Hosts or none, a transfer coding other than `chunked`, a length and
  a coding. An upgrade other than a WebSocket's is taken out, as a server that does not know it
  would ignore it; uvicorn would take the body behind it for the next request
  (Kludex/uvicorn#2722).
- Requests that come before the answer to the one before are answered one after the other. The
  client's leaving is noticed all the same, because reading goes on: of what comes too early no
  more is kept than one head.
- Nothing is ever written into a running response: what goes wrong then ends the connection.
- One coarse timer looks after all connections (`Patrol`): slow heads, slow bodies, clients that
  do not read, idle ones.

The application gets the connection's own object in `scope["extensions"]["sidecar"]`, see
`Downstream`: what ASGI hides.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools
from starlette.types import Message, Scope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from sidecar.exchange import RefusalReason
from sidecar.proxy.refusal import Refusal

__all__ = ["Downstream", "Edge", "Limits", "Patrol", "downstream_of"]

_MAX_HEADERS = 4096
"""h11, on which LiteLLM's own server runs, takes heads of 16 KiB: no more headers than that."""
_MAX_DISCARDED_BYTES = 64 * 1024 * 1024
"""How much of a request is read and dropped after its answer, so that the client, which still
sends, gets to read it: twice the longest request that Anthropic takes."""
_LINGER_S = 2.0
"""How long a connection that ends early is read from, so that the client's kernel does not
throw away the answer with the rest (RFC 9112 section 9.6)."""
_TICK_S = 1.0

_BEGINNING = re.compile(rb"[A-Z-]{1,24}(?: |$)")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_UPGRADE_LINE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
# net/tcp_states.h: the other side has closed, although what it sent is not read yet.
_TCP_CLOSE, _TCP_CLOSE_WAIT = 7, 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take of the process. Times are in seconds, None for no limit."""

    max_connections: int | None = None
    max_head_bytes: int = 64 * 1024
    head_timeout_s: float | None = None
    """From the first byte of a head to its last."""
    stall_timeout_s: float | None = None
    """Without a byte of a request that is under way, or of an answer taken by the client."""
    keep_alive_timeout_s: float = 75.0


class Downstream(Protocol):
    """What the application may know of its client, beyond ASGI."""

    target: bytes
    """The request target in origin form, otherwise as it was sent."""
    on_left: Callable[[], None] | None
    """Called once when the client has left before its response was complete."""
    on_paused: Callable[[], None] | None
    """Called when the client takes less than it is sent."""
    on_resumed: Callable[[], None] | None
    """Called when it takes more again."""

    def take_body(self) -> tuple[bytes, bool]:
        """Return what has come of the request's body, and whether more is to come."""

    def write(self, data: bytes, last: bool) -> None:
        """Send a piece of the response's body without waiting for the client to take it."""


def downstream_of(scope: Scope) -> Downstream:
    """Return what the edge knows of this request's client."""
    return cast("Downstream", scope["extensions"]["sidecar"])


_TOO_MANY = Refusal(
    503, RefusalReason.TOO_MANY_CONNECTIONS, "The sidecar has too many connections."
)
_BAD_REQUEST = Refusal(400, RefusalReason.BAD_REQUEST, "The request is not valid HTTP.")
_BAD_HOST = Refusal(400, RefusalReason.BAD_HOST, "The request needs exactly one Host header.")
_BAD_TARGET = Refusal(
    400, RefusalReason.BAD_TARGET, "The request target is neither a path nor a URL."
)
_BAD_BODY = Refusal(
    400, RefusalReason.BAD_BODY, "The request's body is not framed as its head says."
)
_BAD_CODING = Refusal(400, RefusalReason.BAD_TRANSFER_ENCODING, "HTTP/1.0 has no transfer codings.")
_UNKNOWN_CODING = Refusal(
    501, RefusalReason.UNKNOWN_TRANSFER_ENCODING, "The only transfer coding taken is chunked."
)
_CONNECT = Refusal(501, RefusalReason.CONNECT, "This is not a forward proxy.")
_VERSION = Refusal(505, RefusalReason.HTTP_VERSION, "Only HTTP/1.1 and HTTP/1.0 are understood.")
_HEAD_TOO_LARGE = Refusal(431, RefusalReason.HEAD_TOO_LARGE, "The request's head is too large.")
_SLOW_HEAD = Refusal(408, RefusalReason.SLOW_HEAD, "The request's head did not come in time.")
_SLOW_BODY = Refusal(408, RefusalReason.SLOW_BODY, "The request's body stopped coming.")


class _Parsed:
    """What the parser calls back for one request."""

    __slots__ = ("complete", "headers", "pieces", "sealed")

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.sealed = False
        """Whether the head is over; what the parser then calls a header is a trailer."""
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.sealed:
            self.headers.append((name.lower(), value))

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_begin(self) -> None:
        if self.complete:
            raise _SurplusError

    def on_message_complete(self) -> None:
        self.complete = True


class _SurplusError(Exception):
    """Raised in a callback of the parser at the request after the one that it is there for."""


class Edge(HttpToolsProtocol):
    """One connection of a client.

    Args:
        limits: what the client may take.
        refused: told the reason each time that a connection is ended here.
    """

    cycle: _Cycle | None  # type: ignore[assignment]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
        refused: Callable[[RefusalReason], None],
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = None  # type: ignore[assignment]  # each request has its own
        self._limits = limits
        self._refused = refused
        self._head = bytearray()
        self._left = 0
        """Bytes to come of a body with a length."""
        self._chunked: _Parsed | None = None
        """Takes a body in chunks from `_parser`, until it is whole."""
        self._parser: httptools.HttpRequestParser | None = None
        self._dry_bytes = 0
        self._discarded = 0
        self._early = b""
        """What came before the answer to the request before."""
        self._deaf = False
        """Whether what comes is dropped: the connection ends with the response."""
        self._lingering = False
        self._since = 0.0
        """Loop time of the last progress of what is waited for."""
        self._unsent = 0
        self._stuck_since = 0.0

    # What the loop tells it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        limit = self._limits.max_connections
        if limit is not None and len(self.connections) > limit:
            self._refuse(_TOO_MANY)

    def data_received(self, data: bytes) -> None:
        if not self._deaf:
            self._receive(data)

    def eof_received(self) -> None:
        # A client that closes its sending side has left, as for LiteLLM's own server.
        if self.cycle is not None:
            self.cycle.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self.flow.resume_writing()
        if self.cycle is not None:
            self.cycle.leave()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.cycle is not None and self.cycle.on_paused is not None:
            self.cycle.on_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is not None and self.cycle.on_resumed is not None:
            self.cycle.on_resumed()

    # Receiving

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _body_to_come(self) -> bool:
        return self._left > 0 or self._chunked is not None

    def _receive(self, data: bytes) -> None:
        while data and not self._deaf:
            if self._left:
                data = self._take_body(data)
            elif self._chunked is not None:
                self._take_chunks(data, self._chunked)
                return
            elif self._answering:
                self._hold(data)
                return
            else:
                data = self._take_head(data)

    def _hold(self, data: bytes) -> None:
        """Keep the beginning of the next request until this one is answered."""
        self._early += data
        if len(self._early) > self._limits.max_head_bytes:
            # The client has to send the rest again (RFC 9112 section 9.3.2).
            self._go_deaf()

    def _go_deaf(self) -> None:
        self._deaf = True
        self._early = b""
        if self._answering:
            assert self.cycle is not None
            self.cycle.keep_alive = False
        else:
            self.close()

    def _take_head(self, data: bytes) -> bytes:
        """Take bytes of a head, begin its request when it is whole, and return what follows."""
        if self._head:
            searched = max(0, len(self._head) - 3)
            self._head += data
            data = bytes(self._head) if b"\n" in data else b""
            end = data.find(b"\r\n\r\n", searched) if data else -1
        else:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2
            searched = 0
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._since = self.loop.time()
                self._head += data
        if end >= 0:
            self._head.clear()
            if end > self._limits.max_head_bytes:
                self._refuse(_HEAD_TOO_LARGE)
                return b""
            return self._begin(data[: end + 4], data[end + 4 :])
        if len(self._head) > self._limits.max_head_bytes:
            self._refuse(_HEAD_TOO_LARGE)
        elif self._head and (
            not _BEGINNING.match(self._head[:25]) or _BARE_LF.search(self._head, searched)
        ):
            self._refuse(_BAD_REQUEST)  # more of it would not make it a request
        return b""

    def _begin(self, head: bytes, rest: bytes) -> bytes:
        """Begin a request whose head is whole; return what follows, if it is not its body."""
        parts = head[: head.find(b"\r\n")].split(b" ")
        if len(parts) != 3:
            self._refuse(_BAD_REQUEST)
            return b""
        method, target, version = parts
        parsed = _Parsed()
        parser = httptools.HttpRequestParser(parsed)
        upgrade = False
        try:
            if method == b"CONNECT":
                raise _RefusedError(_CONNECT)
            try:
                parser.feed_data(head)
            except httptools.HttpParserUpgrade:
                upgrade = True
            names = [name for name, _ in parsed.headers]
            if version != b"HTTP/1.1" and version != b"HTTP/1.0":
                raise _RefusedError(_VERSION)
            if len(names) > _MAX_HEADERS:
                raise _RefusedError(_HEAD_TOO_LARGE)
            hosts = names.count(b"host")
            if hosts != 1 and (hosts or version == b"HTTP/1.1"):
                raise _RefusedError(_BAD_HOST)  # RFC 9112 section 3.2
            if b"transfer-encoding" in names:
                _check_coding(parsed.headers, version)
            target = _origin_form(target)
        except httptools.HttpParserError:
            self._refuse(_BAD_REQUEST)
            return b""
        except _RefusedError as error:
            self._refuse(error.refusal)
            return b""
        if upgrade:
            if method == b"GET" and self._takes_websocket(parsed.headers, names):
                self._tunnel(head + rest)
                return b""
            # The parser believes that what is upgraded has no body to it.
            return self._begin(_UPGRADE_LINE.sub(b"", head), rest)
        self._start(method, target, version, parsed, names)
        if self._chunked is parsed:
            self._parser = parser
        return rest

    def _takes_websocket(self, headers: list[tuple[bytes, bytes]], names: list[bytes]) -> bool:
        """Whether a head is a WebSocket's handshake (RFC 6455 section 4.1) that can be taken."""
        if self.config.ws_protocol_class is None:
            return False
        if b"content-length" in names or b"transfer-encoding" in names:
            return False
        upgrades = [value.strip().lower() for name, value in headers if name == b"upgrade"]
        return upgrades == [b"websocket"]

    def _start(
        self, method: bytes, target: bytes, version: bytes, parsed: _Parsed, names: list[bytes]
    ) -> None:
        raw_path, _, query = target.partition(b"?")
        path = raw_path.decode("latin-1")
        modern = version == b"HTTP/1.1"
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1" if modern else "1.0",
            "method": method.decode("ascii"),
            "scheme": self.scheme,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": parsed.headers,
            "client": self.client,
            "server": self.server,
        }
        cycle = _Cycle(self, scope, target, modern and not _closes(parsed.headers))
        scope["extensions"] = {"sidecar": cycle}
        if modern and b"expect" in names:
            expect = [value.lower() for name, value in parsed.headers if name == b"expect"]
            cycle.waits_for_100 = expect == [b"100-continue"]
        if parsed.complete:
            cycle.more_body = False
        else:
            parsed.sealed = True
            self._since = self.loop.time()
            self._discarded = self._dry_bytes = 0
            lengths = [value for name, value in parsed.headers if name == b"content-length"]
            if lengths:
                self._left = int(lengths[0])
            else:
                self._chunked = parsed
        self.cycle = cycle
        self._start_asgi_task(cycle, self.app)  # type: ignore[arg-type]

    def _take_body(self, data: bytes) -> bytes:
        """Take bytes of a body with a length, and return what follows it."""
        piece = data if len(data) <= self._left else data[: self._left]
        self._left -= len(piece)
        self._body_came(piece, more=self._left > 0)
        return data[len(piece) :]

    def _take_chunks(self, data: bytes, parsed: _Parsed) -> None:
        """Take bytes of a body in chunks."""
        self._dry_bytes += len(data)
        malformed = surplus = False
        try:
            assert self._parser is not None
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            # Where the next request begins the parser does not say: it is not answered.
            surplus = parsed.complete
            malformed = not surplus
        if parsed.pieces:
            self._dry_bytes = 0
        if parsed.complete:
            self._chunked = self._parser = None
        if parsed.pieces or parsed.complete:
            piece = b"".join(parsed.pieces)
            parsed.pieces.clear()
            self._body_came(piece, more=not parsed.complete)
        if malformed:
            self._refuse(_BAD_BODY)
        elif self._dry_bytes > self._limits.max_head_bytes:
            self._refuse(_HEAD_TOO_LARGE)  # trailers, or extensions of chunks, without end
        elif surplus:
            self._go_deaf()

    def _body_came(self, piece: bytes, *, more: bool) -> None:
        cycle = self.cycle
        assert cycle is not None
        self._since = self.loop.time()
        if not cycle.response_complete:
            cycle.take(piece, more)
            return
        self._discarded += len(piece)
        if self._discarded > _MAX_DISCARDED_BYTES:
            self.transport.close()

    def _tunnel(self, data: bytes) -> None:
        """Hand the connection over to the WebSocket tunnel, with all that it has received."""
        self.connections.discard(self)
        make = cast("Callable[..., asyncio.Protocol]", self.config.ws_protocol_class)
        protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.app_state
        )
        self._deaf = True
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(data)

    # Ending

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        cycle = self.cycle
        assert cycle is not None
        self._since = self.loop.time()
        if not cycle.keep_alive:
            self.close()
        elif not self.transport.is_closing():
            self.flow.resume_reading()
            if self._early:
                self.loop.call_soon(self._receive_early)

    def _receive_early(self) -> None:
        early, self._early = self._early, b""
        self.data_received(early)

    def close(self) -> None:
        """Close, after what was written is sent; linger if the client may still be sending."""
        if self._lingering or self.transport.is_closing():
            return
        if self._deaf or self._body_to_come:
            self._deaf = self._lingering = True
            self._since = self.loop.time()
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """End the connection, with an answer if that can still be understood."""
        self._refused(RefusalReason(refusal.reason))
        self._early = b""
        self._head.clear()
        self._left, self._chunked, self._parser = 0, None, None
        if self._answering:
            assert self.cycle is not None
            started = self.cycle.response_started
            self.cycle.leave()
            if started:
                self.transport.abort()
                return
        self._deaf = True
        body = refusal.body()
        headers = [*refusal.headers(body), (b"connection", b"close")]
        if refusal is _TOO_MANY:
            headers.append((b"retry-after", b"1"))
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[refusal.status_code] + lines + b"\r\n" + body)
        self.close()

    def check(self, now: float) -> None:
        """End the connection if its time is up."""
        limits = self._limits
        waited = now - self._since
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent or not unsent:
            self._unsent, self._stuck_since = unsent, now
        elif _over(now - self._stuck_since, limits.stall_timeout_s):
            self._refused(RefusalReason.SLOW_READER)
            self.transport.abort()
            return
        if self._lingering:
            if waited > _LINGER_S:
                self.transport.abort()
        elif self.flow.read_paused:
            if self._has_left():
                self.transport.abort()
            self._since = now  # it is not the client that is slow
        elif self._body_to_come:
            if _over(waited, limits.stall_timeout_s):
                self._refuse(_SLOW_BODY)
        elif self._answering:
            pass
        elif self._head:
            if _over(waited, limits.head_timeout_s):
                self._refuse(_SLOW_HEAD)
        elif waited > limits.keep_alive_timeout_s:
            self.close()

    def _has_left(self) -> bool:
        """Whether the client has closed its side, behind what was not read yet."""
        if not hasattr(socket, "TCP_INFO"):
            return False
        connection: socket.socket = self.transport.get_extra_info("socket")
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return False  # not TCP
        return info[0] in (_TCP_CLOSE, _TCP_CLOSE_WAIT)


class _RefusedError(Exception):
    """A head that is valid to the parser, and not to us."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


def _check_coding(headers: list[tuple[bytes, bytes]], version: bytes) -> None:
    """Refuse what may mean one thing here and another upstream (RFC 9112 section 6.1)."""
    if version != b"HTTP/1.1":
        raise _RefusedError(_BAD_CODING)
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings != [b"chunked"]:
        raise _RefusedError(_UNKNOWN_CODING)


def _origin_form(target: bytes) -> bytes:
    """Take the authority off a target: it does not choose the upstream (RFC 9112 section 3.2.2)."""
    if target.startswith(b"/") or target == b"*":
        return target
    match = _ABSOLUTE_FORM.match(target)
    if match is None:
        raise _RefusedError(_BAD_TARGET)
    rest = target[match.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def _closes(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the client says that it sends nothing more (RFC 9112 section 9.6)."""
    options = [value for name, value in headers if name == b"connection"]
    return bool(options) and b"close" in b",".join(options).lower().replace(b" ", b"").split(b",")


def _over(waited: float, limit: float | None) -> bool:
    return limit is not None and waited > limit


class _Cycle:
    """One request and its response, as ASGI sees it."""

    __slots__ = (
        "_arrived",
        "_chunked",
        "_edge",
        "_end_told",
        "_head",
        "_pieces",
        "_remaining",
        "_scope",
        "_size",
        "disconnected",
        "keep_alive",
        "more_body",
        "on_left",
        "on_paused",
        "on_resumed",
        "response_complete",
        "response_started",
        "target",
        "waits_for_100",
    )

    def __init__(self, edge: Edge, scope: dict[str, Any], target: bytes, keep_alive: bool) -> None:
        self.target = target
        self.keep_alive = keep_alive
        self.on_left: Callable[[], None] | None = None
        self.on_paused: Callable[[], None] | None = None
        self.on_resumed: Callable[[], None] | None = None
        self.waits_for_100 = False
        self.more_body = True
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self._edge = edge
        self._scope = scope
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
        # The scope holds this object, and an idle connection need not hold its last headers.
        self._scope = {}
        self.on_left = self.on_paused = self.on_resumed = None
        if not self.response_complete and not self.disconnected:
            self.leave()
            if self._remaining is None and not self._chunked:
                # The end of the connection would be the end of the body.
                linger = struct.pack("ii", 1, 0)
                connection: socket.socket = edge.transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                edge.transport.abort()
            else:
                edge.transport.close()

    # The request

    def take(self, piece: bytes, more: bool) -> None:
        """Take a piece of the body from the edge."""
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size > HIGH_WATER_LIMIT:
                self._edge.flow.pause_reading()
        self.more_body = more
        self.waits_for_100 = False  # the client did not
        self._wake()

    def take_body(self) -> tuple[bytes, bool]:
        """Return what has come of the request's body, and whether more is to come."""
        body = b"".join(self._pieces) if len(self._pieces) != 1 else self._pieces[0]
        self._pieces.clear()
        self._size = 0
        self._end_told = not self.more_body
        return body, self.more_body

    async def receive(self) -> Message:
        """The application's `receive`."""
        while not self.disconnected and not self.response_complete:
            if self._pieces or not (self.more_body or self._end_told):
                body, more = self.take_body()
                return {"type": "http.request", "body": body, "more_body": more}
            if self.waits_for_100:
                self.waits_for_100 = False
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
        flow = self._edge.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if message["type"] == "http.response.start":
            self._start(message["status"], message["headers"])
        else:
            self.write(message.get("body", b""), not message.get("more_body", False))

    def _start(self, status_code: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        if self.waits_for_100:
            # Whether what comes next is the body or a request, nobody could tell.
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
        if not self.keep_alive and (b"connection", b"close") not in headers:
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
        if data:
            self._edge.transport.write(data)
        if last:
            self.response_complete = True
            self._wake()
            self._edge.on_response_complete()


class Patrol:
    """Looks after all connections of one server, once a second.

    Args:
        connections: the server's own set.
    """

    def __init__(self, connections: Collection[object]) -> None:
        self._connections = connections

    async def run(self) -> None:
        """Go on until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_S)
            now = loop.time()
            for connection in list(self._connections):
                if isinstance(connection, Edge):
                    connection.check(now)
