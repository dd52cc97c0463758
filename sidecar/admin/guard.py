"""Who may see what on the admin port.

It stands in front of all that is served there: what is added later is guarded without its
doing. What is open is named below; everything else, a path that does not exist included,
wants the token, or to be asked for on this machine, or the operator's word that it is open.
The files of the page are open: they are the same everywhere, and hold no data.

What a browser may be talked into by another site is kept out, too: no header of ours lets
another origin read an answer, and where being on this machine is all that is asked for, a
request with a host's name in it is refused, since that name may be the other site's, pointed
here (DNS rebinding). A token cannot be had that way.
"""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Access", "Guard", "is_loopback"]

_PROBES = frozenset({"/healthz", "/readyz"})
_METRICS = "/metrics"
_FILES = "/static/"
_METHODS = ("GET", "HEAD")
_ON_ALL = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
_BEARER = 'Bearer realm="sidecar"'
_CHALLENGE = f'Basic realm="sidecar", charset="UTF-8", {_BEARER}'

SignIn = Callable[[Request], Awaitable[Response]]
"""Makes the answer with which a browser is asked for the token."""


@dataclass(frozen=True, slots=True)
class Access:
    """What the operator has decided. The default lets nobody in."""

    token_hash: bytes | None = None
    """sha256 of the token; None for none."""
    open: bool = False
    """Whether all is open to whoever gets here."""
    local: bool = False
    """Whether the port is reached from this machine alone."""
    metrics_guarded: bool = False
    """Whether the metrics want the token as well."""


class Guard:
    """Lets through what is allowed."""

    def __init__(self, app: ASGIApp, access: Access, sign_in: SignIn | None = None) -> None:
        self._app = app
        self._access = access
        self._sign_in = sign_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request."""
        method = scope["method"]

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_ON_ALL)
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        app: ASGIApp = self._app
        if method not in _METHODS:
            app = PlainTextResponse("Only GET and HEAD.\n", 405, {"allow": ", ".join(_METHODS)})
        elif not self._is_open(scope["path"]):
            app = await self._refusal(Request(scope)) or app
        await app(scope, receive, send_on)

    def _is_open(self, path: str) -> bool:
        if path == _METRICS:
            return not self._access.metrics_guarded
        return path in _PROBES or path.startswith(_FILES)

    async def _refusal(self, request: Request) -> Response | None:
        """Say why not; None if nothing is against it."""
        access, headers = self._access, request.headers
        if access.token_hash is not None:
            if hmac.compare_digest(_presented(headers), access.token_hash):
                return None
            if self._sign_in is not None and _is_person(request):
                answer = await self._sign_in(request)
                # With `Basic` among them a browser would ask in its own way, for a name, too.
                answer.headers["www-authenticate"] = _BEARER
                return answer
            # The page asks for the token itself; with `Basic` offered the browser would, too.
            own = "application/json" in headers.get("accept", "")
            return PlainTextResponse(
                "The token is wanted.\n", 401, {"www-authenticate": _BEARER if own else _CHALLENGE}
            )
        if access.open:
            return None
        if not access.local:
            return PlainTextResponse(
                "Not open to other machines. Set SIDECAR_ADMIN_TOKEN, or SIDECAR_ADMIN_OPEN=true "
                "for all who get here.\n",
                403,
            )
        if not _names_this_machine(headers.get("host", "localhost")):
            return PlainTextResponse("Ask for localhost, or for an address.\n", 421)
        return None


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this host is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _presented(headers: Headers) -> bytes:
    """Return the sha256 of the token that comes with a request.

    A browser asks its user for one where `Basic` is offered; the name is of no matter then.
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    token = credentials.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            token = b64decode(token, validate=True).partition(b":")[2]
        except binascii.Error:
            token = b""
    elif scheme.lower() != "bearer":
        token = b""
    return sha256(token).digest()


def _is_person(request: Request) -> bool:
    """Whether somebody wants to look at the page."""
    return request.scope["path"] == "/" and "text/html" in request.headers.get("accept", "")


def _names_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.lower()
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761 section 6.3
        return True
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
