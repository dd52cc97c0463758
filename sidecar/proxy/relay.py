"""The HTTP path: one request in, the upstream's answer out, byte for byte.

Read `_Exchange.run` from the top: it names what happens to an exchange in order. What this
module knows is the order of things; header rules are in `headers`, the client's end of the
wire is in `edge`, the way to the upstream in `transport`. It must not know what a usage is: it
shows each piece to a tap after the piece was sent on, and hands the accounts one record at the
end. Neither can fail, delay or alter a response. The one thing that alters responses is a
transformer, which there is only where the operator switched it on; even then the tap is shown
what the upstream sent.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from time import perf_counter, thread_time

from starlette.types import Message, Receive, Scope, Send

from sidecar.errors import UpstreamError
from sidecar.exchange import (
    Accounts,
    Dialect,
    End,
    Exchange,
    Observation,
    Observer,
    RefusalReason,
    RequestFacts,
    RequestReader,
    Rewrite,
    Rewriting,
    Status,
    Tap,
    Transformer,
    UpstreamFault,
    header,
)
from sidecar.proxy.capacity import Capacity
from sidecar.proxy.edge import Downstream, downstream_of
from sidecar.proxy.headers import (
    ForwardedRule,
    asking_identity,
    request_headers,
    response_headers,
    without_validators,
)
from sidecar.proxy.refusal import REFUSALS, Refusal, refusal_of
from sidecar.proxy.routes import classify
from sidecar.proxy.transport import Transport, UpstreamResponse

__all__ = ["Relay"]

_Pairs = list[tuple[bytes, bytes]]

_NO_FACTS = RequestFacts()
_STEP_BYTES = 64 * 1024
"""Largest piece of a request that is read in one go, for the loop's sake."""
_CATCH_UP_S = 0.005
"""So long, of the processor's time, steps are begun to read a request whose answer has come before
it was read. By the clock, a process that has to wait for its turn would not know what it counts."""
_READ_AFTER_S = 0.01
"""Requests wait so long to be read together: models take longer, and with other work in between
each would find the processor's caches without the reader's code, which doubles its cost."""
_READ_S = 0.001
"""So long the loop is held to read them."""


class _ClientLeftError(Exception):
    """The client closed its connection while its request was being read."""


class _RefusedError(Exception):
    """The request is not passed on, or no further."""

    def __init__(self, reason: RefusalReason) -> None:
        super().__init__(reason)
        self.reason = reason


class _Readings:
    """Reads requests some at a time, while the upstream works on them."""

    def __init__(self) -> None:
        self._waiting: deque[_Exchange] = deque()
        self._awaited = False

    def add(self, exchange: _Exchange) -> None:
        """Have a request read soon, or later by whoever has to know what it asks for."""
        self._waiting.append(exchange)
        if not self._awaited:
            self._awaited = True
            asyncio.get_running_loop().call_later(_READ_AFTER_S, self._read)

    def _read(self) -> None:
        self._awaited = False
        until = perf_counter() + _READ_S
        waiting = self._waiting
        while waiting:
            exchange = waiting.popleft()
            if not exchange.read_until(until):
                waiting.appendleft(exchange)
            if waiting and perf_counter() > until:
                self._awaited = True
                asyncio.get_running_loop().call_soon(self._read)
                return


class Relay:
    """The application on the data port.

    Args:
        upstream: where requests go.
        observer: makes the readers of requests and responses.
        accounts: takes each exchange at its end.
        forwarded: who may say for whom a request is.
        rewriting: makes the transformers of responses; None to change nothing.
        max_request_body_bytes: longer bodies get 413; None for no bound.
        capacity: what is under way; requests past its limit get 503.
    """

    def __init__(
        self,
        upstream: Transport,
        observer: Observer,
        accounts: Accounts,
        forwarded: ForwardedRule,
        *,
        rewriting: Rewriting | None = None,
        max_request_body_bytes: int | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        self.upstream = upstream
        self.observer = observer
        self.accounts = accounts
        self.forwarded = forwarded
        self.rewriting = rewriting
        self.max_request_body_bytes = max_request_body_bytes
        self.capacity = capacity or Capacity()
        self.readings = _Readings()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.capacity.taken += 1
            try:
                await _Exchange(self, scope, receive, send).run()
            finally:
                self.capacity.taken -= 1


class _Exchange:
    """One request and its answer."""

    # On the class, so that they cost nothing where there is none.
    _reading: Iterator[None] | None = None
    _transformer: Transformer | None = None
    _rewrite: Rewrite | None = None

    def __init__(self, relay: Relay, scope: Scope, receive: Receive, send: Send) -> None:
        self._began = perf_counter()
        self._relay = relay
        self._scope = scope
        self._receive = receive
        self._send = send
        self._client = downstream_of(scope)
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._method: str = scope["method"]
        self._info = classify(self._method, scope["path"])
        self._reader: RequestReader | None = None
        self._tap: Tap | None = None
        self._response: UpstreamResponse | None = None
        self._task: asyncio.Task[None] | None = None
        self._overhead_s = 0.0
        self._first_byte_s: float | None = None
        self._first_token_s: float | None = None
        self._status_code = 499
        self._upstream_fault: UpstreamFault | None = None
        self._head_sent = False
        self._client_left = False
        self._accounted = False

    async def run(self) -> None:
        """Relay the exchange, and account for it however it ends."""
        end = End.UPSTREAM_CUT
        try:
            self._relay.accounts.begin(self._info.route)
        except Exception as exc:
            self._relay.accounts.contain("account", exc)
        self._task = asyncio.current_task()
        self._client.on_left = self._leave
        try:
            if self._relay.capacity.exceeded:
                raise _RefusedError(RefusalReason.TOO_MANY_REQUESTS)
            self._check_length()
            await self._open()
            if self._relay.rewriting is None:
                await self._send_head()
                await self._send_body()
            else:
                await self._send_rewritten(self._relay.rewriting)
        except _ClientLeftError:
            end = End.CLIENT_LEFT
        except _RefusedError as error:
            self._relay.accounts.refuse(error.reason)
            await self._refuse(REFUSALS[error.reason])
        except UpstreamError as error:
            await self._upstream_failed(error)
        except asyncio.CancelledError:
            if not self._client_left or self._task is None or self._task.uncancel() > 0:
                self._turn_away()
                raise  # the server is shutting down
            end = End.CLIENT_LEFT
        except Exception as exc:
            # The edge: whatever goes wrong in here is ours, and costs this exchange alone.
            self._relay.accounts.contain("proxy", exc)
            await self._refuse(Refusal(502, "internal_error", "The sidecar failed."))
        finally:
            self._task = None
            self._account(end)
            if self._response is not None:
                self._response.close()

    def _leave(self) -> None:
        """Take note that the client has left: nobody waits for the rest."""
        self._client_left = True
        if self._task is not None:
            self._task.cancel()

    # The request

    @property
    def max_body_bytes(self) -> int | None:
        """Longest body that is passed on; None for no bound."""
        return self._relay.max_request_body_bytes

    def _check_length(self) -> None:
        """Refuse a request that says that it is longer than the bound."""
        bound = self.max_body_bytes
        length = None if bound is None else header(self._headers, b"content-length")
        if bound is not None and length is not None and int(length) > bound:
            raise _RefusedError(RefusalReason.REQUEST_TOO_LARGE)

    async def _open(self) -> None:
        relay = self._relay
        scope = self._scope
        peer = scope["client"][0] if scope["client"] else ""
        headers = request_headers(self._headers, relay.forwarded, peer, scope["scheme"])
        names = [name for name, _ in headers]
        if b"host" not in names:
            headers.insert(0, (b"host", relay.upstream.authority))
        if self._info.dialect is not None:
            try:
                self._reader = relay.observer.read_request(
                    self._info.route, self._info.dialect, self._headers
                )
            except Exception as exc:
                relay.accounts.contain("observe", exc)
            if relay.rewriting is not None:
                headers = self._asking(relay.rewriting, self._info.dialect, headers)
        has_body = b"content-length" in names or b"transfer-encoding" in names
        body = _RequestBody(self, self._client, self._receive) if has_body else None
        self._overhead_s += perf_counter() - self._began
        self._response = await relay.upstream.open(self._method, self._client.target, headers, body)
        self._first_byte_s = perf_counter() - self._began

    def read_first(self, piece: bytes, last: bool) -> None:
        """Have the beginning of a body read, or all of a short one."""
        if self._reader is not None:
            self._reading = _steps(self._reader, piece, last)
            self._relay.readings.add(self)

    async def read_next(self, piece: bytes, *, last: bool) -> None:
        """Read a further piece, in steps between which the loop runs; the last is read soon."""
        if self._reader is None:
            return
        before = () if self._reading is None else self._reading
        self._reading = itertools.chain(before, _steps(self._reader, piece, last))
        if last:
            self._relay.readings.add(self)
            return
        try:
            for _ in self._reading:
                await asyncio.sleep(0)
        except Exception as exc:
            self._reader_failed(exc)
        self._reading = None

    def read_until(self, until: float, clock: Callable[[], float] = perf_counter) -> bool:
        """Read for so long; returns whether all that has come is read."""
        try:
            for _ in self._reading or ():
                if clock() > until:
                    return False
        except Exception as exc:
            self._reader_failed(exc)
        self._reading = None
        return True

    def _facts(self) -> RequestFacts:
        """Say what was asked for, as far as it is known."""
        if self._reading is not None:
            # The answer was quick: what has come of the request is read now.
            self.read_until(thread_time() + _CATCH_UP_S, thread_time)
        facts = _NO_FACTS if self._reader is None else self._reader.facts()
        model = self._info.model
        return facts if model is None else facts._replace(model=model)

    def _reader_failed(self, exc: Exception) -> None:
        self._reader = self._reading = None
        self._relay.accounts.contain("observe", exc)

    # The response

    async def _send_head(self, change: Callable[[_Pairs], _Pairs] | None = None) -> None:
        """Send the response's head on.

        Args:
            change: makes other headers of those that would be sent.
        """
        response = self._response
        assert response is not None
        began = perf_counter()
        self._status_code = response.status_code
        headers = response_headers(response.headers)
        if change is not None:
            headers = change(headers)
        if self._info.dialect is not None:
            try:
                self._tap = self._relay.observer.tap(
                    self._info.dialect, response.status_code, response.headers
                )
            except Exception as exc:
                self._relay.accounts.contain("observe", exc)
        self._overhead_s += perf_counter() - began
        client = self._client
        if client.behind:
            await client.drain()
        client.begin(response.status_code, headers)
        self._head_sent = True

    async def _send_body(self) -> None:
        """Send each piece of the body on as it comes."""
        response = self._response
        assert response is not None
        piece = response.take()
        if response.ended:
            self._close_accounts(piece)
            self._client.write(piece, True)
            return
        client = self._client
        client.on_paused, client.on_resumed = response.pause, response.resume
        # An empty piece sends the head on alone.
        client.write(piece, False)
        self._observe(piece)
        await response.pump(self._pass_on)

    def _pass_on(self, piece: bytes, last: bool) -> None:
        """Send a piece of the body on. What is read of it is read behind that."""
        if last:
            self._close_accounts(piece)
            self._client.write(piece, True)
        else:
            self._client.write(piece, False)
            self._observe(piece)

    def _observe(self, piece: bytes) -> None:
        tap = self._tap
        if tap is None or not piece:
            return
        try:
            tap.feed(piece)
            if self._first_token_s is None and tap.first_token_seen:
                self._first_token_s = perf_counter() - self._began
        except Exception as exc:
            self._tap = None
            self._relay.accounts.contain("observe", exc)

    def _close_accounts(self, piece: bytes) -> None:
        """Read the last piece and account for the exchange, before the piece is sent.

        With it the client has the whole response: what it may ask for next must already be
        counted.
        """
        began = perf_counter()
        self._observe(piece)
        self._account(End.COMPLETE, since=began)

    # The response, where it may be changed

    def _asking(self, rewriting: Rewriting, dialect: Dialect, headers: _Pairs) -> _Pairs:
        """Ask the upstream for content that can be changed."""
        try:
            return asking_identity(headers) if rewriting.wanted(dialect, self._headers) else headers
        except Exception as exc:
            self._relay.accounts.contain("observe", exc)
            return headers

    def _make_transformer(self, rewriting: Rewriting) -> Transformer | None:
        """Make what changes the response's body; None where it passes as it is."""
        response = self._response
        assert response is not None
        if self._info.dialect is None:
            return None
        try:
            facts = self._facts()
            made = rewriting.transformer(
                self._info.dialect, self._headers, facts, response.status_code, response.headers
            )
        except Exception as exc:
            self._relay.accounts.contain("observe", exc)
            return None
        if isinstance(made, Rewrite):
            self._rewrite = made
            return None
        return made

    async def _send_rewritten(self, rewriting: Rewriting) -> None:
        """Send the response on, changed if it is one that is to be."""
        transformer = self._make_transformer(rewriting)
        if transformer is None:
            await self._send_head()
            await self._send_body()
            return
        response = self._response
        assert response is not None
        self._transformer = transformer
        if transformer.streamed or header(response.headers, b"content-length") is None:
            await self._stream_transformed(transformer, response)
        else:
            await self._hold_transformed(transformer, response)

    async def _stream_transformed(
        self, transformer: Transformer, response: UpstreamResponse
    ) -> None:
        """Send each chunk on as the transformer gives it; how long it will be is not known."""
        await self._send_head(lambda headers: without_validators(headers, None))
        await self._send(_body(b"", more=True))
        try:
            async for chunk in response.chunks():
                out = self._transformed(transformer, chunk)
                if out:
                    await self._send(_body(out, more=True))
                self._observe(chunk)
        except UpstreamError:
            if self._transformer is not None and transformer.held:
                await self._send(_body(transformer.held, more=True))
            raise
        out = self._transformed(transformer, None)
        self._close_accounts(b"")
        await self._send(_body(out, more=False))

    async def _hold_transformed(self, transformer: Transformer, response: UpstreamResponse) -> None:
        """Send head and body when all of it is there, for only then its length is known."""
        chunks: list[bytes] = []
        try:
            async for chunk in response.chunks():
                chunks.append(chunk)  # noqa: PERF401 - what came before a fault is not lost
        except UpstreamError:
            # As it came: the length in its head tells the client that bytes are missing.
            await self._send_head()
            for chunk in chunks or [b""]:
                await self._send(_body(chunk, more=True))
                self._observe(chunk)
            raise
        pieces = [self._transformed(transformer, chunk) for chunk in chunks]
        body = b"".join([*pieces, self._transformed(transformer, None)])
        if len(body) == sum(map(len, chunks)):
            await self._send_head()
        else:
            await self._send_head(lambda headers: without_validators(headers, len(body)))
        for chunk in chunks:
            self._observe(chunk)
        self._close_accounts(b"")
        await self._send(_body(body, more=False))

    def _transformed(self, transformer: Transformer, chunk: bytes | None) -> bytes:
        """Feed the transformer, or finish it; after it has failed once, change nothing more."""
        if self._transformer is None:
            return chunk or b""
        began = perf_counter()
        try:
            out = transformer.finish() if chunk is None else transformer.feed(chunk)
        except Exception as exc:
            self._transformer = None
            self._relay.accounts.contain("observe", exc)
            out = transformer.held
        self._overhead_s += perf_counter() - began
        return out

    def _account_rewrite(self) -> None:
        try:
            result = self._rewrite if self._transformer is None else self._transformer.result
            if result is not None:
                self._relay.accounts.record_rewrite(result)
        except Exception as exc:
            self._relay.accounts.contain("account", exc)

    # The end

    async def _upstream_failed(self, error: UpstreamError) -> None:
        self._upstream_fault = error.fault
        await self._refuse(refusal_of(error.fault))

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer in our own name; if a head is out already, cut the connection instead.

        uvicorn cuts it when the application returns before its response is complete.
        """
        if self._head_sent:
            return
        if self._client.behind:
            await self._client.drain()
        self._answer(refusal)

    def _turn_away(self) -> None:
        """Say why there is no answer, if there is none yet; waiting is over."""
        if not (self._head_sent or self._client_left or self._client.behind):
            self._relay.accounts.refuse(RefusalReason.DRAINING)
            self._answer(REFUSALS[RefusalReason.DRAINING])

    def _answer(self, refusal: Refusal) -> None:
        self._head_sent = True
        self._status_code = refusal.status_code
        self._tap = None
        body = refusal.body(self._info.errors)
        headers = refusal.headers(body)
        self._account(End.COMPLETE)
        self._client.begin(refusal.status_code, headers)
        self._client.write(b"" if self._method == "HEAD" else body, True)

    def _account(self, end: End, *, since: float | None = None) -> None:
        """Hand the exchange to the accounts, once."""
        if self._accounted:
            return
        self._accounted = True
        observed = self._info.dialect is not None
        observation = self._observation(end) if observed else None
        if self._relay.rewriting is not None:
            self._account_rewrite()
        facts = _NO_FACTS
        if observed:
            try:
                facts = self._facts()
            except Exception as exc:
                self._reader_failed(exc)
            # What is not read by now is read for nobody.
            self._reader = self._reading = None
        now = perf_counter()
        if since is not None:
            self._overhead_s += now - since
        # By position: fourteen names to match take as long as all the rest of it.
        exchange = Exchange(
            self._info.route,
            self._method,
            self._status_code,
            observed,
            end,
            facts,
            observation,
            self._headers,
            self._response.headers if self._response is not None else (),
            now - self._began,
            self._first_byte_s,
            self._first_token_s,
            self._overhead_s,
            self._upstream_fault,
        )
        try:
            self._relay.accounts.submit(exchange)
        except Exception as exc:
            self._relay.accounts.contain("account", exc)

    def _observation(self, end: End) -> Observation:
        if self._tap is None:
            if self._status_code == 499:
                return Observation(Status.PARTIAL, fault="the client left before the head")
            if not 200 <= self._status_code < 300:
                return Observation(Status.ERROR, fault=f"status {self._status_code}")
            return Observation(Status.INVALID, fault="the observer failed")
        try:
            return self._tap.finish(end)
        except Exception as exc:
            self._relay.accounts.contain("observe", exc)
            return Observation(Status.INVALID, fault="the observer failed")


class _RequestBody:
    """The request's body, on its way to the upstream and past the reader.

    Raises, from both methods:
        _RefusedError: it is longer than the bound.
    """

    def __init__(self, exchange: _Exchange, client: Downstream, receive: Receive) -> None:
        self._exchange = exchange
        self._client = client
        self._receive = receive
        self._left = exchange.max_body_bytes
        self._long_piece = b""
        self._more = True

    def take(self) -> tuple[bytes, bool]:
        """Return what is there, to go out with the head, and whether more is to come."""
        piece, self._more = self._client.take_body()
        if len(piece) > _STEP_BYTES:
            self._long_piece = piece
            return b"", True
        self._check(piece)
        self._exchange.read_first(piece, not self._more)
        return piece, self._more

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the rest as the client sends it.

        Raises:
            _ClientLeftError: it did not send all of it.
        """
        piece, more = self._long_piece, self._more
        while True:
            if piece:
                self._check(piece)
                yield piece
            await self._exchange.read_next(piece, last=not more)
            if not more:
                return
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeftError
            piece, more = message["body"], message["more_body"]

    def _check(self, piece: bytes) -> None:
        if self._left is not None:
            self._left -= len(piece)
            if self._left < 0:
                raise _RefusedError(RefusalReason.REQUEST_TOO_LARGE)


def _steps(reader: RequestReader, piece: bytes, last: bool) -> Iterator[None]:
    """Read a piece of a request's body in steps that do not hold the loop for long."""
    for start in range(0, len(piece), _STEP_BYTES):
        reader.feed(piece[start : start + _STEP_BYTES])
        if start + _STEP_BYTES < len(piece):
            yield
    if last:
        yield from reader.finish()


def _body(chunk: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}
