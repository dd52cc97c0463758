"""WebSockets: the handshake is passed on, and then bytes go both ways that nobody reads.

Pings, compression, fragments, subprotocols, close codes and limits of size are the two ends'
own, and so is the answer to a handshake that is refused. Memory is bounded by flow control: each
end is read no faster than the other takes it.

Contract: uvicorn makes a tunnel of a connection on which a WebSocket is asked for. The first
`data_received` has the whole head of that request, and perhaps bytes behind it. One task stands
for the tunnel, and to cancel it is to abort both connections. However a tunnel ends, neither is
left open, and the accounts have had one `begin` and one `submit`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from time import perf_counter
from typing import Any, Protocol, cast
from urllib.parse import unquote

from uvicorn.config import Config
from uvicorn.protocols.utils import get_remote_addr, is_ssl
from uvicorn.server import ServerState

from sidecar.errors import UpstreamError
from sidecar.exchange import (
    Accounts,
    End,
    Exchange,
    RefusalReason,
    RequestFacts,
    UpstreamFault,
    header,
)
from sidecar.proxy.capacity import Capacity
from sidecar.proxy.handshake import Answer, Request, head
from sidecar.proxy.headers import ForwardedRule, request_headers, response_headers
from sidecar.proxy.refusal import REFUSALS, Refusal, refusal_of
from sidecar.proxy.routes import classify

__all__ = ["Dialler", "tunnel_protocol"]

_MAX_HELD_BYTES = 64 * 1024
"""What a client may say before it has its answer: asyncio's own high-water mark."""
_LINGER_S = 10.0
"""How long one end may take to end after the other has: websockets' own `close_timeout`."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


class Dialler(Protocol):
    """The way to the upstream."""

    async def dial(self, factory: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """Open a connection that is the caller's own.

        Raises:
            UpstreamError: there is none to be had.
        """


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all tunnels have in common."""

    upstream: Dialler
    accounts: Accounts
    forwarded: ForwardedRule
    first_byte_timeout_s: float | None
    capacity: Capacity


def tunnel_protocol(
    upstream: Dialler,
    accounts: Accounts,
    forwarded: ForwardedRule,
    *,
    first_byte_timeout_s: float | None = None,
    capacity: Capacity | None = None,
) -> type[asyncio.Protocol]:
    """Make the class for uvicorn's `Config(ws=…)`.

    Args:
        upstream: where WebSockets lead.
        accounts: takes each of them at its end.
        forwarded: who may say for whom a request is.
        first_byte_timeout_s: from the request to the head of its answer; None for no limit.
        capacity: what is under way; handshakes past its limit get 503.
    """
    shared = _Shared(upstream, accounts, forwarded, first_byte_timeout_s, capacity or Capacity())

    class Tunnel(_Tunnel):
        def __init__(
            self, config: Config, server_state: ServerState, app_state: dict[str, Any]
        ) -> None:
            super().__init__(shared, server_state)

    return Tunnel


class _Phase(Enum):
    HANDSHAKE = auto()
    REFUSED = auto()
    """The upstream's refusal is being passed on."""
    OPEN = auto()
    ENDED = auto()
    """There is nothing more to pass on; the client may still be reading."""


class _End(asyncio.Protocol):
    """One of two connections, and how it follows the other."""

    other: _End

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._at_eof = False
        self._finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def write(self, data: bytes) -> None:
        """Pass bytes on; those for an end that has ended are dropped."""
        if self.transport is not None and not self._finished and not self.transport.is_closing():
            self.transport.write(data)

    def hold(self) -> None:
        """Stop reading."""
        if self.transport is not None and not self._at_eof:
            self.transport.pause_reading()

    def release(self) -> None:
        """Go on reading."""
        if self.transport is not None and not self._at_eof:
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.other.hold()

    def resume_writing(self) -> None:
        self.other.release()

    def finish(self) -> None:
        """Say no more after what was written, but listen on where that is possible.

        A connection that is closed outright is reset by what still comes in, and what its peer
        has not read by then is lost: a close frame, or the body of a refusal.
        """
        if self.transport is None or self._finished or self.transport.is_closing():
            return
        self._finished = True
        if self._at_eof or not self.transport.can_write_eof():  # TLS cannot
            self.transport.close()
        else:
            self.transport.write_eof()

    def abort(self, *, reset: bool = False) -> None:
        """Close at once, whatever is unsent; as a reset if the other end was reset."""
        if self.transport is None:
            return
        if reset:
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def unsent(self) -> int:
        """How many bytes wait to be sent."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def eof_received(self) -> bool:
        self._at_eof = True
        self.ended(None)
        return not self._finished and self.transport is not None and self.transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._at_eof = True
        # What it says has nowhere to go; but only while it is read does it show its end.
        self.other.release()
        self.ended(exc)

    def ended(self, exc: Exception | None) -> None:
        """Nothing more comes from this end; called once or twice.

        Args:
            exc: what broke it; None for an orderly end.
        """
        raise NotImplementedError


class _Upstream(_End):
    """The connection to the upstream."""

    def __init__(self, tunnel: _Tunnel) -> None:
        super().__init__()
        self.other = self._tunnel = tunnel
        self.answer = Answer()

    def data_received(self, data: bytes) -> None:
        phase = self._tunnel.phase
        if phase is _Phase.OPEN:
            self.other.write(data)
        elif phase is not _Phase.ENDED:
            try:
                behind = self.answer.feed(data)
            except UpstreamError as error:
                self._tunnel.fail(error.fault)
            else:
                self._tunnel.go_on(behind)

    def ended(self, exc: Exception | None) -> None:
        self._tunnel.upstream_ended(exc)


class _Tunnel(_End):
    """The connection to the client, and what the two make together."""

    def __init__(self, shared: _Shared, server_state: ServerState) -> None:
        super().__init__()
        self._shared = shared
        self._state = server_state
        self.other = self._upstream = _Upstream(self)
        self.phase = _Phase.HANDSHAKE
        self._task: asyncio.Task[None] | None = None
        self._held = bytearray()
        self._chunked = False
        self._answered = asyncio.Event()
        self._ending = asyncio.Event()
        self._lost = asyncio.Event()
        self._client_left = False
        self._accounted = False
        self._began = perf_counter()
        self._overhead_s = 0.0
        self._first_byte_s: float | None = None
        self._status_code = 499
        self._fault: UpstreamFault | None = None

    # The client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._state.connections.add(cast("Any", self))

    def data_received(self, data: bytes) -> None:
        if self._task is None:
            self._begin(data)
        elif self.phase is _Phase.OPEN:
            self.other.write(data)
        elif self.phase is _Phase.HANDSHAKE:
            self._held += data
            # Not at once: a connection that is not read does not show that its client left.
            if len(self._held) > _MAX_HELD_BYTES:
                self.hold()

    def shutdown(self) -> None:
        """Go on: uvicorn calls this when a drain begins, and cancels the task when it is over."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast("Any", self))
        super().connection_lost(exc)

    def ended(self, exc: Exception | None) -> None:
        if self.phase is _Phase.OPEN:
            self._follow(self._upstream, exc)
        elif self.phase is not _Phase.ENDED and self._task is not None:
            self._client_left = True
            self._task.cancel()
        self._check_lost()

    # The two

    def _begin(self, data: bytes) -> None:
        self._request = request = Request(data)
        self._held += request.behind
        path = request.target.partition(b"?")[0].decode("latin-1")
        self._info = classify(request.method, unquote(path))
        self._shared.accounts.begin(self._info.route)
        self._shared.capacity.taken += 1
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._state.tasks.add(self._task)
        # A task that is cancelled before it begins runs no `finally` of its own.
        self._task.add_done_callback(self._close)

    async def _run(self) -> None:
        try:
            if self._request.refusal is not None:
                self._refuse(self._request.refusal)
            elif self._shared.capacity.exceeded:
                self._shared.accounts.refuse(RefusalReason.TOO_MANY_REQUESTS)
                self._refuse(REFUSALS[RefusalReason.TOO_MANY_REQUESTS])
            else:
                await self._shake_hands()
            await self._last()
        except asyncio.CancelledError:
            if not self._client_left:
                raise
        except Exception as exc:
            self._shared.accounts.contain("proxy", exc)
            self._refuse(Refusal(502, "internal_error", "The sidecar failed."))

    def _close(self, task: asyncio.Task[None]) -> None:
        self._state.tasks.discard(task)
        self._account(End.CLIENT_LEFT if self._client_left else End.UPSTREAM_CUT)
        self.phase = _Phase.ENDED
        self._upstream.abort()
        self.abort()

    async def _shake_hands(self) -> None:
        """Pass the request on, and wait for the head of the answer."""
        assert self.transport is not None
        client = get_remote_addr(self.transport)
        headers = request_headers(
            self._request.headers,
            self._shared.forwarded,
            client[0] if client else "",
            "https" if is_ssl(self.transport) else "http",
            upgrade=True,
        )
        self._overhead_s += perf_counter() - self._began
        try:
            await self._shared.upstream.dial(lambda: self._upstream)
            self._upstream.write(head(b"GET %b HTTP/1.1" % self._request.target, headers))
            async with asyncio.timeout(self._shared.first_byte_timeout_s):
                await self._answered.wait()
        except UpstreamError as error:
            self.fail(error.fault)
        except TimeoutError:
            if self.phase is _Phase.HANDSHAKE:  # else both came at once
                self.fail(UpstreamFault.FIRST_BYTE_TIMEOUT)

    async def _last(self) -> None:
        """Wait until both connections are gone: as long as they like, but for a single one."""
        await self._ending.wait()
        unsent = -1
        while not self._lost.is_set():
            try:
                async with asyncio.timeout(_LINGER_S):
                    await self._lost.wait()
            except TimeoutError:
                before, unsent = unsent, self.unsent() + self._upstream.unsent()
                if unsent in (0, before):  # else somebody still reads what was said
                    return

    def go_on(self, behind: bytes) -> None:
        """Pass on what has come of the answer.

        Args:
            behind: bytes that came with a 101.
        """
        answer = self._upstream.answer
        if self.phase is _Phase.HANDSHAKE and answer.status_code:
            began = perf_counter()
            self._first_byte_s = began - self._began
            self._pass_head(answer, behind)
            self._overhead_s += perf_counter() - began
        if self.phase is _Phase.REFUSED:
            self._pass_body(answer)

    def _pass_head(self, answer: Answer, behind: bytes) -> None:
        self._status_code = answer.status_code
        opens = answer.status_code == 101
        headers = response_headers(answer.headers, upgrade=opens)
        if not opens:
            # Whether what its client sends next is a request or frames, nobody could tell.
            headers.append((b"connection", b"close"))
            self._chunked = answer.has_body and header(headers, b"content-length") is None
            if self._chunked:
                headers.append((b"transfer-encoding", b"chunked"))
        self.phase = _Phase.OPEN if opens else _Phase.REFUSED
        self._answered.set()
        self.release()
        self.write(head(b"HTTP/1.1 %d %b" % (answer.status_code, answer.reason), headers) + behind)
        if opens and self._held:
            self._upstream.write(bytes(self._held))
        self._held.clear()

    def _pass_body(self, answer: Answer) -> None:
        body = answer.take_body()
        if body and self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body)
        if answer.complete:
            # With its last byte the client has the answer: it must already be counted.
            self._account(End.COMPLETE)
            if self._chunked:
                body += b"0\r\n\r\n"
        self.write(body)
        if answer.complete:
            self._end()

    def upstream_ended(self, exc: Exception | None) -> None:
        """The upstream's `ended`."""
        answer = self._upstream.answer
        if self.phase is _Phase.OPEN:
            if exc is not None:
                self._fault = UpstreamFault.BODY_CUT
            self._follow(self, exc)
        elif self.phase is not _Phase.ENDED:
            answer.feed_eof()
            if answer.complete:
                self.go_on(b"")
            else:
                self.fail(UpstreamFault.CONNECTION_LOST)
        self._check_lost()

    def _follow(self, end: _End, exc: Exception | None) -> None:
        """Let one end follow the other in the manner in which that ended."""
        self._account(End.COMPLETE)
        self._ending.set()
        if exc is None:
            end.finish()
        else:
            end.abort(reset=True)

    def fail(self, fault: UpstreamFault) -> None:
        """The upstream gave no answer, or not all of it."""
        if self.phase is _Phase.HANDSHAKE:
            self._fault = fault
            self._refuse(refusal_of(fault))
        elif self.phase is _Phase.REFUSED:
            self._fault = UpstreamFault.BODY_CUT
            self._account(End.UPSTREAM_CUT)
            self._end()  # short of its end, which the client sees by its framing

    def _refuse(self, refusal: Refusal) -> None:
        """Answer in our own name, unless an answer is out already."""
        if self.phase is not _Phase.HANDSHAKE:
            return
        self._status_code = refusal.status_code
        body = refusal.body(anthropic=self._info.anthropic_errors)
        headers = [*refusal.headers(body), (b"connection", b"close")]
        phrase = HTTPStatus(refusal.status_code).phrase.encode()
        self._account(End.COMPLETE)
        self.write(head(b"HTTP/1.1 %d %b" % (refusal.status_code, phrase), headers) + body)
        self._end()

    def _end(self) -> None:
        """The client has what there is for it."""
        self.phase = _Phase.ENDED
        self._answered.set()
        self._ending.set()
        self._upstream.abort()
        self.release()
        self.finish()

    def _check_lost(self) -> None:
        if self.transport is None and self._upstream.transport is None:
            self._lost.set()

    def _account(self, end: End) -> None:
        """Hand the exchange to the accounts, once."""
        if self._accounted:
            return
        self._accounted = True
        self._shared.capacity.taken -= 1
        exchange = Exchange(
            route=self._info.route,
            method=self._request.method,
            status_code=self._status_code,
            observed=False,
            end=end,
            facts=RequestFacts(),
            observation=None,
            request_headers=self._request.headers,
            response_headers=self._upstream.answer.headers,
            duration_s=perf_counter() - self._began,
            first_byte_s=self._first_byte_s,
            first_token_s=None,
            overhead_s=self._overhead_s,
            upstream_fault=self._fault,
        )
        try:
            self._shared.accounts.submit(exchange)
        except Exception as exc:
            self._shared.accounts.contain("account", exc)
