"""Both heads of a handshake, as bytes that nobody sent."""

from __future__ import annotations

import pytest

from sidecar.errors import UpstreamError
from sidecar.exchange import UpstreamFault
from sidecar.proxy.handshake import Answer, Request

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
HEADERS = b"host: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"


def feed(answer: Answer, pieces: list[bytes]) -> None:
    for piece in pieces:
        answer.feed(piece)


@pytest.mark.parametrize(
    ("data", "target"),
    [
        (b"GET /x HTTP/1.1\r\n" + HEADERS, b"/x"),
        (b"GET /x? HTTP/1.1\r\n" + HEADERS, b"/x?"),
        (b"GET HTTPS://b:1/x?http://c/ HTTP/1.1\r\n" + HEADERS, b"/x?http://c/"),
        (b"GET http://b?x HTTP/1.1\r\n" + HEADERS, b"/?x"),
        (b"GET /http://b/x HTTP/1.1\r\n" + HEADERS, b"/http://b/x"),
    ],
)
def test_target(data: bytes, target: bytes) -> None:
    """The target stands as it came; of an absolute one, scheme and authority are left out."""
    request = Request(data + b"frames")
    assert (request.target, request.behind, request.refusal) == (target, b"frames", None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /x HTTP/1.1\r\nhost: a\r\n",
        b"GET /x HTTP/1.0\r\n" + HEADERS,
        b"GET /x HTTP/1.1\r\n" + HEADERS.replace(b"host: a", b"host : a"),
        b"GET /\xff HTTP/1.1\r\n" + HEADERS,
        b"GET /x HTTP/1.1\r\n" + HEADERS.replace(b"websocket", b"h2c"),
        b"GET /x HTTP/1.1\r\nupgrade: websocket\r\n" + HEADERS,
        b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /x HTTP/1.1\r\nhost: b\r\n" + HEADERS,
        b"GET /x HTTP/1.1\r\ncontent-length: 3\r\n" + HEADERS,
        b"GET /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n" + HEADERS,
        b"CONNECT a:1 HTTP/1.1\r\n" + HEADERS,
    ],
)
def test_no_request_for_a_websocket(data: bytes) -> None:
    """Half a head, another version, another protocol, two hosts, a body, and what is no HTTP are
    not passed on. The edge lets none of it get here."""
    refusal = Request(data).refusal
    assert refusal is not None
    assert (refusal.status_code, refusal.reason) == (400, "malformed_request")


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="not HTTP"),
        pytest.param(SWITCH.replace(b"HTTP/1.1", b"HTTP/2.0"), id="HTTP/2.0"),
        pytest.param(SWITCH.replace(b"HTTP/1.1", b"HTTP/1.0"), id="101 in HTTP/1.0"),
        pytest.param(SWITCH.replace(b"Upgrade: websocket\r\n", b""), id="101 without Upgrade"),
        pytest.param(SWITCH.replace(b"Connection: Upgrade\r\n", b""), id="101 without Connection"),
        pytest.param(SWITCH.replace(b": websocket", b": h2c"), id="101 to something else"),
        pytest.param(b"HTTP/1.1 099 Odd\r\ncontent-length: 0\r\n\r\n", id="status 099"),
        pytest.param(b"HTTP/1.1 600 Odd\r\ncontent-length: 0\r\n\r\n", id="status 600"),
        pytest.param(b"HTTP/1.1 403 No\r\nx y: 1\r\n\r\n", id="bad name"),
        pytest.param(b"HTTP/1.1 403 No\r\nx: 1\n y\r\n\r\n", id="folded"),
        pytest.param(
            b"HTTP/1.1 403 No\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            id="length and chunked",
        ),
        pytest.param(
            b"HTTP/1.1 403 No\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", id="two lengths"
        ),
        pytest.param(
            b"HTTP/1.1 403 No\r\ntransfer-encoding: gzip, chunked\r\n\r\n", id="another coding"
        ),
        pytest.param(
            b"HTTP/1.0 403 No\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", id="chunked in 1.0"
        ),
        pytest.param(
            b"HTTP/1.1 403 No\r\ntransfer-encoding: chunked\r\n\r\nxx\r\n", id="bad chunk"
        ),
        pytest.param(
            b"HTTP/1.1 103 Hints\r\ncontent-length: 2\r\n\r\nok" + SWITCH,
            id="interim with a length",
        ),
        pytest.param(
            b"HTTP/1.1 103 Hints\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SWITCH,
            id="interim with chunks",
        ),
        pytest.param(
            SWITCH.replace(b"\r\n", b"\r\ncontent-length: 0\r\n", 1), id="101 with a length"
        ),
        pytest.param(SWITCH.replace(b"\r\n", b" \x1b[2J\r\n", 1), id="control in the reason"),
        pytest.param(SWITCH[:-2] + b"x: " + b"y" * 70_000 + b"\r\n\r\n", id="large header"),
        pytest.param(SWITCH[:-2] + b"x: y\r\n" * 12_000 + b"\r\n", id="many headers"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 3000 + SWITCH, id="interim without end"),
    ],
)
def test_malformed_answer(raw: bytes) -> None:
    """Whole or byte by byte, it is no answer."""
    for step in (len(raw), 1):
        pieces = [raw[at : at + step] for at in range(0, len(raw), step)]
        with pytest.raises(UpstreamError) as raised:
            feed(Answer(), pieces)
        assert raised.value.fault is UpstreamFault.MALFORMED_RESPONSE


def test_any_split_of_an_answer_is_the_same() -> None:
    """Two pieces, cut anywhere, are read as one."""
    raw = (
        b"HTTP/1.1 100 Continue\r\nx: 1\r\n\r\nHTTP/1.1 403 No Way\r\nX-A: 1\r\nx-a: \r\n"
        b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\nx-trailer: 1\r\n\r\n"
    )
    for cut in range(len(raw)):
        answer = Answer()
        assert answer.feed(raw[:cut]) + answer.feed(raw[cut:]) == b""
        assert (answer.status_code, answer.reason, answer.complete) == (403, b"No Way", True)
        assert answer.take_body() == b"abcd"
        assert answer.headers == [
            (b"x-a", b"1"),
            (b"x-a", b""),
            (b"transfer-encoding", b"chunked"),
        ]


def test_any_split_of_a_101_leaves_the_frames() -> None:
    """What stands behind a 101 is not read."""
    raw = b"HTTP/1.1 101 Go\r\n" + HEADERS + b"HTTP/1.1 \0\xff"
    end = len(raw) - 11
    for cut in range(end):
        answer = Answer()
        assert answer.feed(raw[:cut]) == b""
        assert answer.feed(raw[cut:]) == raw[end:]
        assert answer.status_code == 101
