"""Rules on raw header pairs: what an intermediary removes, and who the client is.

Pairs in, pairs out; order and repeats are kept. Nothing here knows a socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from sidecar.exchange import RawHeaders

__all__ = ["ForwardedRule", "request_headers", "response_headers"]

_HOP_BY_HOP = frozenset(
    # RFC 9110 section 7.6.1; the trailers that `trailer` announces are not relayed.
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"}
)
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
    names: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            names.update(option.strip().lower() for option in value.split(b","))
    return frozenset(names - _NEVER_NOMINATED)


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
    drop = (_FROM_TRUSTED if trusted else _FROM_OTHERS) | _nominated(headers)
    if upgrade:
        drop -= _UPGRADE
        headers = _only_upgrade(headers)
    kept = []
    length: bytes | None = None
    chunked = forwarded_for = False
    for pair in headers:
        name = pair[0]
        if name == b"transfer-encoding":
            chunked = True
        elif name == b"content-length":
            if length is None:
                # "002" and "2  " parse as 2; written anew, there is one way to read them.
                length = b"%d" % int(pair[1])
                kept.append((name, length))
        elif name not in drop:
            forwarded_for = forwarded_for or name == b"x-forwarded-for"
            kept.append(pair)
    if chunked:
        kept = [pair for pair in kept if pair[0] != b"content-length"]
        kept.append((b"transfer-encoding", b"chunked"))
    if peer and not forwarded_for:
        kept.append((b"x-forwarded-for", peer.encode("latin-1")))
    if not trusted:
        kept.append((b"x-forwarded-proto", scheme.encode("latin-1")))
    return kept


def response_headers(headers: RawHeaders, *, upgrade: bool = False) -> list[tuple[bytes, bytes]]:
    """Make the headers of the client's response from the upstream's.

    Args:
        upgrade: as for `request_headers`.
    """
    drop = _FROM_UPSTREAM | _nominated(headers)
    if upgrade:
        drop -= _UPGRADE
        headers = _only_upgrade(headers)
    return [pair for pair in headers if pair[0] not in drop]
