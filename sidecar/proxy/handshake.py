"""Both heads of a WebSocket's handshake, read strictly.

Bytes in, fields out: no I/O, and nothing about what is done with them. httptools refuses most of
what is malformed; this module adds what it lets through. Nothing is passed on as it stood: what
was read here is written anew by `head`, so that there is one way to read it.
"""

from __future__ import annotations

import re

import httptools

from sidecar.errors import UpstreamError
from sidecar.exchange import RawHeaders, UpstreamFault
from sidecar.proxy.refusal import Refusal, refusal_of

__all__ = ["Answer", "Request", "head"]

_MAX_HEAD_BYTES = 64 * 1024
"""Longest head of an answer, interim ones included. h11 takes 16 KiB, hyper 400."""
_AUTHORITY = re.compile(rb"\A[a-z][a-z0-9+.-]*://[^/?#]*", re.IGNORECASE)
_REASON = re.compile(rb"[\t -~\x80-\xff]*")
_NO_BODY = frozenset({101, 204, 304})  # RFC 9110 section 6.4.1


class Request:
    """The request for a WebSocket, from the bytes of its whole head."""

    def __init__(self, data: bytes) -> None:
        self.method = "GET"
        self.target = b""
        """As it stood; of an absolute one the path and what follows."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.behind = b""
        """Bytes that stood behind the head."""
        self.refusal: Refusal | None = refusal_of(UpstreamFault.MALFORMED_REQUEST)
        """Why it cannot be passed on; None if it can."""
        parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.method = parser.get_method().decode("ascii")
            self.behind = data[upgrade.args[0] :]
            self.target = _AUTHORITY.sub(b"", self.target, count=1)  # RFC 9112 section 3.2.2
            if not self.target.startswith(b"/"):
                self.target = b"/" + self.target
            self.refusal = self._refusal(parser.get_http_version())
        except httptools.HttpParserError:
            pass

    def _refusal(self, version: str) -> Refusal | None:
        lengths = _values(self.headers, b"content-length")
        # None of it gets here: the edge has looked at the head before.
        body = _values(self.headers, b"transfer-encoding") or any(int(value) for value in lengths)
        hosts = len(_values(self.headers, b"host"))
        if (
            body
            or hosts != 1
            or self.method != "GET"
            or version != "1.1"
            or not _upgrades(self.headers)
        ):
            return refusal_of(UpstreamFault.MALFORMED_REQUEST)
        return None

    # httptools calls these.

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


class Answer:
    """The answer to it: the head of a 101, or the head and body of any other."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._room = _MAX_HEAD_BYTES
        self._until_eof = False
        self._body: list[bytes] = []
        self.status_code = 0
        """0 until the whole head is there; an interim answer does not count."""
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        """Whether the body has come to its end."""

    @property
    def has_body(self) -> bool:
        """Whether a body goes with this status."""
        return self.status_code not in _NO_BODY

    def feed(self, data: bytes) -> bytes:
        """Take bytes, and return those that stood behind the head of a 101.

        Raises:
            UpstreamError: this is no answer.
        """
        beginning, rest = data, b""
        if not self.status_code:
            beginning, rest = data[: self._room], data[self._room :]
            self._room -= len(beginning)
        try:
            self._parser.feed_data(beginning)
            if not self.status_code and self._room == 0:
                raise UpstreamError(UpstreamFault.MALFORMED_RESPONSE, "the head is too large")
            self._parser.feed_data(rest)
        except httptools.HttpParserUpgrade as upgrade:
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as exc:
            # What stands behind a whole answer concerns nobody: its connection ends here.
            if not self.complete:
                raise UpstreamError(UpstreamFault.MALFORMED_RESPONSE, str(exc)) from None
        return b""

    def feed_eof(self) -> None:
        """Take the end of the connection; where nothing else says so, it ends the body."""
        self.complete = self.complete or self._until_eof

    def take_body(self) -> bytes:
        """Return what has come of the body since the last call, transfer coding aside."""
        body = b"".join(self._body)
        self._body.clear()
        return body

    # httptools calls these; what they raise comes out of `feed_data` as an HttpParserError.

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("a second answer")
        self.reason = b""
        self.headers.clear()

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status_code:  # else it is a trailer
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status_code = self._parser.get_status_code()
        version = self._parser.get_http_version()
        codings = _values(self.headers, b"transfer-encoding")
        if version not in ("1.0", "1.1") or not 100 <= status_code <= 599:
            raise ValueError("not HTTP/1")
        if codings and (version == "1.0" or codings != [b"chunked"]):
            raise ValueError("a transfer coding other than chunked")
        if status_code == 101 and (version == "1.0" or not _upgrades(self.headers)):
            raise ValueError("a switch to something else")
        framed = codings or _values(self.headers, b"content-length")
        if status_code < 200 and framed:
            # It has no body (RFC 9112 section 6.3), but the parser would read one.
            raise ValueError("an interim answer with a body")
        if not _REASON.fullmatch(self.reason):
            raise ValueError("a reason that cannot be passed on")
        if status_code == 101 or status_code >= 200:
            self.status_code = status_code
            self._until_eof = self.has_body and not framed

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.complete = self.status_code != 0


def head(first_line: bytes, headers: RawHeaders) -> bytes:
    """Write the head of a message."""
    lines = [first_line, *[b"%b: %b" % pair for pair in headers]]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _values(headers: RawHeaders, name: bytes) -> list[bytes]:
    return [value.strip().lower() for key, value in headers if key == name]


def _upgrades(headers: RawHeaders) -> bool:
    """Whether these headers of either side speak of a WebSocket, and of nothing else."""
    options = b",".join(_values(headers, b"connection")).split(b",")
    return _values(headers, b"upgrade") == [b"websocket"] and b"upgrade" in map(
        bytes.strip, options
    )
