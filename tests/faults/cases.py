"""The table: every fault that the lab plays, what the client gets, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from tests.faults.answers import (
    BLANKS,
    CHUNKED_HEAD,
    EVENTS,
    INPUT,
    JSON_BODY,
    JSON_TYPE,
    LAST_CHUNK,
    MEGABYTE,
    PING,
    SSE_BODY,
    SSE_TYPE,
    STOP,
    USAGE,
    chunk,
    chunked,
    coded,
    event,
    head,
    message,
    padded,
    padded_br,
    padded_zstd,
    sized,
    start,
    text,
    unframed,
)
from tests.faults.model import (
    Case,
    Counts,
    Cut,
    Left,
    Listening,
    Reaches,
    Refused,
    Same,
    Script,
    Scripts,
    Whole,
)
from tests.faults.script import (
    TOKEN,
    Close,
    Drip,
    Flood,
    HalfClose,
    Pause,
    Read,
    Reset,
    Seen,
    Send,
    Stall,
    Step,
    Take,
    Wait,
)

__all__ = ["CASES", "GOOD", "SETTINGS"]

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "hasty": {
        f"SIDECAR_{name}": "0.8"
        for name in (
            "CONNECT_TIMEOUT_S",
            "FIRST_BYTE_TIMEOUT_S",
            "IDLE_TIMEOUT_S",
            "HEAD_TIMEOUT_S",
            "STALL_TIMEOUT_S",
        )
    }
    | {"SIDECAR_MAX_REQUEST_BODY_BYTES": "65536"},
}
"""What the sidecars of the lab are set to, beyond the defaults."""

# What a client sends

QUESTION = b'{"model":"claude-fault","stream":true,"messages":[]}'


def request(*lines: bytes, method: bytes = b"POST", path: bytes = b"/v1/messages") -> bytes:
    """Write a request's head."""
    first = [b"%b %b HTTP/1.1" % (method, path), b"Host: a", b"X-Play: " + TOKEN]
    return b"\r\n".join([*first, *lines, b"", b""])


HEAD = request(b"Content-Length: %d" % len(QUESTION))
POST = HEAD + QUESTION
GET = request(method=b"GET")
CHUNKED_REQUEST = request(b"Transfer-Encoding: chunked")
ASKS: Script = (Send(POST), Read())

# What is counted

STARTED = {**INPUT, "output": 1}
FINISHED = {**INPUT, "output": 16}
COMPLETE = Counts(status="complete", tokens=FINISHED)
LEFT = Counts(code=499, status="partial", left=True)
NO_REQUEST = Counts(code=None)


def failed(reason: str, code: int = 502) -> Counts:
    """Without an answer."""
    return Counts(code, "error", failure=reason)


def cut(
    status: str = "partial", tokens: Mapping[str, int] | None = None, reason: str = "body_cut"
) -> Counts:
    """With the beginning of an answer."""
    return Counts(200, status, tokens or {}, failure=reason)


# Plays

Plays = Callable[[], Iterable[Scripts]]


def once(*upstream: Step, client: Script = ASKS) -> Plays:
    """Play once; the upstream has read the request unless its script begins otherwise."""
    return lambda: [Scripts([upstream], client)]


def answers(raw: bytes | Callable[[], bytes], *then: Step, client: Script = ASKS) -> Plays:
    """Read the request, and answer with these bytes."""
    return once(Read(), Send(raw), *then, client=client)


def each(*raws: bytes, then: tuple[Step, ...] = (), client: Script = ASKS) -> Plays:
    """Play once with each of these answers."""
    return lambda: [Scripts([(Read(), Send(raw), *then)], client) for raw in raws]


def decoded(wire: bytes, at: int) -> int:
    """Return how many bytes of an answer's body a client has of the first `at` on the wire."""
    lines, _, body = wire[:at].partition(b"\r\n\r\n")
    if b"chunked" not in lines:
        return len(body)
    length = 0
    while body:
        size, line_end, rest = body.partition(b"\r\n")
        if not line_end or not int(size, 16):
            break
        length += len(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]
    return length


def ended_at(wire: bytes, begin: int, end: int) -> Plays:
    """Close within an answer, behind each byte from `begin` up to `end`."""
    return lambda: [Scripts([(Read(), Send(wire[:at]), Close())], ASKS) for at in range(begin, end)]


def reset_at(wire: bytes, begin: int, end: int) -> Plays:
    """Reset there, once the client has all that came before."""
    body = wire.index(b"\r\n\r\n") + 4
    return lambda: [
        Scripts([(Read(), Send(wire[:at]), Seen(decoded(wire, at)), Reset())], ASKS)
        for at in range(max(begin, body), end)
    ]


def left_at(wire: bytes, begin: int, end: int, leave: Step) -> Plays:
    """Have the client leave where it has so much of an answer."""
    return lambda: [
        Scripts([(Read(), Send(wire[:at]), Stall())], (Send(POST), Take(decoded(wire, at)), leave))
        for at in range(begin, end)
    ]


def asked_until(wire: bytes, begin: int, end: int, leave: Step) -> Plays:
    """Have the client leave within a request; the upstream knows of it, if it ever will."""
    knows: tuple[Step, ...] = (Seen(),) if begin >= wire.index(b"\r\n\r\n") + 4 else ()
    return lambda: [
        Scripts([(Read(), Stall())], (Send(wire[:at]), *knows, leave)) for at in range(begin, end)
    ]


class Marks:
    """Where in an answer on the wire something has come."""

    def __init__(self, wire: bytes) -> None:
        self.wire = wire
        self.body = wire.index(b"\r\n\r\n") + 4
        self.start = _end_of(wire, b'"message_start"')
        """The usage of the beginning."""
        self.delta = _end_of(wire, b'"message_delta"')
        """That of the end."""
        self.stop = wire.find(STOP) + len(STOP)
        """All events."""
        self.end = len(wire)


def _end_of(wire: bytes, mark: bytes) -> int:
    return wire.index(b"}\n\n", wire.index(mark)) + 1


SIZED = Marks(sized(SSE_BODY))
CHUNKED = Marks(chunked(*EVENTS))
UNFRAMED = Marks(unframed(SSE_BODY))
JSON_SIZED = sized(JSON_BODY, JSON_TYPE)
JSON_CHUNKED = chunked(JSON_BODY[:100], JSON_BODY[100:], lines=(JSON_TYPE,))
JSON_UNFRAMED = unframed(JSON_BODY, JSON_TYPE)
JSON_HEAD = len(JSON_SIZED) - len(JSON_BODY)
JSON_CHUNKS = JSON_CHUNKED.index(b"\r\n\r\n") + 4
JSON_WHOLE = JSON_CHUNKED.rindex(b"}") + 1
JSON_BEGIN = len(JSON_UNFRAMED) - len(JSON_BODY)

GOOD = Case("a good answer", answers(SIZED.wire), Same(), COMPLETE, reaches=Reaches.WHOLE)
"""What is asked for behind each case."""

# The rows


def no_answer() -> Iterator[Case]:
    """The upstream gives no answer."""
    yield Case(
        "its port is closed",
        once(),
        Refused(502, "connect_failed"),
        failed("connect_failed"),
        listening=Listening.NO,
        reaches=Reaches.NOTHING,
    )
    yield Case(
        "it takes no connection",
        once(),
        Refused(504, "connect_timeout"),
        failed("connect_timeout", 504),
        settings="hasty",
        listening=Listening.FULL,
        reaches=Reaches.NOTHING,
    )
    yield Case(
        "it closes, having read the request",
        once(Read(), Close()),
        Refused(502, "stale_connection"),
        failed("stale_connection"),
        reaches=Reaches.WHOLE,
    )
    yield Case(
        "it resets, having read the request",
        once(Read(), Reset()),
        Refused(502, "connection_lost"),
        failed("connection_lost"),
        reaches=Reaches.WHOLE,
    )
    yield Case(
        "it closes its sending side and waits",
        once(Read(), HalfClose(), Stall()),
        Refused(502, "stale_connection"),
        failed("stale_connection"),
    )
    yield Case(
        "it closes its sending side with the request half read",
        once(HalfClose(), Stall(), client=(Send(HEAD + QUESTION[:9]), Read(), Close())),
        Refused(502, "stale_connection"),
        failed("stale_connection"),
        reaches=Reaches.PART,
    )
    yield Case(
        "it resets within its head",
        once(Read(), Send(SIZED.wire[:20]), Reset()),
        Refused(502, "connection_lost"),
        failed("connection_lost"),
    )
    yield Case(
        "it says nothing until the time-out",
        once(Read(), Stall()),
        Refused(504, "first_byte_timeout"),
        failed("first_byte_timeout", 504),
        settings="hasty",
    )
    yield Case(
        "it stops within its head until the time-out",
        once(Read(), Send(SIZED.wire[:20]), Stall()),
        Refused(504, "first_byte_timeout"),
        failed("first_byte_timeout", 504),
        settings="hasty",
    )
    twice = (Send(POST), Read(), Send(POST), Read())
    yield Case(
        "it closes a pooled connection as a POST comes",
        lambda: [Scripts([(Read(), Send(SIZED.wire)), (Read(), Close())], twice)],
        Refused(502, "stale_connection"),
        Counts(502, "error", failure="stale_connection", before=COMPLETE),
    )
    yield Case(
        "it closes a pooled connection as a GET comes: that is sent again",
        lambda: [
            Scripts(
                [(Read(), Send(SIZED.wire)), (Read(), Close()), (Read(), Send(SIZED.wire))],
                (Send(GET), Read(), Send(GET), Read()),
            )
        ],
        Whole(SSE_BODY),
        Counts(before=Counts()),
    )
    yield Case(
        "it says something on a pooled connection",
        lambda: [
            Scripts(
                [(Read(), Send(SIZED.wire), Seen(len(SSE_BODY)), Send(noise), Stall())],
                (Send(POST), Read()),
            )
            for noise in (b"\n", b"HTTP/1.1 408 Request Timeout\r\n\r\n", SIZED.wire)
        ],
        Same(),
        COMPLETE,
    )


def broken_off() -> Iterator[Case]:
    """The upstream breaks off within its answer, behind each byte of it."""
    closes = "it closes behind each byte"
    for name, marks in (("a sized stream", SIZED), ("a chunked stream", CHUNKED)):
        wire = marks.wire
        yield Case(
            f"{closes} of the head of {name}",
            ended_at(wire, 0, marks.body),
            Refused(502, "stale_connection"),
            failed("stale_connection"),
        )
        for what, begin, end, tokens in (
            ("up to the first usage", marks.body, marks.start, {}),
            ("from there to the last usage", marks.start, marks.delta, STARTED),
            ("from there to the end of the last event", marks.delta, marks.stop - 1, FINISHED),
        ):
            yield Case(
                f"{closes} of {name}, {what}",
                ended_at(wire, begin, end),
                Same(complete=False),
                cut(tokens=tokens),
                more=reset_at(wire, begin, end),
            )
    wire = CHUNKED.wire
    yield Case(
        f"{closes} between the last event of a chunked stream and the end of its chunks",
        ended_at(wire, CHUNKED.stop, CHUNKED.end),
        Same(complete=False),
        cut("complete", FINISHED),
        more=reset_at(wire, CHUNKED.stop, CHUNKED.end),
    )
    wire = UNFRAMED.wire
    for what, begin, end, status, tokens in (
        ("up to the first usage", UNFRAMED.body, UNFRAMED.start, "missing", {}),
        ("from there to the last usage", UNFRAMED.start, UNFRAMED.delta, "partial", STARTED),
        ("from there to its end", UNFRAMED.delta, UNFRAMED.end - 1, "partial", FINISHED),
    ):
        yield Case(
            f"{closes} of a stream without a length, {what}",
            ended_at(wire, begin, end),
            Same(),
            Counts(status=status, tokens=tokens),
        )
        yield Case(
            f"it resets behind a byte of a stream without a length, {what}",
            reset_at(wire, end - 1, end),
            Same(complete=False),
            cut(tokens=tokens),
            more=reset_at(wire, begin, end),
        )
    yield Case(
        f"{closes} of the head of a JSON answer",
        ended_at(JSON_SIZED, 0, JSON_HEAD),
        Refused(502, "stale_connection"),
        failed("stale_connection"),
    )
    for name, wire, begin, end in (
        ("a sized JSON answer", JSON_SIZED, JSON_HEAD, len(JSON_SIZED)),
        ("a chunked JSON answer", JSON_CHUNKED, JSON_CHUNKS, JSON_WHOLE),
    ):
        yield Case(
            f"{closes} of {name}",
            ended_at(wire, begin, end),
            Same(complete=False),
            cut(),
            more=reset_at(wire, begin, end),
        )
    yield Case(
        f"{closes} between a chunked JSON answer and the end of its chunks",
        ended_at(JSON_CHUNKED, JSON_WHOLE, len(JSON_CHUNKED)),
        Same(complete=False),
        cut("complete", FINISHED),
        more=reset_at(JSON_CHUNKED, JSON_WHOLE, len(JSON_CHUNKED)),
    )
    yield Case(
        f"{closes} of a JSON answer without a length",
        ended_at(JSON_UNFRAMED, JSON_BEGIN + 1, len(JSON_UNFRAMED)),
        Same(),
        Counts(status="invalid"),
    )
    yield Case(
        "it closes its sending side within a sized stream",
        answers(SIZED.wire[: SIZED.delta], HalfClose(), Stall()),
        Same(complete=False),
        cut(tokens=FINISHED),
    )
    yield Case(
        "it closes its sending side behind a whole answer",
        each(SIZED.wire, CHUNKED.wire, UNFRAMED.wire, then=(HalfClose(), Stall())),
        Same(),
        COMPLETE,
    )


def in_time() -> Iterator[Case]:
    """The upstream takes its time."""
    yield Case(
        "each byte is written by itself",
        lambda: [
            Scripts([(Read(), Drip(wire), *then)], ASKS)
            for wire, then in (
                (SIZED.wire, ()),
                (CHUNKED.wire, ()),
                (UNFRAMED.wire, (Close(),)),
                (JSON_SIZED, ()),
                (JSON_CHUNKED, ()),
                (JSON_UNFRAMED, (Close(),)),
            )
        ],
        Same(),
        COMPLETE,
    )
    yield Case(
        "it pauses for 2 seconds before the head and within it, and for 10 within an event",
        once(
            Read(),
            Pause(2),
            Send(CHUNKED.wire[:20]),
            Pause(2),
            Send(CHUNKED.wire[20 : CHUNKED.start - 9]),
            Pause(10),
            Send(CHUNKED.wire[CHUNKED.start - 9 :]),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "it stops within the stream until the time-out",
        answers(CHUNKED.wire[: CHUNKED.start + 2], Stall()),
        Cut(SSE_BODY[: SSE_BODY.index(b"\n\n") + 2]),
        cut(tokens=STARTED, reason="idle_timeout"),
        settings="hasty",
    )
    yield Case(
        "it stops behind the last event until the time-out",
        answers(CHUNKED.wire[: CHUNKED.stop], Stall()),
        Cut(SSE_BODY),
        cut("complete", FINISHED, reason="idle_timeout"),
        settings="hasty",
    )


HELLO = b"hello"
OPEN = head(SSE_TYPE, b"transfer-encoding: chunked") + chunk(HELLO)
"""A chunked answer that has begun."""
LONG = b"x" * 300_000
DRY = b"0" * 1_000_000
MALFORMED = Refused(502, "malformed_response")


def badly_framed() -> Iterator[Case]:
    """The upstream's framing lies, or cannot be read."""
    yield Case(
        "a chunk's size is no number, negative, too large, or has no line end of its own",
        each(*(OPEN + bad for bad in BAD_CHUNKS)),
        Cut(HELLO),
        cut(reason="malformed_response"),
    )
    yield Case(
        "a chunk is longer than its size",
        answers(OPEN + b"3\r\nhello\r\n" + LAST_CHUNK),
        Cut(HELLO + b"hel"),
        cut(reason="malformed_response"),
    )
    yield Case(
        "a chunk is shorter than its size, and the stream goes on",
        answers(OPEN + b"7\r\nhello\r\n" + LAST_CHUNK),
        Cut(HELLO + b"hello\r\n"),
        cut(reason="malformed_response"),
    )
    yield Case(
        "a chunk is cut short by the end of the connection",
        answers(OPEN + b"a\r\nhel", Close()),
        Same(complete=False),
        cut(),
    )
    yield Case(
        "chunks have extensions, leading zeros and upper case, and trailers follow",
        answers(
            CHUNKED_HEAD
            + b"00%X;a=b;c\r\n%b\r\n" % (len(SSE_BODY), SSE_BODY)
            + b'0;x="y"\r\nx-trailer: 1\r\nset-cookie: a=b\r\n\r\n'
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "chunk extensions, or trailers, without end",
        each(OPEN + b"5;x=" + DRY, OPEN + b"0\r\nx: " + DRY, OPEN + DRY),
        Cut(HELLO),
        cut(reason="malformed_response"),
    )
    yield Case(
        "the length is too large by one, and by 2^62",
        each(
            *(
                head(SSE_TYPE, b"content-length: %d" % (len(SSE_BODY) + more)) + SSE_BODY
                for more in (1, 1 << 62)
            ),
            then=(Close(),),
        ),
        Same(complete=False),
        cut("complete", FINISHED),
    )
    yield Case(
        "the length is too small, within an event",
        answers(head(SSE_TYPE, b"content-length: %d" % (SIZED.start - SIZED.body)) + SSE_BODY),
        Same(),
        Counts(status="partial", tokens=STARTED),
    )
    yield Case(
        "something follows the answer: a byte, garbage, a head, a second answer, an interim one",
        each(
            *(
                wire + rest
                for wire in (SIZED.wire, CHUNKED.wire)
                for rest in (
                    b"\n",
                    b"\0garbage",
                    b"HTTP/1.1 500 No\r\n\r\n",
                    sized(b"data: {}\n\n"),
                    b"HTTP/1.1 100 Continue\r\n\r\n",
                )
            )
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "a body follows an answer to HEAD",
        answers(SIZED.wire, client=(Send(request(method=b"HEAD")), Read())),
        Same(),
        Counts(),
    )
    yield Case(
        "a body follows a 204 or a 304",
        each(
            head(status=b"204 No Content") + SIZED.wire,
            head(b"content-length: 5", status=b"204 No Content") + HELLO,
        ),
        Same(),
        Counts(204, "missing"),
    )
    yield Case(
        "it begins its answer before the request's end, takes that, and ends its answer",
        once(
            Send(SIZED.wire[: SIZED.start]),
            Read(),
            Send(SIZED.wire[SIZED.start :]),
            client=(Send(HEAD), Seen(), Send(QUESTION), Read()),
        ),
        Same(),
        COMPLETE,
        reaches=Reaches.WHOLE,
    )
    yield Case(
        "it ends its answer before the request's end: that is not passed on",
        once(Send(SIZED.wire), Read(), client=(Send(HEAD), Read(), Send(QUESTION))),
        Same(),
        COMPLETE,
        reaches=Reaches.PART,
    )
    upload = request(b"Content-Length: %d" % (8 * MEGABYTE))
    refusal = b'{"error":{"message":"too large"}}'
    refused = head(
        JSON_TYPE, b"content-length: %d" % len(refusal), b"connection: close", status=b"413 No"
    )
    yield Case(
        "it refuses 8 MB of a request with a 413 and closes its sending side",
        once(
            Send(refused + refusal),
            HalfClose(),
            Stall(),
            client=(Send(upload), Seen(), Flood(b"x" * 65536, 8 * MEGABYTE), Read()),
        ),
        Same(),
        Counts(413, "error"),
        reaches=Reaches.PART,
    )


BAD_CHUNKS = (
    b"zz\r\nhello\r\n",
    b"-5\r\nhello\r\n",
    b"0x5\r\nhello\r\n",
    b" 5\r\nhello\r\n",
    b"\r\nhello\r\n",
    b"10000000000000000\r\nhello\r\n",
    b"5\nhello\n0\n\n",
    b"5\r\r\nhello\r\n",
    b"5;\n\r\nhello\r\n",
    b"5;a=\0\r\nhello\r\n",
    b"0\r\nbad trailer\r\n\r\n",
    b"0\r\ncontent-length: 5\r\n\r\n",
    b"0\r\n\n",
)

BAD_HEADS = (
    # Line ends and NUL within a header: what would let one answer look like two.
    head(b"x-a: 1\rset-cookie: a=b", b"content-length: 5") + HELLO,
    head(b"x-a: 1\nset-cookie: a=b", b"content-length: 5") + HELLO,
    head(b"x-a: 1\n\nHTTP/1.1 200 OK\ncontent-length: 0\n\n", b"content-length: 5") + HELLO,
    head(b"x-a: 1\r\rcontent-length: 0\r\r", b"content-length: 5") + HELLO,
    head(b"x-a: 1\0", b"content-length: 5") + HELLO,
    head(b"x-a: \x01\x7f", b"content-length: 5") + HELLO,
    head(b"x-a: 1\r\n folded", b"content-length: 5") + HELLO,
    head(b"x-a: 1\r\n\tcontent-length: 0", b"content-length: 5") + HELLO,
    head(b" x-a: 1", b"content-length: 5") + HELLO,
    # Names that are none.
    head(b"x a: 1", b"content-length: 5") + HELLO,
    head(b"x-a : 1", b"content-length: 5") + HELLO,
    head(b": 1", b"content-length: 5") + HELLO,
    head(b"x-a", b"content-length: 5") + HELLO,
    head(b"x\0a: 1", b"content-length: 5") + HELLO,
    head(b"x\xe9: 1", b"content-length: 5") + HELLO,
    head(b"(x): 1", b"content-length: 5") + HELLO,
    head(b'"x": 1', b"content-length: 5") + HELLO,
    # Status lines.
    b"garbage\r\n\r\n",
    b"\0\0\0\0\r\n\r\n",
    b"<html>502</html>\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
    b"HTTP/2.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/0.9 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"http/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 099 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 600 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 2000 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 20 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 abc OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\ncontent-length: 5\r\n\r\n" + SIZED.wire,
    # Lengths and codings that contradict each other, or are no such thing.
    head(b"content-length: 5", b"content-length: 5") + HELLO,
    head(b"content-length: 5", b"content-length: 6") + HELLO,
    head(b"content-length: 5, 5") + HELLO,
    head(b"content-length: +5") + HELLO,
    head(b"content-length: -5") + HELLO,
    head(b"content-length: 0x5") + HELLO,
    head(b"content-length: 5 5") + HELLO,
    head(b"content-length: 5.0") + HELLO,
    head(b"content-length:") + HELLO,
    head(b"content-length: %d" % (1 << 64)) + HELLO,
    head(b"content-length: 5", b"transfer-encoding: chunked") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding: chunked", b"content-length: 5") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding: chunked", b"transfer-encoding: chunked") + chunk(HELLO),
    head(b"transfer-encoding: chunked, chunked") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding: gzip, chunked") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding: chunked, gzip") + HELLO,
    head(b"transfer-encoding: identity") + HELLO,
    head(b"transfer-encoding: xchunked") + HELLO,
    head(b"transfer-encoding: chunked;q=1") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding:") + HELLO,
    head(b"transfer-encoding : chunked") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding:\r\n chunked") + chunk(HELLO) + LAST_CHUNK,
    head(b"transfer-encoding: chunked", version=b"1.0") + chunk(HELLO) + LAST_CHUNK,
)
"""Heads that are no answer, or could be taken for two."""


def heads() -> Iterator[Case]:
    """The upstream's heads."""
    yield Case(
        "a head with CR, LF or NUL in a value, a name that is none, a status that is none, "
        "two lengths, or a length and a coding",
        each(*BAD_HEADS, then=(Stall(),)),
        MALFORMED,
        failed("malformed_response"),
        more=lambda: [
            Scripts([(Read(), Drip(raw), Stall())], ASKS) for raw in BAD_HEADS if len(raw) < 300
        ],
    )
    yield Case(
        "a head of 300 kB: in one header, in many, in one name, or in interim answers",
        each(
            head(b"x: " + LONG),
            head(*[b"x-%d: %d" % (number, number) for number in range(30_000)]),
            head(b"x" * 300_000 + b": 1"),
            b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" * 10_000,
            then=(Stall(),),
        ),
        MALFORMED,
        failed("malformed_response"),
    )
    yield Case(
        "a head of 64 KiB, of 10,000 headers, and of repeats",
        each(
            sized(SSE_BODY, SSE_TYPE, b"x-long: " + b"x" * 65_000),
            sized(SSE_BODY, SSE_TYPE, *[b"x-%d: %d" % (n, n) for n in range(10_000)]),
            sized(SSE_BODY, SSE_TYPE, b"set-cookie: a=1", b"x: 1", b"set-cookie: a=1", b"x: 1"),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "odd headers: empty values, blanks around them, Latin-1, every mark of a name",
        each(
            sized(
                SSE_BODY,
                b"Content-Type:text/event-stream \t",
                b"x-empty:",
                b"x-latin: caf\xe9\xff",
                b"!#$%&'*+-.^_`|~: marks",
                b"x-tab: a\tb",
                b'x-inner: a: b; c="d\\"',
            )
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "interim answers come before the answer (the client gets no other than 100)",
        each(
            b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED.wire,
            b"HTTP/1.1 102 Processing\r\nx: 1\r\n\r\n"
            b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + SIZED.wire,
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "`Connection` names headers of the answer, its length and type among them",
        answers(sized(SSE_BODY, SSE_TYPE, b"connection: x-a, content-length, content-type")),
        Same(),
        COMPLETE,
    )
    yield Case(
        "HTTP/1.0, with a length and until its end",
        each(
            head(SSE_TYPE, b"content-length: %d" % len(SSE_BODY), version=b"1.0") + SSE_BODY,
            head(SSE_TYPE, version=b"1.0") + SSE_BODY,
            then=(Close(),),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "529 with `retry-after`",
        answers(FAILURE),
        Same(),
        Counts(529, "error"),
    )


FAILURE = head(JSON_TYPE, b"content-length: 2", b"retry-after: 7", status=b"529 Overloaded") + b"{}"


def stream(*parts: bytes, type_: bytes = SSE_TYPE) -> bytes:
    """Write a sized answer of these parts."""
    return sized(b"".join(parts), type_)


def answer_of(body: bytes) -> bytes:
    """Write a JSON answer."""
    return sized(body, JSON_TYPE)


def torn(frame: bytes, by: bytes) -> list[bytes]:
    """Put something into the middle of a frame's name, of its data, and before its blank line."""
    return [frame[:at] + by + frame[at:] for at in (3, len(frame) // 2, len(frame) - 1)]


def _with_input(value: bytes) -> bytes:
    """Put a count into a JSON answer's usage."""
    return JSON_BODY.replace(b'"input_tokens":7', b'"input_tokens":' + value)


def _long(frame: bytes) -> bytes:
    """Put 8 MB into an event's data."""
    return frame.replace(b"}\n\n", b',"pad":"%b"}\n\n' % (b"x" * (8 * MEGABYTE)))


START, FIRST, _, DELTA, _ = EVENTS
OTHER_START = START.replace(b"msg_01", b"msg_02")
WITHIN_DATA = range(DELTA.index(b"{") + 1, len(DELTA) - 2)
ERROR = {"type": "overloaded_error", "message": "Overloaded"}
NO_INPUT = {kind: tokens for kind, tokens in FINISHED.items() if kind != "uncached"}
AN_OUTPUT = {"output": 16}
DEEP = 100_000


def contents() -> Iterator[Case]:
    """What the answer says is not what it should be."""
    yield Case(
        "an error event follows the first usage, with and without a name",
        each(
            stream(START, FIRST, event("error", error=ERROR)),
            stream(START, FIRST, b'data: {"error": {"message": "no"}}\n\n', b"data: [DONE]\n\n"),
        ),
        Same(),
        Counts(status="partial", tokens=STARTED),
    )
    yield Case(
        "an error event is all there is",
        each(stream(event("error", error=ERROR)), stream(b'data: {"error": {}}\n\n')),
        Same(),
        Counts(status="error"),
    )
    yield Case(
        "there are two `message_start`",
        each(stream(START, FIRST, OTHER_START, DELTA, STOP)),
        Same(),
        Counts(status="invalid", tokens=FINISHED),
    )
    yield Case(
        "there are two `message_start` of the same message",
        each(stream(START, FIRST, START, DELTA, STOP)),
        Same(),
        Counts(status="complete", tokens=FINISHED),
    )
    yield Case(
        "there is no `message_start`",
        each(stream(FIRST, DELTA, STOP)),
        Same(),
        Counts(status="invalid", tokens=AN_OUTPUT),
    )
    yield Case(
        "the last blank line is absent",
        each(stream(SSE_BODY[:-1]), stream(SSE_BODY[:-2])),
        Same(),
        Counts(status="partial", tokens=FINISHED),
    )
    yield Case(
        "an event of 8 MB, of text",
        lambda: [
            Scripts([(Read(), Send(stream(START, text("x" * (8 << 20)), DELTA, STOP)))], ASKS)
        ],
        Same(),
        COMPLETE,
    )
    yield Case(
        "an event of 8 MB, with the last usage",
        lambda: [Scripts([(Read(), Send(stream(START, FIRST, _long(DELTA), STOP)))], ASKS)],
        Same(),
        Counts(status="oversized", tokens=STARTED),
    )
    yield Case(
        "an event of 8 MB, with the first usage",
        lambda: [Scripts([(Read(), Send(stream(_long(START), FIRST, DELTA, STOP)))], ASKS)],
        Same(),
        Counts(status="oversized", tokens=AN_OUTPUT),
    )
    yield Case(
        "a JSON answer of 5 MB",
        answers(lambda: answer_of(message(USAGE, pad="x" * (5 << 20)))),
        Same(),
        Counts(status="oversized"),
    )
    yield Case(
        "lines end in CR, in CRLF, in a mixture; a byte order mark; comments; no blanks; "
        "data over two lines",
        each(
            stream(SSE_BODY.replace(b"\n", b"\r")),
            stream(SSE_BODY.replace(b"\n", b"\r\n")),
            stream(START.replace(b"\n", b"\r\n"), FIRST, DELTA.replace(b"\n", b"\r"), STOP),
            stream(b"\xef\xbb\xbf", SSE_BODY),
            stream(
                b': say "usage"\n\n', SSE_BODY.replace(b"data", b": ping\nid: 1\nretry: 9\ndata")
            ),
            stream(SSE_BODY.replace(b": {", b":{").replace(b"event: ", b"event:")),
            stream(SSE_BODY.replace(b',"usage"', b',\ndata: "usage"')),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "a ping stands inside a frame of text, or inside the name of a frame with usage",
        each(
            *(stream(START, frame, DELTA, STOP) for frame in torn(FIRST, PING)),
            *(stream(START, FIRST, frame, STOP) for frame in torn(DELTA, PING)[:1]),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "a ping stands inside the data of the frame with the last usage, at each byte",
        each(*(stream(START, FIRST, DELTA[:at] + PING + DELTA[at:], STOP) for at in WITHIN_DATA)),
        Same(),
        Counts(status="invalid", tokens=STARTED),
    )
    yield Case(
        "text and tools speak of usage",
        each(
            stream(
                START,
                text('"usage":{"input_tokens":999}'),
                text('\n\nevent: message_delta\ndata: {"usage": {"output_tokens": 999}}\n\n'),
                event("content_block_start", content_block={"input": {"usage": USAGE}}),
                event("content_block_delta", usage={"output_tokens": 999}),
                DELTA,
                STOP,
            ),
            answer_of(
                message(
                    USAGE | {"output_tokens": 16},
                    content=[
                        {"type": "text", "text": '"usage":{"input_tokens":999}'},
                        {"type": "tool_use", "input": {"usage": {"input_tokens": 999}}},
                    ],
                )
            ),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "text is invalid UTF-8, half an emoji, or (in a stream) has NUL bytes",
        each(
            stream(SSE_BODY.replace(b"H\xc3\xa9", b"\xff\xfe\xc3\x28")),
            stream(SSE_BODY.replace(b"H\xc3\xa9", b"\0\0")),
            stream(SSE_BODY.replace(b'"claude-sonnet-4-5"', b'"\xff\xed\xa0\x80"')),
            stream(SSE_BODY.replace(b'"claude-sonnet-4-5"', b'"\\ud83d"')),
            answer_of(JSON_BODY.replace(b"H\xc3\xa9", b"\xff\xfe\xc3\x28")),
            answer_of(JSON_BODY.replace(b"H\xc3\xa9", b"\\ud83d")),
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "a JSON answer has NUL bytes, is cut in its text, is no object, or is another document",
        each(
            *(
                answer_of(body)
                for body in (
                    JSON_BODY.replace(b"H\xc3\xa9", b"\0"),
                    JSON_BODY[:-1],
                    b"[%b]" % JSON_BODY,
                    JSON_BODY * 2,
                    b"null",
                    b"7",
                    b"<html>",
                    SSE_BODY,
                )
            )
        ),
        Same(),
        Counts(status="invalid"),
    )
    yield Case(
        f"JSON is nested {DEEP:,} deep",
        each(
            answer_of(message(USAGE)[:-1] + b',"x":' + b"[" * DEEP + b"]" * DEEP + b"}"),
            answer_of(message(USAGE)[:-1] + b',"x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}"),
            answer_of(b"[" * DEEP),
        ),
        Same(),
        Counts(status="invalid"),
    )
    yield Case(
        "a count is beyond 2^53 or 2^64, negative, a fraction, infinite, a string, a boolean",
        each(
            *(
                answer_of(_with_input(value))
                for value in (
                    b"9007199254740993",
                    b"18446744073709551617",
                    b"9" * 400,
                    b"1e400",
                    b"-1",
                    b"7.5",
                    b'"7"',
                    b"true",
                    b"[7]",
                    b"NaN",
                )
            )
        ),
        Same(),
        Counts(status="invalid", tokens=NO_INPUT),
    )
    yield Case(
        "a name comes twice: the last one counts; a whole number may be written as a fraction",
        each(
            *(
                answer_of(body)
                for body in (
                    JSON_BODY.replace(b'"usage":', b'"usage":{"input_tokens":999},"usage":'),
                    _with_input(b'999,"input_tokens":7'),
                    _with_input(b"7.0"),
                    _with_input(b"0.7e1"),
                )
            )
        ),
        Same(),
        COMPLETE,
    )
    yield Case(
        "usage is null, or there is none, or the body is empty",
        each(
            answer_of(message(None)),
            answer_of(b"{}"),
            answer_of(b""),
            stream(start(None), FIRST, STOP),
            stream(b""),
        ),
        Same(),
        Counts(status="missing"),
    )
    yield Case(
        "the content type is absent, or another one",
        each(sized(SSE_BODY, b"x-a: 1"), sized(SSE_BODY, b"content-type: text/plain")),
        Same(),
        Counts(status="missing"),
    )
    yield Case(
        "usage is no object",
        each(stream(start([1]), DELTA, STOP), stream(start("7"), DELTA, STOP)),
        Same(),
        Counts(status="invalid", tokens=AN_OUTPUT),
    )


def codings() -> Iterator[Case]:
    """The upstream's content codings."""
    packers = ((b"gzip", padded), (b"br", padded_br), (b"zstd", padded_zstd))
    yield Case(
        "gzip, brotli and zstd",
        lambda: [
            Scripts([(Read(), Send(coded(coding, pack(size))))], ASKS)
            for coding, pack in packers
            for size in (0, BLANKS)
        ],
        Same(),
        COMPLETE,
    )
    yield Case(
        "bombs in gzip, brotli and zstd, which expand to 10 MB, 100 MB and 1 GB",
        lambda: [
            Scripts([(Read(), Send(coded(coding, pack(size))))], ASKS)
            for coding, pack in packers
            for size in (10 * MEGABYTE, 100 * MEGABYTE, 1024 * MEGABYTE)
        ],
        Same(),
        Counts(status="oversized"),
    )
    yield Case(
        "a coding that the sidecar does not decode, or two",
        each(coded(b"lzma", JSON_BODY), coded(b"gzip, br", JSON_BODY)),
        Same(),
        Counts(status="encoded"),
    )
    yield Case(
        "a body that is not in its coding, or becomes another thing within it",
        lambda: [
            Scripts([(Read(), Send(coded(coding, body)))], ASKS)
            for coding, pack in packers
            for body in (JSON_BODY, pack(BLANKS)[:10] + b"\x07\xff" * 99)
        ],
        Same(),
        Counts(status="invalid"),
    )
    yield Case(
        "a body that ends within its coding",
        lambda: [
            Scripts([(Read(), Send(coded(coding, pack(BLANKS)[:-30])))], ASKS)
            for coding, pack in packers
        ],
        Same(),
        Counts(status="partial"),
    )


LEAVES = (Close(), Reset())
UPLOAD = request(b"Content-Length: %d" % (1 << 40))
EXPECTING = request(b"Content-Length: %d" % len(QUESTION), b"Expect: 100-continue")
PIECE = chunk(b"x" * 65536)


def clients() -> Iterator[Case]:
    """What clients do."""
    begin = len(HEAD)
    yield Case(
        "it leaves behind each byte of a request's head",
        asked_until(POST, 0, begin, Close()),
        Left(),
        NO_REQUEST,
        more=asked_until(POST, 0, begin, Reset()),
        reaches=Reaches.NOTHING,
    )
    yield Case(
        "it leaves behind each byte of a request's body",
        asked_until(POST, begin, len(POST), Close()),
        Left(),
        LEFT,
        more=asked_until(POST, begin, len(POST), Reset()),
        reaches=Reaches.PART,
    )
    in_chunks = CHUNKED_REQUEST + chunk(QUESTION[:20]) + chunk(QUESTION[20:]) + LAST_CHUNK
    yield Case(
        "it leaves behind each byte of a request's chunks",
        asked_until(in_chunks, len(CHUNKED_REQUEST), len(in_chunks), Close()),
        Left(),
        LEFT,
        more=asked_until(in_chunks, len(CHUNKED_REQUEST), len(in_chunks), Reset()),
        reaches=Reaches.PART,
    )
    yield Case(
        "it leaves, or closes its sending side, when its request is out",
        lambda: [
            Scripts([(Read(), Stall())], (Send(POST), Seen(len(QUESTION)), leave))
            for leave in (*LEAVES, HalfClose())
        ],
        Left(),
        LEFT,
        reaches=Reaches.WHOLE,
    )
    yield Case(
        "it leaves while the head of an answer comes",
        lambda: [
            Scripts(
                [(Read(), Send(SIZED.wire[:at]), Stall())],
                (Send(POST), Seen(len(QUESTION)), leave),
            )
            for at in range(0, SIZED.body - 1, 7)
            for leave in LEAVES
        ],
        Left(),
        LEFT,
    )
    for name, marks in (("a sized stream", SIZED), ("a chunked stream", CHUNKED)):
        for what, first, last, tokens in (
            ("up to the first usage", marks.body, marks.start, {}),
            ("from there to the last usage", marks.start, marks.delta, STARTED),
            ("from there to the end of the last event", marks.delta, marks.stop - 1, FINISHED),
        ):
            yield Case(
                f"it leaves behind each byte of {name}, {what}",
                left_at(marks.wire, first, last, Close()),
                Left(),
                Counts(499, "partial", tokens, left=True),
                more=left_at(marks.wire, first, last, Reset()),
            )
    yield Case(
        "it leaves at the end of the last event, before the end of the chunks",
        left_at(CHUNKED.wire, CHUNKED.stop, CHUNKED.end, Close()),
        Left(),
        COMPLETE,
    )
    yield Case(
        "it sends a body without end and without a length, which nobody reads, and leaves",
        once(
            Wait(),
            Stall(),
            client=(Send(CHUNKED_REQUEST), Seen(), Flood(PIECE, 64 * MEGABYTE), Reset()),
        ),
        Left(),
        LEFT,
    )
    yield Case(
        "it sends 64 MB of a longer body, which the upstream reads, and leaves",
        lambda: [
            Scripts([(Read(),)], (Send(first), Seen(), Flood(PIECE, 64 * MEGABYTE), Close()))
            for first in (CHUNKED_REQUEST, UPLOAD)
        ],
        Left(),
        LEFT,
        reaches=Reaches.PART,
    )
    yield Case(
        "it leaves within an answer without end",
        once(
            Read(),
            Send(CHUNKED_HEAD + chunk(START)),
            Flood(chunk(FIRST), 1 << 40),
            client=(Send(POST), Take(MEGABYTE), Close()),
        ),
        Left(),
        Counts(499, "partial", STARTED, left=True),
    )
    yield Case(
        "its body is longer than the limit, as its length says",
        once(Read(), client=(Send(UPLOAD), Read(), Close())),
        Refused(413, "request_too_large"),
        Counts(413, "error", refused="request_too_large"),
        settings="hasty",
        reaches=Reaches.NOTHING,
    )
    yield Case(
        "its body, in chunks, is longer than the limit",
        once(Read(), client=(Send(CHUNKED_REQUEST), Seen(), Send(PIECE + PIECE), Read(), Close())),
        Refused(413, "request_too_large"),
        Counts(413, "error", refused="request_too_large"),
        settings="hasty",
        reaches=Reaches.PART,
    )
    yield Case(
        "its chunks are malformed",
        lambda: [
            Scripts([(Read(),)], (Send(CHUNKED_REQUEST), Seen(), Send(bad), Read()))
            for bad in BAD_CHUNKS
        ],
        Refused(400, "bad_body"),
        Counts(499, "partial", refused="bad_body", left=True),
        reaches=Reaches.PART,
    )
    yield Case(
        "more comes than its length says, which is no request",
        answers(SIZED.wire, client=(Send(POST + b"\0garbage\r\n\r\n"), Read(), Read())),
        Refused(400, "bad_request"),
        Counts(None, refused="bad_request", before=COMPLETE),
    )
    yield Case(
        "its head has no end",
        once(client=(Send(b"GET / HTTP/1.1\r\nx: " + b"x" * 70_000), Read())),
        Refused(431, "head_too_large"),
        Counts(None, refused="head_too_large"),
        reaches=Reaches.NOTHING,
    )
    yield Case(
        "it stops within its head until the time-out",
        once(client=(Send(POST[:30]), Read())),
        Refused(408, "slow_head"),
        Counts(None, refused="slow_head"),
        settings="hasty",
        reaches=Reaches.NOTHING,
    )
    yield Case(
        "it stops within its body until the time-out",
        once(Read(), client=(Send(POST[:-9]), Read())),
        Refused(408, "slow_body"),
        Counts(499, "partial", refused="slow_body", left=True),
        settings="hasty",
        reaches=Reaches.PART,
    )
    yield Case(
        "it takes nothing of a long answer until the time-out",
        once(
            Read(),
            Send(CHUNKED_HEAD + chunk(START)),
            Flood(chunk(FIRST), 64 * MEGABYTE),
            Stall(),
            client=(Send(POST), Take(), Pause(3), Close()),
        ),
        Left(),
        Counts(499, "partial", STARTED, refused="slow_reader", left=True),
        settings="hasty",
    )
    yield Case(
        "it sends three requests at once",
        answers(SIZED.wire, client=(Send(POST * 3), Read(), Read(), Read())),
        Same(),
        Counts(
            status="complete",
            tokens=FINISHED,
            before=Counts(status="complete", tokens=FINISHED, before=COMPLETE),
        ),
    )
    yield Case(
        "it waits for 100 before it sends the body, and sends it without having waited",
        lambda: [
            Scripts([(Read(), Send(SIZED.wire))], client)
            for client in (
                (Send(EXPECTING), Seen(), Send(QUESTION), Read()),
                (Send(EXPECTING + QUESTION), Read()),
            )
        ],
        Same(),
        COMPLETE,
        reaches=Reaches.WHOLE,
    )
    yield Case(
        "it waits for 100, and the answer comes instead",
        once(Send(FAILURE), client=(Send(EXPECTING), Read(), Close())),
        Same(),
        Counts(529, "error"),
        reaches=Reaches.PART,
    )
    yield Case(
        "it waits for 100, and leaves",
        once(Read(), client=(Send(EXPECTING), Seen(), Close())),
        Left(),
        LEFT,
        reaches=Reaches.PART,
    )


CASES: Mapping[str, tuple[Case, ...]] = {
    "LiteLLM gives no answer": tuple(no_answer()),
    "LiteLLM breaks off": tuple(broken_off()),
    "LiteLLM takes its time": tuple(in_time()),
    "LiteLLM's framing is wrong": tuple(badly_framed()),
    "LiteLLM's head is odd, or wrong": tuple(heads()),
    "The answer's content is odd, or wrong": tuple(contents()),
    "The answer's coding is odd, or wrong": tuple(codings()),
    "The client": tuple(clients()),
}
"""All rows, by chapter."""
