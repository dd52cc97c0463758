"""The client's end of the wire: what has to be right before there is an ASGI application.

A subclass of uvicorn's httptools protocol, given to it by `Config(http=…)`. uvicorn keeps the
sockets, the connections and the tasks; what is received and sent on a connection is ours. What
this module knows is where one request ends and the next begins, limits and timers. Heads are
read by `head`, the request and its response as the application sees them are in `cycle`. What
it must not know is what is asked, or of whom.

The contract:

- A head is kept until it is whole, then checked, and given to a parser of its own.
- Requests that come before the answer to the one before are answered one after the other. The
  client's leaving is noticed all the same, because reading goes on: of what comes too early no
  more is kept than one head.
- Nothing is ever written into a running response or behind the last one of a connection: what
  goes wrong then ends the connection, and never so that a response looks whole.
- A server that stops first says so in its answers, and then closes what is quiet: a request is
  answered, or finds its connection closed in an orderly way, and is never cut.
- One coarse timer looks after all connections (`Patrol`): slow heads, slow bodies, clients that
  do not read, idle ones.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast
from urllib.parse import unquote

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from sidecar.exchange import RefusalReason
from sidecar.proxy.cycle import Cycle, Downstream, downstream_of
from sidecar.proxy.head import HEAD_END, RefusedError, Request, may_become_a_head, parse_head
from sidecar.proxy.refusal import REFUSALS

__all__ = ["Downstream", "Edge", "Limits", "Listener", "Patrol", "downstream_of"]

_MAX_DISCARDED_BYTES = 64 * 1024 * 1024
"""How much of a request is read and dropped after its answer, so that the client, which still
sends, gets to read it: twice the longest request that Anthropic takes."""
_LINGER_S = 2.0
"""How long a connection that ends early is read from, so that the client's kernel does not
throw away the answer with the rest (RFC 9112 section 9.6)."""
_TICK_S = 1.0

# With this, closing the socket resets the connection instead of ending it.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
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


class Listener:
    """What the connections of one server have in common.

    Args:
        limits: what a client may take.
        refused: told the reason each time that a connection is ended here.
        admits: whether a connection may have the file descriptor of this number.
        max_turned_away: how many connections beyond the limit are held until their clients
            have read why; more are closed without a word.
        quiet_s: how long nothing happens on a connection before it is closed because the
            server stops: a request that its client sends meanwhile is still served.
    """

    def __init__(
        self,
        limits: Limits,
        refused: Callable[[RefusalReason], None],
        *,
        admits: Callable[[int], bool] = lambda _: True,
        max_turned_away: int = 128,
        quiet_s: float = 1.0,
    ) -> None:
        self.limits = limits
        self.refused = refused
        self.admits = admits
        self.max_turned_away = max_turned_away
        self.quiet_s = quiet_s
        self.turned_away: set[Edge] = set()
        """Connections beyond the limit. They do not count among the server's."""
        self.announcing = False
        """Whether each answer says that its connection closes behind it."""
        self.closing = False
        """Whether connections close as soon as nothing happens on them."""


class Edge(HttpToolsProtocol):
    """One connection of a client.

    Args:
        listener: what it has in common with the others.
    """

    cycle: Cycle | None  # type: ignore[assignment]
    """The request that is being answered."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        listener: Listener,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = None  # type: ignore[assignment]  # each request has its own
        self.listener = listener
        self._limits = listener.limits
        self._head = bytearray()
        self._left = 0
        """Bytes to come of a body with a length."""
        self._chunked: Request | None = None
        """Reads a body in chunks, until it is whole."""
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

    # What the loop and the server tell it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        limit = self._limits.max_connections
        number = transport.get_extra_info("socket").fileno()
        if not self.listener.admits(number) or (
            limit is not None and len(self.connections) > limit
        ):
            self._turn_away()

    def data_received(self, data: bytes) -> None:
        while data and not self._deaf:
            if self._left:
                data = self._take_body(data)
            elif self._chunked is not None:
                data = self._take_chunks(data, self._chunked)
            elif self.cycle is not None:
                self._hold(data)
                return
            else:
                data = self._take_head(data)

    def eof_received(self) -> None:
        # A client that closes its sending side has left, as for LiteLLM's own server.
        self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self.listener.turned_away.discard(self)
        self.flow.resume_writing()
        if self.cycle is not None:
            self.cycle.leave()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent = 0
        if self.cycle is not None and self.cycle.on_resumed is not None:
            self.cycle.on_resumed()

    def shutdown(self) -> None:
        """End the connection if nothing happens on it, as the patrol will later: the listener
        is closing."""
        self.check(self.loop.time())

    # Receiving

    @property
    def _body_to_come(self) -> bool:
        return self._left > 0 or self._chunked is not None

    def _hold(self, data: bytes) -> None:
        """Keep the beginning of the next request until this one is answered."""
        assert self.cycle is not None
        self._early += data
        if len(self._early) > self._limits.max_head_bytes:
            # The client has to send the rest again (RFC 9112 section 9.3.2).
            self._early = b""
            self._deaf = True
            self.cycle.keep_alive = False

    def _take_head(self, data: bytes) -> bytes:
        """Take bytes of a head, begin its request when it is whole, and return what follows."""
        head = self._head
        limit = self._limits.max_head_bytes
        searched = max(0, len(head) - 3)
        if head:
            head += data
            end = head.find(HEAD_END, searched)
            if end >= 0:
                data = bytes(head)
                head.clear()
        else:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2
            end = data.find(HEAD_END)
            if end < 0 and data:
                self._since = self.loop.time()
                head += data
        if end > limit or len(head) > limit:
            self._refuse(RefusalReason.HEAD_TOO_LARGE)
        elif end >= 0:
            end += len(HEAD_END)
            return self._begin(data[:end], data[end:])
        elif head and not may_become_a_head(head, searched):
            self._refuse(RefusalReason.BAD_REQUEST)
        return b""

    def _begin(self, head: bytes, rest: bytes) -> bytes:
        """Begin a request whose head is whole; return what follows that is not taken."""
        try:
            request = parse_head(head)
        except RefusedError as error:
            self._refuse(error.reason)
            return b""
        if request.websocket and self.config.ws_protocol_class is not None:
            self._tunnel(head + rest)
            return b""
        raw_path, _, query = request.target.partition(b"?")
        path = raw_path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1" if request.modern else "1.0",
            "method": request.method.decode("ascii"),
            "scheme": self.scheme,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": request.headers,
            "client": self.client,
            "server": self.server,
        }
        cycle = Cycle(self, scope, request.target, request.keep_alive)
        scope["extensions"] = {"sidecar": cycle}
        if not request.complete:
            self._since = self.loop.time()
            self._discarded = 0
            if request.length is not None:
                self._left = request.length
            else:
                self._chunked = request
            cycle.expect_body()
        self.cycle = cycle
        self._start_asgi_task(cycle, self.app)  # type: ignore[arg-type]
        return rest

    def _take_body(self, data: bytes) -> bytes:
        """Take bytes of a body with a length, and return what follows it."""
        piece = data if len(data) <= self._left else data[: self._left]
        self._left -= len(piece)
        self._body_came(piece, more=self._left > 0)
        return data[len(piece) :]

    def _take_chunks(self, data: bytes, request: Request) -> bytes:
        """Take bytes of a body in chunks, and return what follows it."""
        refused: RefusedError | None = None
        try:
            data = data[request.feed_chunks(data, self._limits.max_head_bytes) :]
        except RefusedError as error:
            refused = error
        if request.complete:
            self._chunked = None
        if (piece := request.take()) or request.complete:
            self._body_came(piece, more=not request.complete)
        if refused is not None:
            self._refuse(refused.reason)
        return data

    def _body_came(self, piece: bytes, *, more: bool) -> None:
        self._since = self.loop.time()
        if self.cycle is not None:
            self.cycle.take(piece, more)
            return
        self._discarded += len(piece)
        if self._discarded > _MAX_DISCARDED_BYTES:
            self._deaf = True
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
        """Take note that the response was written to its end."""
        self.server_state.total_requests += 1
        assert self.cycle is not None
        keep_alive = self.cycle.keep_alive
        self.cycle = None
        self._since = self.loop.time()
        if not keep_alive:
            self.close()
        elif not self.transport.is_closing():
            self.flow.resume_reading()
            if self._early:
                early, self._early = self._early, b""
                self.data_received(early)

    def close(self) -> None:
        """Close, after what was written is sent; linger if the client may still be sending.

        One that is not told so beforehand may send a request just then. It shall find the
        connection closed, and not broken: that it may take for a failure of its request.
        """
        if self._lingering or self.transport.is_closing():
            return
        if self._deaf or self._body_to_come or self.listener.closing:
            self._linger()
            self.transport.write_eof()
        else:
            self.transport.close()

    def cut(self) -> None:
        """End the connection within a response, after what was written of it is sent."""
        self._leave()
        if self.cycle is not None and self.cycle.until_close:
            # The connection is reset, with which all is lost that has not arrived yet.
            self._linger()
        else:
            self.close()

    def _linger(self) -> None:
        """Wait a while for the client to take what was written."""
        self._deaf = self._lingering = True
        self._since = self.loop.time()
        self.flow.resume_reading()

    def abort(self) -> None:
        """End the connection at once, whatever is under way."""
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        """Have the running request end as if the client had left."""
        if self.cycle is None:
            return
        if self.cycle.until_close:
            self._reset_at_close()
        self.cycle.leave()

    def _reset_at_close(self) -> None:
        connection: socket.socket = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)

    def _turn_away(self) -> None:
        """End a connection for which there is no room."""
        turned_away = self.listener.turned_away
        self.connections.discard(self)
        if len(turned_away) < self.listener.max_turned_away:
            turned_away.add(self)
            self._refuse(RefusalReason.TOO_MANY_CONNECTIONS)
        else:
            self.listener.refused(RefusalReason.TOO_MANY_CONNECTIONS)
            self._deaf = True
            self.transport.abort()

    def _refuse(self, reason: RefusalReason) -> None:
        """End the connection, with an answer if that can still be understood."""
        self.listener.refused(reason)
        self._early = b""
        self._head.clear()
        # The body is that of a request whose answer is out.
        answered = self.cycle is None and self._body_to_come
        self._left, self._chunked = 0, None
        if self.cycle is not None:
            if self.cycle.response_started:
                self.abort()
                return
            self.cycle.leave()
            self.cycle = None
        self._deaf = True
        if not answered:
            refusal = REFUSALS[reason]
            body = refusal.body()
            headers = [*refusal.headers(body), (b"connection", b"close")]
            lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
            self.transport.write(STATUS_LINE[refusal.status_code] + lines + b"\r\n" + body)
        self.close()

    def check(self, now: float) -> None:
        """End the connection if its time is up.

        Args:
            now: loop time.
        """
        limits = self._limits
        waited = now - self._since
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent or not unsent:
            self._unsent, self._stuck_since = unsent, now
        elif _over(now - self._stuck_since, limits.stall_timeout_s):
            self.listener.refused(RefusalReason.SLOW_READER)
            # Nor shall the kernel keep what is left for it.
            self._reset_at_close()
            self.abort()
            return
        if self._lingering:
            if unsent:
                self._since = now
            elif waited > _LINGER_S:
                self.transport.abort()
        elif self.transport.is_closing():
            pass
        elif self.flow.read_paused:
            self._since = now  # it is not the client that is slow
            if self._has_left():
                self.abort()
        elif self.listener.closing and self.cycle is None:
            if waited >= self.listener.quiet_s:
                self.close()
        elif self._body_to_come:
            if _over(waited, limits.stall_timeout_s):
                self._refuse(RefusalReason.SLOW_BODY)
        elif self.cycle is not None:
            pass
        elif self._head:
            if _over(waited, limits.head_timeout_s):
                self._refuse(RefusalReason.SLOW_HEAD)
        elif waited > limits.keep_alive_timeout_s:
            self.close()

    def _has_left(self) -> bool:
        """Whether the client has closed its side, behind what was not read yet.

        Not found is one whose end waits for room in a full receive window.
        """
        if not hasattr(socket, "TCP_INFO"):
            return False
        connection: socket.socket = self.transport.get_extra_info("socket")
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info[0] in (_TCP_CLOSE, _TCP_CLOSE_WAIT)


def _over(waited: float, limit: float | None) -> bool:
    return limit is not None and waited > limit


class Patrol:
    """Looks after all connections of one server, once a second.

    Args:
        connections: the sets of them.
    """

    def __init__(self, *connections: Iterable[object]) -> None:
        self._connections = connections

    async def run(self) -> None:
        """Go on until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_S)
            now = loop.time()
            for connection in list(chain(*self._connections)):
                if isinstance(connection, Edge):
                    # In a callback of its own, a fault of one ends no more than that.
                    loop.call_soon(connection.check, now)
