"""Who may see what on the admin port.

It stands in front of all that is served there: a page that is added later is guarded without
its doing. What is open is named below; everything else, a path that does not exist included,
wants the token, or to be asked for on this machine, or the operator's word that it is open.

What a browser may be talked into by another site is kept out, too: no header of ours lets
another origin read an answer, and where being on this machine is all that is asked for, a
request with a host's name in it is refused, since that name may be the other site's, pointed
here (DNS rebinding). A token cannot be had that way.
"""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Access", "Guard", "is_loopback"]

_PROBES = frozenset({"/healthz", "/readyz"})
_METRICS = "/metrics"
_METHODS = ("GET", "HEAD")
_ON_ALL = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
_CHALLENGE = 'Basic realm="sidecar", charset="UTF-8", Bearer realm="sidecar"'


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

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request."""
        method, headers = scope["method"], Headers(scope=scope)

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
            app = self._refusal(headers) or app
        await app(scope, receive, send_on)

    def _is_open(self, path: str) -> bool:
        return path in _PROBES or (path == _METRICS and not self._access.metrics_guarded)

    def _refusal(self, headers: Headers) -> PlainTextResponse | None:
        """Say why not; None if nothing is against it."""
        access = self._access
        if access.token_hash is not None:
            if hmac.compare_digest(_presented(headers), access.token_hash):
                return None
            return PlainTextResponse(
                "The token is wanted.\n", 401, {"www-authenticate": _CHALLENGE}
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
