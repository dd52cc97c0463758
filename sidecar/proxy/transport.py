"""The way to the upstream: one request out, one response in, faults under our own names.

This is the only module that knows httpx's transport and its exceptions. The transport is
called directly: no cookie jar, no redirects, no headers of its own, no proxies from the
environment. What it must not know is what a request means.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx

from sidecar.errors import UpstreamError
from sidecar.exchange import RawHeaders, UpstreamFault

__all__ = ["Timeouts", "Upstream", "UpstreamResponse"]

_IDLE_EXPIRY_S = 1.5
"""How long an idle connection is kept. LiteLLM closes its side after 5 s (uvicorn's default),
or 2 s with `--run_gunicorn`; a request must not meet that."""

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})  # RFC 9110 9.2.2

_FAULTS: tuple[tuple[type[httpx.TransportError], UpstreamFault], ...] = (
    (httpx.ConnectTimeout, UpstreamFault.CONNECT_TIMEOUT),
    (httpx.ConnectError, UpstreamFault.CONNECT_FAILED),
    (httpx.ReadTimeout, UpstreamFault.FIRST_BYTE_TIMEOUT),
    (httpx.WriteError, UpstreamFault.CONNECTION_LOST),
    (httpx.ReadError, UpstreamFault.CONNECTION_LOST),
    (httpx.LocalProtocolError, UpstreamFault.MALFORMED_REQUEST),
    (httpx.ProtocolError, UpstreamFault.MALFORMED_RESPONSE),
)
_DISCONNECTED = "Server disconnected without sending a response."


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Time-outs of one exchange, in seconds; None for none."""

    connect_s: float | None
    first_byte_s: float | None
    """From the end of the request to the response's head."""
    idle_s: float | None
    """Between two pieces of the response's body."""


class UpstreamResponse:
    """A response whose head has come and whose body is yet to be read."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status_code = response.status_code
        self.headers: RawHeaders = [(name.lower(), value) for name, value in response.headers.raw]

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they come, transfer coding aside.

        Raises:
            UpstreamError: the body ended before its end.
        """
        stream = self._response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        try:
            async for chunk in stream:
                yield chunk
        except httpx.ReadTimeout as exc:
            raise UpstreamError(UpstreamFault.IDLE_TIMEOUT, str(exc)) from None
        except httpx.TransportError as exc:
            raise UpstreamError(UpstreamFault.BODY_CUT, str(exc)) from None

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""
        await self._response.aclose()


class Upstream:
    """The one upstream.

    Args:
        url: scheme, host and port.
        timeouts: applied to each exchange.
        transport: takes requests; the default is httpx's own.
    """

    def __init__(
        self,
        url: str,
        timeouts: Timeouts,
        *,
        ca_file: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = httpx.URL(url)
        self._timeouts = timeouts
        tls = url.startswith("https")
        self._tls = ssl.create_default_context(cafile=ca_file) if tls else None
        self._transport = transport or httpx.AsyncHTTPTransport(
            verify=self._tls or False,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=_IDLE_EXPIRY_S),
        )
        self.authority = self._url.netloc
        """`host:port`, for requests that come without a Host."""

    async def open(
        self,
        method: str,
        target: bytes,
        headers: RawHeaders,
        body: httpx.AsyncByteStream | None,
    ) -> UpstreamResponse:
        """Send a request and wait for the response's head.

        A request without a body and with an idempotent method is sent a second time if its
        connection turned out to be dead. Any other may have been acted on, and paid for.

        Args:
            target: the request target as it stood in the request line.
            body: None for a request without one.

        Raises:
            UpstreamError: no head came.
        """
        try:
            return await self._send(method, target, headers, body)
        except UpstreamError as error:
            dead = (UpstreamFault.STALE_CONNECTION, UpstreamFault.CONNECTION_LOST)
            if body is not None or method not in _IDEMPOTENT or error.fault not in dead:
                raise
        return await self._send(method, target, headers, body)

    async def _send(
        self,
        method: str,
        target: bytes,
        headers: RawHeaders,
        body: httpx.AsyncByteStream | None,
    ) -> UpstreamResponse:
        # httpcore looks a time-out up at each read, so that what holds for the head can
        # give way to what holds for the body.
        timeouts = {"connect": self._timeouts.connect_s, "read": self._timeouts.first_byte_s}
        request = httpx.Request(
            method,
            self._url,
            headers=list(headers),
            stream=body or httpx.ByteStream(b""),
            extensions={"target": target, "timeout": timeouts},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TransportError as exc:
            raise UpstreamError(_fault_of(exc), str(exc)) from None
        timeouts["read"] = self._timeouts.idle_s
        return UpstreamResponse(response)

    async def dial(
        self, factory: Callable[[], asyncio.Protocol]
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Open a connection that is the caller's own.

        Raises:
            UpstreamError: there is none to be had.
        """
        port = self._url.port or (443 if self._tls else 80)
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                return await asyncio.get_running_loop().create_connection(
                    factory, self._url.host, port, ssl=self._tls
                )
        except TimeoutError:
            raise UpstreamError(UpstreamFault.CONNECT_TIMEOUT) from None
        except OSError as exc:
            raise UpstreamError(UpstreamFault.CONNECT_FAILED, str(exc)) from None

    async def probe(self, timeout_s: float) -> int:
        """Ask for LiteLLM's liveness endpoint and return the status code.

        Raises:
            UpstreamError: no head came.
        """
        headers = [(b"host", self.authority), (b"connection", b"close")]
        timeouts = {"connect": timeout_s, "read": timeout_s, "write": timeout_s}
        request = httpx.Request(
            "GET",
            self._url,
            headers=headers,
            stream=httpx.ByteStream(b""),
            extensions={"target": b"/health/liveliness", "timeout": timeouts},
        )
        try:
            response = await self._transport.handle_async_request(request)
            await response.aclose()
        except httpx.TransportError as exc:
            raise UpstreamError(_fault_of(exc), str(exc)) from None
        return response.status_code

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()


def _fault_of(exc: httpx.TransportError) -> UpstreamFault:
    if isinstance(exc, httpx.RemoteProtocolError) and str(exc) == _DISCONNECTED:
        return UpstreamFault.STALE_CONNECTION
    for kind, fault in _FAULTS:
        if isinstance(exc, kind):
            return fault
    return UpstreamFault.CONNECTION_LOST
