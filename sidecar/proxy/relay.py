"""The HTTP path: one request in, the upstream's answer out, byte for byte.

Read `_Exchange.run` from the top: it names what happens to an exchange in order. What this
module knows is ASGI and the order of things; header rules are in `headers`, the way to the
upstream in `transport`. It must not know what a usage is: it shows each chunk to a tap after
the chunk was sent on, and hands the accounts one record at the end. Neither can fail, delay
or alter a response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from time import perf_counter

import httpx
from starlette.types import Message, Receive, Scope, Send

from sidecar.errors import UpstreamError
from sidecar.exchange import (
    Accounts,
    End,
    Exchange,
    Observation,
    Observer,
    RequestFacts,
    RequestReader,
    Status,
    Tap,
    UpstreamFault,
    header,
)
from sidecar.proxy.headers import ForwardedRule, request_headers, response_headers
from sidecar.proxy.refusal import Refusal, refusal_of
from sidecar.proxy.routes import classify
from sidecar.proxy.transport import Upstream, UpstreamResponse

__all__ = ["Relay"]

_STEP_BYTES = 64 * 1024
"""Largest piece of a request that is read in one go, for the loop's sake."""


class _ClientLeftError(Exception):
    """The client closed its connection while its request was being read."""


class _TooLargeError(Exception):
    """The request's body is larger than the bound."""


class Relay:
    """The application on the data port.

    Args:
        upstream: where requests go.
        observer: makes the readers of requests and responses.
        accounts: takes each exchange at its end.
        forwarded: who may say for whom a request is.
        max_request_body_bytes: longer bodies get 413; None for no bound.
    """

    def __init__(
        self,
        upstream: Upstream,
        observer: Observer,
        accounts: Accounts,
        forwarded: ForwardedRule,
        *,
        max_request_body_bytes: int | None = None,
    ) -> None:
        self.upstream = upstream
        self.observer = observer
        self.accounts = accounts
        self.forwarded = forwarded
        self.max_request_body_bytes = max_request_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, relay: Relay, scope: Scope, receive: Receive, send: Send) -> None:
        self._relay = relay
        self._scope = scope
        self._receive = receive
        self._send = send
        # uvicorn goes on adding to its own list: request trailers.
        self._headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self._method: str = scope["method"]
        self._info = classify(self._method, scope["path"])
        self._reader: RequestReader | None = None
        self._tap: Tap | None = None
        self._response: UpstreamResponse | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._began = perf_counter()
        self._overhead_s = 0.0
        self._first_byte_s: float | None = None
        self._first_token_s: float | None = None
        self._status_code = 499
        self._upstream_fault: UpstreamFault | None = None
        self._head_sent = False
        self._client_left = False
        self._ended = False
        self._accounted = False

    async def run(self) -> None:
        """Relay the exchange, and account for it however it ends."""
        end = End.UPSTREAM_CUT
        self._relay.accounts.begin(self._info.route)
        try:
            refusal = self._refusal()
            if refusal is None:
                await self._open()
                await self._send_head()
                await self._send_body()
            else:
                await self._refuse(refusal)
        except _ClientLeftError:
            end = End.CLIENT_LEFT
        except _TooLargeError:
            await self._refuse(_too_large())
        except UpstreamError as error:
            await self._upstream_failed(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._client_left or (task is not None and task.uncancel() > 0):
                raise  # the server is shutting down
            end = End.CLIENT_LEFT
        except Exception as exc:
            # The edge: whatever goes wrong in here is ours, and costs this exchange alone.
            self._relay.accounts.contain("proxy", exc)
            await self._refuse(Refusal(502, "internal_error", "The sidecar failed."))
        finally:
            self._ended = True
            self._account(end)
            if self._watcher is not None:
                self._watcher.cancel()
            if self._response is not None:
                await self._response.aclose()

    # The request

    def _refusal(self) -> Refusal | None:
        """Check what can be checked before the request is passed on."""
        hosts = sum(name == b"host" for name, _ in self._headers)
        if hosts > 1 or (hosts == 0 and self._scope["http_version"] == "1.1"):
            # RFC 9112 section 3.2.
            return Refusal(400, "bad_host", "The request needs exactly one Host header.")
        bound = self._relay.max_request_body_bytes
        length = header(self._headers, b"content-length")
        has_body = length is not None or header(self._headers, b"transfer-encoding") is not None
        if has_body and header(self._headers, b"upgrade") is not None:
            # uvicorn drops the body of such a request, and would take what comes of it later
            # for a request of its own (Kludex/uvicorn#2722): the connection has to end here.
            return Refusal(400, "upgrade_with_body", "An upgrade cannot be asked for with a body.")
        if bound is not None and length is not None and int(length) > bound:
            return _too_large()
        return None

    async def _open(self) -> None:
        relay = self._relay
        scope = self._scope
        peer = scope["client"][0] if scope.get("client") else ""
        headers = request_headers(self._headers, relay.forwarded, peer, scope["scheme"])
        if header(headers, b"host") is None:
            headers.insert(0, (b"host", relay.upstream.authority))
        target: bytes = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        if self._info.dialect is not None:
            try:
                self._reader = relay.observer.read_request(
                    self._info.route, self._info.dialect, self._headers
                )
            except Exception as exc:
                relay.accounts.contain("observe", exc)
        body = None
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in headers):
            body = _Body(self._request_body)
        else:
            self._watch()
        self._overhead_s += perf_counter() - self._began
        self._response = await relay.upstream.open(self._method, target, headers, body)
        self._first_byte_s = perf_counter() - self._began
        self._watch()

    async def _request_body(self) -> AsyncIterator[bytes]:
        """Yield the request's body as the client sends it, and read it behind that."""
        bound = self._relay.max_request_body_bytes
        size = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeftError
            chunk: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if bound is not None and size > bound:
                raise _TooLargeError
            if chunk:
                yield chunk
                await self._read_request(chunk)
        if self._reader is not None:
            try:
                for _ in self._reader.finish():
                    await asyncio.sleep(0)
            except Exception as exc:
                self._reader_failed(exc)
        self._watch()

    async def _read_request(self, chunk: bytes) -> None:
        if self._reader is None:
            return
        try:
            self._reader.feed(chunk[:_STEP_BYTES])
            for start in range(_STEP_BYTES, len(chunk), _STEP_BYTES):
                await asyncio.sleep(0)
                self._reader.feed(chunk[start : start + _STEP_BYTES])
        except Exception as exc:
            self._reader_failed(exc)

    def _reader_failed(self, exc: Exception) -> None:
        self._reader = None
        self._relay.accounts.contain("observe", exc)

    def _watch(self) -> None:
        """Watch for the client's leaving, once nothing else receives."""
        if self._watcher is None:
            task = asyncio.current_task()
            assert task is not None
            self._watcher = asyncio.create_task(self._await_disconnect(task.cancel))

    async def _await_disconnect(self, cancel: Callable[[], bool]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._ended:
            self._client_left = True
            cancel()

    # The response

    async def _send_head(self) -> None:
        response = self._response
        assert response is not None
        began = perf_counter()
        self._status_code = response.status_code
        if not 200 <= response.status_code <= 599:
            # An interim response cannot be the final one, and 101 was not asked for.
            raise UpstreamError(UpstreamFault.MALFORMED_RESPONSE, "status out of range")
        headers = response_headers(response.headers)
        if self._info.dialect is not None:
            try:
                self._tap = self._relay.observer.tap(
                    self._info.dialect, response.status_code, response.headers
                )
            except Exception as exc:
                self._relay.accounts.contain("observe", exc)
        if response.status_code == 304:
            # uvicorn takes the content-length of a 304 for a promise of a body, unless it
            # believes that the method was HEAD (RFC 9110 section 8.6 allows the length).
            self._scope["method"] = "HEAD"
        self._overhead_s += perf_counter() - began
        await self._send(
            {"type": "http.response.start", "status": response.status_code, "headers": headers}
        )
        self._head_sent = True

    async def _send_body(self) -> None:
        response = self._response
        assert response is not None
        remaining = self._content_length(response)
        async for chunk in response.chunks():
            if remaining is not None:
                remaining -= len(chunk)
            if remaining == 0:
                # With its last byte the client has the whole response: what it may ask for
                # next must already be counted.
                self._observe(chunk)
                await self._end(chunk)
            else:
                await self._send(_body(chunk, more=True))
                self._observe(chunk)
        if not self._ended:
            await self._end(b"")

    def _content_length(self, response: UpstreamResponse) -> int | None:
        """Return the length of the body that is to come, if the head says it."""
        if self._method == "HEAD" or response.status_code in (204, 304):
            return None
        if header(response.headers, b"transfer-encoding") is not None:
            return None
        length = header(response.headers, b"content-length")
        return int(length) if length is not None and length.isdigit() else None

    def _observe(self, chunk: bytes) -> None:
        tap = self._tap
        if tap is None:
            return
        try:
            tap.feed(chunk)
            if self._first_token_s is None and tap.first_token_seen:
                self._first_token_s = perf_counter() - self._began
        except Exception as exc:
            self._tap = None
            self._relay.accounts.contain("observe", exc)

    async def _end(self, chunk: bytes) -> None:
        began = perf_counter()
        self._account(End.COMPLETE, since=began)
        self._ended = True
        await self._send(_body(chunk, more=False))

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
        self._head_sent = True
        self._status_code = refusal.status_code
        self._tap = None
        body = refusal.body(anthropic=self._info.anthropic_errors)
        headers = refusal.headers(body)
        if refusal.reason == "upgrade_with_body" or header(self._headers, b"expect") is not None:
            # Whether what comes next is a body or a request, nobody could tell.
            headers.append((b"connection", b"close"))
        self._ended = True
        self._account(End.COMPLETE)
        await self._send(
            {"type": "http.response.start", "status": refusal.status_code, "headers": headers}
        )
        await self._send(_body(body, more=False))

    def _account(self, end: End, *, since: float | None = None) -> None:
        """Hand the exchange to the accounts, once."""
        if self._accounted:
            return
        self._accounted = True
        observed = self._info.dialect is not None
        observation = self._observation(end) if observed else None
        facts = RequestFacts()
        if self._reader is not None:
            try:
                facts = self._reader.facts()
            except Exception as exc:
                self._reader_failed(exc)
        now = perf_counter()
        if since is not None:
            self._overhead_s += now - since
        exchange = Exchange(
            route=self._info.route,
            method=self._method,
            status_code=self._status_code,
            observed=observed,
            end=end,
            facts=facts,
            observation=observation,
            request_headers=self._headers,
            response_headers=self._response.headers if self._response is not None else (),
            duration_s=now - self._began,
            first_byte_s=self._first_byte_s,
            first_token_s=self._first_token_s,
            overhead_s=self._overhead_s,
            upstream_fault=self._upstream_fault,
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


class _Body(httpx.AsyncByteStream):
    """A request body for httpx."""

    def __init__(self, chunks: Callable[[], AsyncIterator[bytes]]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks()


def _body(chunk: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


def _too_large() -> Refusal:
    return Refusal(413, "request_too_large", "The request is larger than the sidecar's limit.")
