"""The framing of event streams."""

from __future__ import annotations

import random

import pytest

from sidecar.observe.sse import MAX_EVENT_BYTES, TAIL_BYTES, Event, EventFinder
from tests.support.bodies import cuts


def found(chunks: list[bytes], needles: tuple[bytes, ...] = (b"usage",)) -> list[Event]:
    finder = EventFinder(needles)
    events = [event for chunk in chunks for event in finder.feed(chunk)]
    return events + list(finder.finish())


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"event: a\ndata: usage\n\n", id="lf"),
        pytest.param(b"event: a\r\ndata: usage\r\n\r\n", id="crlf"),
        pytest.param(b"event: a\rdata: usage\r\r", id="cr"),
        pytest.param(b"event: a\r\ndata: usage\n\r\n", id="mixed"),
        pytest.param(b"\xef\xbb\xbfevent: a\ndata: usage\n\n", id="byte order mark"),
        pytest.param(b"event:a\ndata:usage\n\n", id="no space after the colon"),
        pytest.param(b": ping\n\n: usage?\nevent: a\ndata: usage\nid: 1\nretry: 5\n\n", id="rest"),
        pytest.param(b"\n\n\nevent: a\ndata: usage\n\n\n\n", id="extra blank lines"),
        pytest.param(b"data: x\n\nevent: b\nevent: a\ndata: usage\n\ndata: y\n\n", id="neighbours"),
    ],
)
def test_legal_spellings_give_the_same_event(body: bytes) -> None:
    """Every spelling that the standard allows gives the same event, however it is cut."""
    expected = [Event(b"a", b"usage")]
    assert found([body]) == expected
    for i in range(len(body)):
        assert found([body[:i], body[i:]]) == expected
    for chunks in cuts(body, seed=1):
        assert found(chunks) == expected


def test_data_lines_are_joined() -> None:
    """Several data lines are one value with line feeds between."""
    assert found([b'data: {"usage":\ndata: 1}\n\n']) == [Event(b"", b'{"usage":\n1}')]


def test_events_without_a_needle_are_not_parsed() -> None:
    """Only events that hold a needle come out, in their order."""
    body = b"data: 1 usage\n\ndata: 2\n\ndata: 3 error\n\ndata: 4 usage error\n\n"
    data = [event.data for event in found([body], (b"usage", b"error"))]
    assert data == [b"1 usage", b"3 error", b"4 usage error"]


@pytest.mark.parametrize("last", [b"data: end\n\n", b"data: end", b"data: end usage\n\n"])
@pytest.mark.parametrize("before", [0, 100, TAIL_BYTES - 20, TAIL_BYTES, 5 * TAIL_BYTES])
def test_needles_of_the_end_are_looked_for_there_alone(last: bytes, before: int) -> None:
    """Events with a needle of the end come out once, at the end, and only from its last bytes."""
    filler = b"data: end early\n\n" + b"data: xxxxxx\n\n" * (before // 14)
    body = b"\xef\xbb\xbfdata: usage 1\n\n" + filler + last

    def run(chunks: list[bytes]) -> list[Event]:
        finder = EventFinder((b"usage",), (b"end", b"never"))
        events = [event for chunk in chunks for event in finder.feed(chunk)]
        return events + list(finder.finish())

    events = run([body])
    # An event's beginning is known by the blank line before it.
    early = [b"end early"] if len(b"\n\n" + filler + last) <= TAIL_BYTES else []
    terminated = last.endswith(b"\n\n")
    closing = Event(b"", last.strip()[6:], terminated)
    in_order = [Event(b"", b"usage 1"), *(Event(b"", data) for data in early)]
    in_order.insert(1 if b"usage" in last else len(in_order), closing)
    assert events == in_order
    for chunks in cuts(body, seed=before):
        assert run(chunks) == events


def test_a_long_stream_of_whole_events_ends_as_it_ends() -> None:
    """However many chunks of one event each came before, the end is found in the last bytes."""
    finder = EventFinder((b"usage",), (b"end",))
    assert not finder.feed(b"data: first\n\n")
    for _ in range(10 * TAIL_BYTES // 16):
        assert not finder.feed(b"data: xxxxxxxx\n\n")
    assert not finder.feed(b"data: end\n\n")
    assert finder.finish() == [Event(b"", b"end")]


def test_last_event_without_blank_line_is_marked() -> None:
    """What stands after the last blank line comes out as not terminated."""
    assert found([b"data: usage\n"]) == [Event(b"", b"usage", terminated=False)]


def test_torn_frame_is_marked() -> None:
    """A line that is no field, as the second half of a torn one, is noted."""
    (event,) = found([b'ta: {"usage":1}\n\n'])
    assert event.stray
    assert event.data == b""


@pytest.mark.parametrize("comment", [b': "usage"', b':"usage"', b': {"usage":{}}', b": a\n:usage"])
def test_comment_is_not_torn(comment: bytes) -> None:
    """A comment may say anything (WHATWG, section 9.2.6), and is no part of a frame."""
    assert found([comment + b"\n\n"]) == []
    assert found([comment + b"\ndata: usage\n\n"]) == [Event(b"", b"usage")]


def test_oversized_event_is_skipped_and_reading_goes_on() -> None:
    """An event over the bound is noted if it held a needle; what follows is read."""
    big = b"data: " + b"x" * MAX_EVENT_BYTES + b"usage\n\n"
    for chunks in ([big + b"data: usage\n\n"], [big[:70000], big[70000:], b"data: usage\n\n"]):
        finder = EventFinder((b"usage",))
        events = [event for chunk in chunks for event in finder.feed(chunk)]
        assert [event.data for event in events] == [b"usage"]
        assert finder.oversized


def test_oversized_end_does_not_matter() -> None:
    """What only tells how a stream ended is no count that was missed, by however much it is
    too long."""
    for extra in range(1, 10):
        finder = EventFinder((b"usage",), (b"stop",))
        finder.feed(b"data: stop" + b"x" * (MAX_EVENT_BYTES - 10 + extra))
        assert (list(finder.finish()), finder.oversized) == ([], False)


def test_oversized_event_without_needle_does_not_matter() -> None:
    """An event over the bound that cannot be of interest is not noted."""
    finder = EventFinder((b"usage",))
    for _ in range(200):
        assert not list(finder.feed(b"x" * 65536))
    assert [e.data for e in finder.feed(b"\n\ndata: usage\n\n")] == [b"usage"]
    assert not finder.oversized


@pytest.mark.parametrize("extra", [0, 1])
def test_the_bound_is_the_same_for_every_cut(extra: int) -> None:
    """Whether an event is over the bound depends on its bytes, not on how they came."""
    body = b"data: usage" + b"x" * (MAX_EVENT_BYTES - 11 + extra) + b"\n\n"
    for chunks in ([body], [body[:1], body[1:]], [body[:-1], body[-1:]], [body[:-2], body[-2:]]):
        finder = EventFinder((b"usage",))
        events = [event for chunk in chunks for event in finder.feed(chunk)]
        assert (len(events), finder.oversized) == ((0, True) if extra else (1, False))


def test_many_hits_in_one_chunk_take_linear_time() -> None:
    """A chunk full of needles is gone through once, not once for each."""
    finder = EventFinder((b"usage", b"absent", b"never"))
    body = b"data: usage\n\n" * 200_000
    assert len(finder.feed(b"\n\n" + body)) == 200_000


def test_random_streams_are_read_alike_in_every_cut() -> None:
    """Random line ends, fields and needles give the same events, whole and in pieces."""
    dice = random.Random(7)
    pieces = [
        b"data: ",
        b"data:",
        b"event: a",
        b"usage",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b":",
        b"x",
    ]
    for round_ in range(300):
        body = b"".join(dice.choices(pieces, k=40))
        expected = found([body])
        for chunks in cuts(body, seed=round_):
            assert found(chunks) == expected, body
