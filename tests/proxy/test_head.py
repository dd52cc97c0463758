"""Reading request heads: what is taken, what it means, and what is not taken."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path

import pytest

from sidecar.exchange import RefusalReason as R
from sidecar.proxy.head import HEAD_END, RefusedError, Request, may_become_a_head, parse_head

DATA = Path(__file__).parents[1] / "data" / "smuggling"
HOST = b"Host: llm.test"


def head(line: bytes = b"GET / HTTP/1.1", *headers: bytes, host: bool = True) -> bytes:
    return b"\r\n".join([line, *([HOST] if host else []), *headers]) + b"\r\n\r\n"


def post(*headers: bytes) -> bytes:
    return head(b"POST / HTTP/1.1", *headers)


def pairs(request: Request, name: bytes) -> list[bytes]:
    return [value for key, value in request.headers if key == name]


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (b"/", b"/"),
        (b"/x?", b"/x?"),
        (b"/x??a=%20&a", b"/x??a=%20&a"),
        (b"//", b"//"),
        (b"//evil.test/x", b"//evil.test/x"),
        (b"/a%2Fb/%2e%2e/../c;d=1", b"/a%2Fb/%2e%2e/../c;d=1"),
        (b"/%zz%", b"/%zz%"),
        (b"/#frag?x", b"/#frag?x"),
        (b'/"<>\\^`{|}[]', b'/"<>\\^`{|}[]'),
        (b"*", b"*"),
        (b"http://h/x?y", b"/x?y"),
        (b"http://h", b"/"),
        (b"http://h?y", b"/?y"),
        (b"HTTPS://user@h:1//x", b"//x"),
        (b"/" + b"x" * 100_000, b"/" + b"x" * 100_000),
    ],
    ids=lambda value: value[:24].decode() if isinstance(value, bytes) else None,
)
def test_targets(sent: bytes, meant: bytes) -> None:
    """A target is what was sent, without the authority of a URL."""
    assert parse_head(head(b"GET %b HTTP/1.1" % sent)).target == meant


def test_every_byte_in_a_target() -> None:
    """Visible ASCII passes as it is, and nothing else passes."""
    for byte in range(256):
        target = b"/a" + bytes([byte]) + b"b"
        raw = head(b"GET %b HTTP/1.1" % target)
        if 0x21 <= byte <= 0x7E:
            assert parse_head(raw).target == target
        else:
            with pytest.raises(RefusedError, match="bad_request"):
                parse_head(raw)


@pytest.mark.parametrize("name", ["requests", "handshakes"])
@pytest.mark.parametrize("put_in", [b"", b"\n", b"\nX:", b"\r", b"\rX:"], ids=repr)
def test_head_is_taken_in_pieces_if_it_is_taken_whole(name: str, put_in: bytes) -> None:
    """Whatever a client has a head's bytes cut into: those of the recorded heads, with line ends
    put in at every place."""
    taken = 0
    for line in (DATA / f"{name}.jsonl").read_text().splitlines():
        raw = json.loads(line)["bytes"].encode("latin-1").lstrip(b"\r\n")
        whole = raw[: raw.find(HEAD_END) + len(HEAD_END)]
        for at in range(1, len(whole) - len(HEAD_END)) if put_in else [0]:
            changed = bytearray(whole[:at] + put_in + whole[at:])
            try:
                parse_head(bytes(changed))
            except RefusedError:
                continue
            taken += 1
            assert all(may_become_a_head(changed[:end], 0) for end in range(1, 27)), changed
            assert may_become_a_head(changed, 0), changed
    assert taken or put_in


@pytest.mark.parametrize("before", [b"\r", b"\n", b"\r\n"])
def test_connect_behind_a_line_end_is_refused(before: bytes) -> None:
    """The parser skips the line end, and takes it for the beginning of a tunnel."""
    with pytest.raises(RefusedError):
        parse_head(before + head(b"CONNECT / HTTP/1.1"))


def test_headers_keep_order_repeats_and_values() -> None:
    """Names come out in lower case; nothing else changes but for blanks before a value."""
    raw = head(b"GET / HTTP/1.1", b"X-B: 1", b"x-a:\t2 ", b"X-B:", b"X-C: caf\xe9")
    assert parse_head(raw).headers == [
        (b"host", b"llm.test"),
        (b"x-b", b"1"),
        (b"x-a", b"2 "),
        (b"x-b", b""),
        (b"x-c", b"caf\xe9"),
    ]


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (head(), True),
        (head(b"GET / HTTP/1.1", b"Connection: close"), False),
        (head(b"GET / HTTP/1.1", b"Connection: x, Close"), False),
        (head(b"GET / HTTP/1.0"), False),
        (head(b"GET / HTTP/1.0", b"Connection: keep-alive"), False),
    ],
)
def test_keep_alive(raw: bytes, kept: bool) -> None:
    """HTTP/1.1 keeps its connection unless told otherwise, 1.0 never."""
    assert parse_head(raw).keep_alive is kept


@pytest.mark.parametrize(
    ("raw", "complete", "length"),
    [
        pytest.param(head(), True, None, id="no body"),
        pytest.param(post(), True, None, id="POST without a length"),
        pytest.param(post(b"Content-Length: 0"), True, None, id="empty"),
        pytest.param(post(b"Content-Length: 2"), False, 2, id="2"),
        pytest.param(post(b"Content-Length: 002"), False, 2, id="002"),
        pytest.param(post(b"Content-Length: \t2  \t"), False, 2, id="blanks"),
        pytest.param(post(b"Content-Length: %d" % (1 << 62)), False, 1 << 62, id="huge"),
        pytest.param(head(b"GET / HTTP/1.1", b"Content-Length: 2"), False, 2, id="GET"),
        pytest.param(head(b"POST / HTTP/1.0", b"Content-Length: 2"), False, 2, id="HTTP/1.0"),
        pytest.param(post(b"Transfer-Encoding: chunked"), False, None, id="chunked"),
        pytest.param(post(b"Transfer-Encoding: CHUNKED"), False, None, id="in capitals"),
        pytest.param(post(b"Transfer-Encoding: chunked "), False, None, id="chunked, blank"),
    ],
)
def test_framing(raw: bytes, complete: bool, length: int | None) -> None:
    """What comes behind the head follows from it alone."""
    request = parse_head(raw)
    assert (request.complete, request.length) == (complete, length)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"GET /\r\n\r\n", R.BAD_REQUEST, id="HTTP/0.9"),
        pytest.param(head(b"GET / HTTP/0.9"), R.HTTP_VERSION, id="0.9 by name"),
        pytest.param(head(b"GET / HTTP/1.2"), R.HTTP_VERSION, id="1.2"),
        pytest.param(head(b"GET / HTTP/2.0"), R.HTTP_VERSION, id="2.0"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\n", R.HTTP_VERSION, id="h2 with prior knowledge"),
        pytest.param(head(b"GET / HTTP/3"), R.HTTP_VERSION, id="3"),
        pytest.param(head(b"GET / HTTP/11"), R.BAD_REQUEST, id="11"),
        pytest.param(head(b"GET / HTTP/1.1 "), R.BAD_REQUEST, id="blank behind the version"),
        pytest.param(head(b"GET / http/1.1"), R.BAD_REQUEST, id="http in small letters"),
        pytest.param(head(b"DESCRIBE / RTSP/1.0"), R.BAD_REQUEST, id="RTSP"),
        pytest.param(head(b"GET  / HTTP/1.1"), R.BAD_REQUEST, id="two blanks"),
        pytest.param(head(b" GET / HTTP/1.1"), R.BAD_REQUEST, id="blank before the method"),
        pytest.param(head(b"get / HTTP/1.1"), R.BAD_REQUEST, id="method in small letters"),
        pytest.param(head(b"BREW / HTTP/1.1"), R.BAD_REQUEST, id="unknown method"),
        pytest.param(head(b"CONNECT h:443 HTTP/1.1"), R.CONNECT, id="CONNECT"),
        pytest.param(head(b"CONNECT /x HTTP/1.1"), R.CONNECT, id="CONNECT with a path"),
        pytest.param(head(b"GET x HTTP/1.1"), R.BAD_REQUEST, id="target without a slash"),
        pytest.param(head(b"GET http:///x HTTP/1.1"), R.BAD_TARGET, id="URL without a host"),
        pytest.param(head(host=False), R.BAD_HOST, id="no Host"),
        pytest.param(head(b"GET / HTTP/1.1", b"Host: b"), R.BAD_HOST, id="two Hosts"),
        pytest.param(head(b"GET / HTTP/1.1", HOST), R.BAD_HOST, id="the same Host twice"),
        pytest.param(head(b"GET / HTTP/1.0", HOST), R.BAD_HOST, id="two Hosts in HTTP/1.0"),
        pytest.param(head(b"GET / HTTP/1.1", b"X : 1"), R.BAD_REQUEST, id="blank before colon"),
        pytest.param(head(b"GET / HTTP/1.1", b"X: 1", b" 2"), R.BAD_REQUEST, id="obs-fold"),
        pytest.param(head(b"GET / HTTP/1.1", b" X: 1", host=False), R.BAD_REQUEST, id="indented"),
        pytest.param(head(b"GET / HTTP/1.1", b"X"), R.BAD_REQUEST, id="no colon"),
        pytest.param(head(b"GET / HTTP/1.1", b": 1"), R.BAD_REQUEST, id="no name"),
        pytest.param(head(b"GET / HTTP/1.1", b"X(: 1"), R.BAD_REQUEST, id="odd name"),
        pytest.param(head(b"GET / HTTP/1.1", b"X\xe9: 1"), R.BAD_REQUEST, id="latin-1 name"),
        pytest.param(head(b"GET / HTTP/1.1", b"X: \0"), R.BAD_REQUEST, id="NUL"),
        pytest.param(head(b"GET / HTTP/1.1", b"X: a\x0bb"), R.BAD_REQUEST, id="VT"),
        pytest.param(head(b"GET / HTTP/1.1", b"X: a\rb"), R.BAD_REQUEST, id="bare CR"),
        pytest.param(head(b"GET / HTTP/1.1", b"X: a\nY: b"), R.BAD_REQUEST, id="bare LF"),
        pytest.param(head(b"GET / HTTP/1.1\nX: a"), R.BAD_REQUEST, id="bare LF in the first line"),
        pytest.param(
            post(b"Content-Length: 2", b"Content-Length: 2"), R.BAD_REQUEST, id="CL twice"
        ),
        pytest.param(post(b"Content-Length: 2, 2"), R.BAD_REQUEST, id="CL list"),
        pytest.param(post(b"Content-Length: 2 3"), R.BAD_REQUEST, id="CL with a blank"),
        pytest.param(post(b"Content-Length: +2"), R.BAD_REQUEST, id="CL +2"),
        pytest.param(post(b"Content-Length: -2"), R.BAD_REQUEST, id="CL -2"),
        pytest.param(post(b"Content-Length: 0x2"), R.BAD_REQUEST, id="CL hex"),
        pytest.param(post(b"Content-Length: 1_0"), R.BAD_REQUEST, id="CL 1_0"),
        pytest.param(post(b"Content-Length: \xb2"), R.BAD_REQUEST, id="CL superscript"),
        pytest.param(post(b"Content-Length:"), R.BAD_REQUEST, id="CL empty"),
        pytest.param(post(b"Content-Length: %d" % (1 << 64)), R.BAD_REQUEST, id="CL overflow"),
        pytest.param(
            post(b"Content-Length: 3", b"Transfer-Encoding: chunked"), R.BAD_REQUEST, id="CL.TE"
        ),
        pytest.param(
            post(b"Transfer-Encoding: chunked", b"Content-Length: 3"), R.BAD_REQUEST, id="TE.CL"
        ),
        pytest.param(
            post(b"Content-Length: 3", b"Transfer-Encoding: x"), R.BAD_REQUEST, id="CL and TE x"
        ),
        pytest.param(post(b"Transfer-Encoding: gzip"), R.BAD_REQUEST, id="TE gzip"),
        pytest.param(post(b"Transfer-Encoding: identity"), R.BAD_REQUEST, id="TE identity"),
        pytest.param(post(b"Transfer-Encoding:"), R.BAD_REQUEST, id="TE empty"),
        pytest.param(post(b"Transfer-Encoding: xchunked"), R.BAD_REQUEST, id="TE xchunked"),
        pytest.param(post(b"Transfer-Encoding: chunked;a"), R.BAD_REQUEST, id="TE parameter"),
        pytest.param(post(b'Transfer-Encoding: "chunked"'), R.BAD_REQUEST, id="TE quoted"),
        pytest.param(post(b"Transfer-Encoding: chunked, x"), R.BAD_REQUEST, id="TE chunked, x"),
        pytest.param(post(b"Transfer-Encoding: \x0bchunked"), R.BAD_REQUEST, id="TE VT"),
        pytest.param(post(b"Transfer-Encoding:", b" chunked"), R.BAD_REQUEST, id="TE folded"),
        pytest.param(post(b"Transfer-Encoding : chunked"), R.BAD_REQUEST, id="TE blank, colon"),
        pytest.param(
            post(b"Transfer-Encoding: gzip, chunked"), R.UNKNOWN_TRANSFER_ENCODING, id="TE list"
        ),
        pytest.param(
            post(b"Transfer-Encoding: ,chunked"), R.UNKNOWN_TRANSFER_ENCODING, id="TE empty member"
        ),
        pytest.param(
            post(b"Transfer-Encoding: x", b"Transfer-Encoding: chunked"),
            R.UNKNOWN_TRANSFER_ENCODING,
            id="TE.TE",
        ),
        pytest.param(
            post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x"),
            R.BAD_REQUEST,
            id="TE.TE the other way round",
        ),
        pytest.param(
            post(b"Transfer-Encoding: chunked", b"Transfer-encoding: chunked"),
            R.BAD_REQUEST,
            id="TE chunked twice",
        ),
        pytest.param(
            head(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked"),
            R.BAD_TRANSFER_ENCODING,
            id="TE in HTTP/1.0",
        ),
        pytest.param(
            head(b"GET / HTTP/1.1", *[b"a:"] * 4096), R.HEAD_TOO_LARGE, id="too many headers"
        ),
        pytest.param(post(b"Upgrade: h2\x00c"), R.BAD_REQUEST, id="NUL in an upgrade"),
        pytest.param(post(b"Upgrade: h2c\x7f"), R.BAD_REQUEST, id="DEL in an upgrade"),
        pytest.param(
            post(b"Upgrade: h2c", b" Content-Length: 3"), R.BAD_REQUEST, id="folded upgrade"
        ),
        pytest.param(
            head(b"GET / HTTP/1.1\r\nUpgrade: h2c", b" X: 1", host=False),
            R.BAD_REQUEST,
            id="indented behind an upgrade",
        ),
    ],
)
def test_refused(raw: bytes, reason: R) -> None:
    """What is no request, or could be read in two ways, is not taken."""
    with pytest.raises(RefusedError) as refused:
        parse_head(raw)
    assert refused.value.reason is reason


def test_4096_headers_are_taken() -> None:
    """One fewer than are refused."""
    assert len(parse_head(head(b"GET / HTTP/1.1", *[b"a:"] * 4095)).headers) == 4096


def test_host_is_not_asked_of_http_1_0() -> None:
    """HTTP/1.0 has no Host."""
    assert parse_head(head(b"GET / HTTP/1.0", host=False)).headers == []


OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA")


@pytest.mark.parametrize(
    "upgrade", [b"Upgrade: h2c", b"UPGRADE:TLS/1.0, HTTP/2.0", b"Upgrade: websocket"]
)
@pytest.mark.parametrize("body", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_upgrade_with_a_body_is_an_ordinary_request(upgrade: bytes, body: bytes) -> None:
    """The offer is taken out, and the body is the request's own."""
    request = parse_head(post(b"Connection: upgrade", upgrade, body))
    assert not request.complete
    assert not request.websocket
    assert not pairs(request, b"upgrade")


WEBSOCKET = (b"Connection: keep-alive, Upgrade", b"Upgrade: WebSocket", b"Sec-WebSocket-Key: x")


@pytest.mark.parametrize(
    ("raw", "is_one"),
    [
        pytest.param(head(b"GET / HTTP/1.1", *WEBSOCKET), True, id="handshake"),
        pytest.param(head(b"GET / HTTP/1.1", *WEBSOCKET[1:]), False, id="no Connection"),
        pytest.param(head(b"GET / HTTP/1.1", *OFFER), False, id="h2c"),
        pytest.param(head(b"GET / HTTP/1.1", *WEBSOCKET, b"Upgrade: h2c"), False, id="two offers"),
        pytest.param(head(b"GET / HTTP/1.1", *WEBSOCKET, b"Content-Length: 1"), False, id="body"),
        pytest.param(head(b"GET / HTTP/1.0", *WEBSOCKET), False, id="HTTP/1.0"),
        pytest.param(post(*WEBSOCKET), False, id="POST"),
    ],
)
def test_websocket_handshakes(raw: bytes, is_one: bool) -> None:
    """Only what RFC 6455 calls a handshake is one."""
    assert parse_head(raw).websocket is is_one


# Bodies in chunks

CHUNKED = post(b"Transfer-Encoding: chunked")
BODY = (
    b"2\r\n\r\n\r\n"  # a chunk of CR LF
    b"4;name=value\r\n\r\n\r\n\r\n"  # one of an empty line
    b"3\r\nabc\r\n"
    b"00A\r\n0123456789\r\n"
    b"0\r\n"
)
CONTENT = b"\r\n\r\n\r\nabc0123456789"
NEXT = head(b"GET /next HTTP/1.1")


def feed(request: Request, pieces: list[bytes], max_dry_bytes: int) -> R | None:
    """Feed pieces until one is refused, and say why."""
    try:
        for piece in pieces:
            request.feed_chunks(piece, max_dry_bytes)
    except RefusedError as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    "trailers", [b"", b"X-Trailer: 1\r\nAuthorization: Bearer sk-forged\r\n"], ids=["", "trailers"]
)
def test_chunks_end_where_they_end_however_they_are_cut(trailers: bytes) -> None:
    """Every cut in two, and byte by byte: the same body, and the next request untouched."""
    raw = BODY + trailers + b"\r\n"
    whole = raw + NEXT
    cuts = [[whole[:at], whole[at:]] for at in range(len(whole))]
    cuts.append([bytes([byte]) for byte in whole])
    for pieces in cuts:
        request = parse_head(CHUNKED)
        body = rest = b""
        for piece in pieces:
            fed = 0 if request.complete else request.feed_chunks(piece, 65536)
            body += request.take()
            rest += piece[fed:]
        assert (request.complete, body, rest) == (True, CONTENT, NEXT)
        assert request.headers == parse_head(CHUNKED).headers


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"x\r\n", id="size"),
        pytest.param(b"-1\r\n", id="negative size"),
        pytest.param(b"0x1\r\na\r\n", id="hex prefix"),
        pytest.param(b"1 \r\na\r\n", id="blank behind the size"),
        pytest.param(b" 1\r\na\r\n", id="blank before the size"),
        pytest.param(b"1\na\r\n", id="bare LF behind the size"),
        pytest.param(b"1\r\naX\r\n", id="longer than its size"),
        pytest.param(b"1\r\na\n0\r\n\r\n", id="bare LF behind the data"),
        pytest.param(b"1;a\x01\r\na\r\n", id="control in an extension"),
        pytest.param(b"1;a\nb\r\na\r\n", id="bare LF in an extension"),
        pytest.param(b"10000000000000001\r\na", id="overflow"),
        pytest.param(b"0\r\nX : 1\r\n\r\n", id="malformed trailer"),
        pytest.param(b"0\r\n\n", id="bare LF at the end"),
    ],
)
def test_malformed_chunks(raw: bytes) -> None:
    """What is malformed is never taken for the end, whole or byte by byte."""
    for pieces in ([raw], [bytes([byte]) for byte in raw]):
        request = parse_head(CHUNKED)
        assert feed(request, pieces, 65536) is R.BAD_BODY
        assert not request.complete


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        pytest.param(b"0\r\n", b"X-Trailer: 1\r\n", id="trailers"),
        pytest.param(b"0\r\nX: ", b"x" * 1000, id="one long trailer"),
        pytest.param(b"1;", b"x" * 1000, id="extensions"),
    ],
)
def test_endless_dry_bytes_are_refused(begin: bytes, piece: bytes) -> None:
    """Trailers and extensions end somewhere, as heads do."""
    request = parse_head(CHUNKED)
    assert feed(request, [begin, *[piece] * 1000], 5000) is R.HEAD_TOO_LARGE


def test_nothing_is_left_for_the_collector_of_cycles() -> None:
    """A request, and the key in it, goes when nobody needs it any more."""
    gc.collect()
    gc.disable()
    try:
        for raw in (head(), post(b"Content-Length: 2"), CHUNKED):
            request = parse_head(raw)
            if raw is CHUNKED:
                request.feed_chunks(BODY + b"\r\n", 65536)
            del request
        assert not [kept for kept in gc.get_objects() if isinstance(kept, Request)]
    finally:
        gc.enable()


def test_garbage_raises_nothing_else() -> None:
    """Seeded mutations of heads and bodies: taken or refused, and nothing else."""
    random_ = random.Random(4)
    odd = [b"\r", b"\n", b"\r\n", b"\0", b" ", b":", b"\xff", b"upgrade", b"\r\nUpgrade: h2c"]
    raws = [head(b"GET /a?b HTTP/1.1", *OFFER), post(b"Content-Length: 3"), CHUNKED]
    taken = 0
    for _ in range(20_000):
        raw = bytearray(random_.choice(raws))
        for _ in range(random_.randint(1, 3)):
            at = random_.randrange(len(raw))
            raw[at : at + random_.randint(0, 3)] = random_.choice(odd)
        mutated = bytes(
            raw[: raw.find(b"\r\n\r\n") + 4] if b"\r\n\r\n" in raw else raw + b"\r\n\r\n"
        )
        try:
            request = parse_head(mutated)
            taken += 1
            if not request.complete and request.length is None:
                request.feed_chunks(BODY[: random_.randrange(len(BODY))] + mutated[:9], 65536)
        except RefusedError:
            pass
    assert 0 < taken < 20_000
