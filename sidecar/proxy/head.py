"""Request heads: which are taken, and what they mean.

Bytes in, a `Request` out, or the reason why not; no socket, no clock, no application. The
grammar is llhttp's, which is strict. What stands here is what it lets pass and what may mean
one thing here and another upstream: two Hosts or none, a transfer coding other than `chunked`,
one on HTTP/1.0, a target that is neither a path nor a URL.

An upgrade other than a WebSocket's is taken out of the head, as a server that does not know it
would ignore it; llhttp would take the body behind it for the next request
(Kludex/uvicorn#2722).
"""

from __future__ import annotations

import re

import httptools

from sidecar.exchange import RefusalReason

__all__ = ["HEAD_END", "RefusedError", "Request", "may_become_a_head", "parse_head"]

HEAD_END = b"\r\n\r\n"

_MAX_HEADERS = 4096
"""As many as 16 KiB can hold, which is what LiteLLM's own server takes that comes in pieces
(h11 0.16, `_connection.py`)."""
_BEGINNING = re.compile(rb"[A-Z-]{1,24}(?: |\Z)")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_VERSION = re.compile(rb"HTTP/\d(?:\.\d)?")
# A value with other characters is left to the parser, which refuses it.
_UPGRADE_LINE = re.compile(rb"\r\nupgrade:[\t -~\x80-\xff]*(?=\r\n)", re.IGNORECASE)
_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]+")


class RefusedError(Exception):
    """A request is not taken."""

    def __init__(self, reason: RefusalReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Request:
    """One request: its head, and a body as it comes.

    A parser of its own sees this request and nothing else.
    """

    __slots__ = (
        "_dry_bytes",
        "_parser",
        "_pieces",
        "_sealed",
        "complete",
        "headers",
        "keep_alive",
        "length",
        "method",
        "modern",
        "target",
        "websocket",
    )

    def __init__(self, method: bytes, target: bytes, modern: bool) -> None:
        self.method = method
        self.target = target
        """In origin form, otherwise as it was sent."""
        self.modern = modern
        """Whether it is HTTP/1.1, and not 1.0."""
        self.headers: list[tuple[bytes, bytes]] = []
        """In wire order, names in lower case; none from trailers."""
        self.keep_alive = False
        self.websocket = False
        """Whether it is a WebSocket's handshake."""
        self.complete = False
        """Whether it has no body, or all of its chunks have come."""
        self.length: int | None = None
        """Length of the body to come; None for chunks."""
        self._sealed = False
        self._pieces: list[bytes] = []
        self._dry_bytes = 0
        # The parser holds on to this object, too: without `release` only the collector of cycles
        # would free the two, and the credentials in them.
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)

    # What the parser tells it

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; behind the head, it is a trailer."""
        if not self._sealed:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take the end of the head."""
        self._sealed = True
        if self.modern and self._parser is not None:
            self.keep_alive = self._parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        """Take a piece of a chunk."""
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """Take the end of the request."""
        self.complete = True

    # What the connection tells it

    def feed_head(self, head: bytes) -> None:
        """Take all of the head.

        Raises:
            RefusedError: it is malformed.
        """
        assert self._parser is not None
        try:
            self._parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise RefusedError(RefusalReason.BAD_REQUEST) from None

    def feed_chunks(self, data: bytes, max_dry_bytes: int) -> int:
        """Take bytes of a body in chunks, and return how many of them belonged to it.

        Args:
            max_dry_bytes: how many may come on end without a byte of the body among them.

        Raises:
            RefusedError: it is malformed, or has trailers or chunk extensions without end.
        """
        assert self._parser is not None
        fed = 0
        try:
            while fed < len(data) and not self.complete:
                # The parser does not say where the next request begins. A body in chunks ends
                # behind an empty line, which may have begun in the data before.
                if fed < 3 and data[fed] in b"\r\n":
                    end = fed + 1
                else:
                    end = data.find(HEAD_END, max(0, fed - 3)) + len(HEAD_END)
                    if end < len(HEAD_END):
                        end = len(data)
                self._parser.feed_data(data[fed:end])
                fed = end
        except httptools.HttpParserError:
            raise RefusedError(RefusalReason.BAD_BODY) from None
        self._dry_bytes = 0 if self._pieces else self._dry_bytes + fed
        if self._dry_bytes > max_dry_bytes:
            raise RefusedError(RefusalReason.HEAD_TOO_LARGE)
        if self.complete:
            self.release()
        return fed

    def release(self) -> None:
        """Let go of the parser; there is nothing more to parse."""
        self._parser = None

    def take(self) -> bytes:
        """Return what has come of the chunks and was not taken yet."""
        pieces = self._pieces
        if len(pieces) == 1:
            return pieces.pop()
        body = b"".join(pieces)
        pieces.clear()
        return body


def may_become_a_head(received: bytearray, searched: int) -> bool:
    """Whether more bytes can make a head of these, so that nobody waits for them in vain.

    Args:
        searched: how many of them were asked about before.
    """
    beginning = _BEGINNING.match(received[:25])
    # What is refused here must not be taken by `parse_head`, where it comes in one piece.
    return beginning is not None and _BARE_LF.search(received, searched) is None


def parse_head(head: bytes) -> Request:
    """Read a whole head, from its first byte to its empty line.

    Raises:
        RefusedError: it is not taken.
    """
    line = head[: head.find(b"\r\n")].split(b" ")
    # The parser takes `POST /` and a bare LF for a request of HTTP/0.9, and headers behind it.
    if len(line) != 3 or head.count(b"\n") != head.count(b"\r\n"):
        raise RefusedError(RefusalReason.BAD_REQUEST)
    method, target, version = line
    modern = version == b"HTTP/1.1"
    if not modern and version != b"HTTP/1.0":
        known = _VERSION.fullmatch(version)
        raise RefusedError(RefusalReason.HTTP_VERSION if known else RefusalReason.BAD_REQUEST)
    if method == b"CONNECT":
        raise RefusedError(RefusalReason.CONNECT)
    upgrade = b"\r\nupgrade:" in head.lower()
    request = Request(method, target, modern)
    # What the parser takes for an upgrade has no body to it.
    request.feed_head(_UPGRADE_LINE.sub(b"", head) if upgrade else head)
    headers = request.headers
    if len(headers) > _MAX_HEADERS:
        raise RefusedError(RefusalReason.HEAD_TOO_LARGE)
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if hosts != 1 and (hosts or modern):
        raise RefusedError(RefusalReason.BAD_HOST)  # RFC 9112 section 3.2
    if not target.startswith(b"/"):
        request.target = _origin_form(target)
    if b"transfer-encoding" in names:
        _check_coding(request)
    else:
        if not request.complete:
            request.length = int(headers[names.index(b"content-length")][1])
        request.release()
    if upgrade:
        request.websocket = (
            method == b"GET" and modern and request.complete and _asks_for_websocket(head, headers)
        )
    return request


def _check_coding(request: Request) -> None:
    """Refuse what may mean one thing here and another upstream (RFC 9112 section 6.1)."""
    if not request.modern:
        raise RefusedError(RefusalReason.BAD_TRANSFER_ENCODING)
    codings = [
        value.strip().lower() for name, value in request.headers if name == b"transfer-encoding"
    ]
    if codings != [b"chunked"]:
        raise RefusedError(RefusalReason.UNKNOWN_TRANSFER_ENCODING)


def _origin_form(target: bytes) -> bytes:
    """Take the authority off a target: it does not choose the upstream (RFC 9112 section 3.2.2)."""
    if target == b"*":
        return target
    match = _ABSOLUTE_FORM.match(target)
    if match is None:
        raise RefusedError(RefusalReason.BAD_TARGET)
    rest = target[match.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def _asks_for_websocket(head: bytes, headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a head is a WebSocket's handshake (RFC 6455 section 4.1)."""
    upgrades = [line.partition(b":")[2].strip().lower() for line in _UPGRADE_LINE.findall(head)]
    options = [
        option.strip().lower()
        for name, value in headers
        if name == b"connection"
        for option in value.split(b",")
    ]
    return upgrades == [b"websocket"] and b"upgrade" in options
