"""Rules on raw header pairs: what an intermediary removes, and who the client is.

Pairs in, pairs out; order and repeats are kept. Nothing here knows a socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from sidecar.exchange import RawHeaders

__all__ = [
    "ForwardedRule",
    "asking_identity",
    "request_headers",
    "response_headers",
    "without_validators",
]

_HOP_BY_HOP = frozenset(
    # RFC 9110 section 7.6.1; the trailers that `trailer` announces are not relayed.
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"}
)
_NONE: frozenset[bytes] = frozenset()
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_NEVER_NOMINATED = (
    # `Connection: content-length` and the like would change what a message means, or who
    # sent it, behind the sender's back.
    _FRAMING
    | {b"host", b"authorization", b"cookie", b"api-key", b"x-api-key", b"x-goog-api-key"}
    | {b"x-litellm-api-key", b"ocp-apim-subscription-key", b"content-type", b"content-encoding"}
    | {b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-accept"}
    | {b"sec-websocket-protocol", b"sec-websocket-extensions"}
)
_UPGRADE = frozenset({b"connection", b"upgrade"})


def _nominated(headers: RawHeaders) -> frozenset[bytes]:
    """Return the names that `Connection` nominates for removal."""
    values = [value for name, value in headers if name == b"connection"]
    if not values:
        return _NONE
    options = b",".join(values).split(b",")
    return frozenset(option.strip().lower() for option in options) - _NEVER_NOMINATED


def _only_upgrade(headers: RawHeaders) -> RawHeaders:
    """Leave of `Connection` what a WebSocket's handshake needs: one header, one option."""
    kept: list[tuple[bytes, bytes]] = []
    seen = False
    for pair in headers:
        if pair[0] != b"connection":
            kept.append(pair)
        elif not seen:
            seen = True
            kept.append((b"connection", b"Upgrade"))
    return kept


class ForwardedRule:
    """The `X-Forwarded-*` rule: LiteLLM sees what it would have seen without us.

    LiteLLM's uvicorn believes these headers when they come from its `FORWARDED_ALLOW_IPS`,
    and so it believes us. From a trusted peer they pass as they came; from any other they
    would be forged, and are replaced by what the connection says. There is never more than
    one value of ours in a header: LiteLLM 1.83 takes a list in `X-Forwarded-Proto` for
    `http`, and compares the whole of `X-Forwarded-For` with its `allowed_ips`.

    Args:
        trusted: networks of the proxies in front of us.
    """

    def __init__(self, trusted: Sequence[IPv4Network | IPv6Network]) -> None:
        self._trusted = tuple(trusted)
        self._known: dict[str, bool] = {}

    def trusts(self, peer: str) -> bool:
        """Whether the peer's own `X-Forwarded-*` headers are believed."""
        known = self._known.get(peer)
        if known is None:
            if len(self._known) > 4096:
                self._known.clear()
            known = self._known[peer] = self._is_trusted(peer)
        return known

    def _is_trusted(self, peer: str) -> bool:
        try:
            address = ip_address(peer)
        except ValueError:  # nobody knows who it was
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._trusted)


_FORGEABLE = frozenset(
    {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port"}
)
_FROM_TRUSTED = _HOP_BY_HOP | {b"expect", b"transfer-encoding"}
_FROM_OTHERS = _FROM_TRUSTED | _FORGEABLE
_FROM_UPSTREAM = _HOP_BY_HOP | {b"transfer-encoding"}


def request_headers(
    headers: RawHeaders, rule: ForwardedRule, peer: str, scheme: str, *, upgrade: bool = False
) -> list[tuple[bytes, bytes]]:
    """Make the headers of the upstream request from the client's.

    Args:
        peer: address of the connection's other end; empty where it is not known any more,
            because the connection was reset when it had barely been taken.
        scheme: `http` or `https`, of the connection.
        upgrade: whether `Upgrade` goes on, and the option of `Connection` that it needs.
    """
    trusted = rule.trusts(peer)
    drop = _FROM_TRUSTED if trusted else _FROM_OTHERS
    if nominated := _nominated(headers):
        drop |= nominated
    if upgrade:
        drop -= _UPGRADE
        headers = _only_upgrade(headers)
    names = [name for name, _ in headers]
    kept = [pair for pair in headers if pair[0] not in drop]
    if b"transfer-encoding" in names:
        kept = [pair for pair in kept if pair[0] != b"content-length"]
        kept.append((b"transfer-encoding", b"chunked"))
    elif b"content-length" in names:
        # "002" and "2  " parse as 2; written anew, there is one way to read them.
        length = headers[names.index(b"content-length")][1]
        if length != (plain := b"%d" % int(length)):
            kept = [(n, plain if n == b"content-length" else value) for n, value in kept]
    if peer and (b"x-forwarded-for" not in names or b"x-forwarded-for" in drop):
        kept.append((b"x-forwarded-for", peer.encode("latin-1")))
    if not trusted:
        kept.append((b"x-forwarded-proto", scheme.encode("latin-1")))
    return kept


def response_headers(headers: RawHeaders, *, upgrade: bool = False) -> list[tuple[bytes, bytes]]:
    """Make the headers of the client's response from the upstream's.

    Args:
        upgrade: as for `request_headers`.
    """
    drop = _FROM_UPSTREAM
    if nominated := _nominated(headers):
        drop |= nominated
    if upgrade:
        drop -= _UPGRADE
        headers = _only_upgrade(headers)
    return [pair for pair in headers if pair[0] not in drop]


def asking_identity(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """Have the upstream send its content uncoded, whatever the client could take.

    Without the header any coding may be sent (RFC 9110 section 12.5.3): it is always there.
    """
    kept = [pair for pair in headers if pair[0] != b"accept-encoding"]
    return [*kept, (b"accept-encoding", b"identity")]


_VALIDATORS = frozenset(
    # RFC 9110 section 8.8, RFC 9530, RFC 3230, and RFC 1864: what says of the content which
    # bytes it has, or would be taken for that.
    {b"etag", b"last-modified", b"content-digest", b"repr-digest", b"digest", b"content-md5"}
)


def without_validators(headers: RawHeaders, length: int | None) -> list[tuple[bytes, bytes]]:
    """Make the headers of a response whose content was changed.

    Args:
        length: of the changed content; None where it is not known.
    """
    kept = [pair for pair in headers if pair[0] not in _VALIDATORS]
    if length is None:
        return [pair for pair in kept if pair[0] != b"content-length"]
    return [
        (name, b"%d" % length) if name == b"content-length" else (name, value)
        for name, value in kept
    ]
