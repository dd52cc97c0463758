"""What is read out of Anthropic's answers."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from sidecar.exchange import End, Outcome, Remarks, RequestFacts, Status, Usage
from sidecar.observe import anthropic
from sidecar.observe.tap import outcome_of
from tests.support.bodies import JSON, SSE, event, message, observe, stream


def usage(**counts: int | None) -> dict[str, int | None]:
    """Write a usage with the short names of its input side."""
    names = {
        "new": "input_tokens",
        "out": "output_tokens",
        "read": "cache_read_input_tokens",
        "write": "cache_creation_input_tokens",
    }
    return {names[name]: count for name, count in counts.items()}


SPLIT = {"cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 20}}


def test_json_usage_is_read_as_it_stands() -> None:
    """The counts of a JSON answer come out under the wire's own names."""
    seen = observe(message(usage(new=7, out=16, read=2101, write=120) | SPLIT), JSON)
    assert seen.status is Status.COMPLETE
    assert seen.usage == Usage(7, 16, 2101, 120, 100, 20)
    assert seen.usage.input_classes() == (7, 2101, 100, 20, 0)
    assert seen.response_model == "claude-sonnet-4-5-20250929"
    assert seen.message_id == "msg_01XFDUDYJgAACzvnptvVoYEL"


@pytest.mark.parametrize(
    ("start", "deltas", "stop", "expected"),
    [
        pytest.param(
            usage(new=7, out=1, read=2101, write=0),
            [usage(out=16)],
            None,
            Usage(7, 16, 2101, 0),
            id="classic: input in the start, output in the delta",
        ),
        pytest.param(
            usage(new=0, out=0),
            [usage(new=7, out=16, read=5, write=3)],
            None,
            Usage(7, 16, 5, 3),
            id="zeros in the start, truth in the delta",
        ),
        pytest.param(
            usage(new=60385, out=1, read=55096, write=0),
            [usage(new=612, out=400, read=0, write=0)],
            None,
            Usage(612, 400, 0, 0),
            id="compaction lowers what the start said",
        ),
        pytest.param(
            usage(new=7, out=1, read=2101, write=30),
            [usage(new=0, out=16, read=0, write=0)],
            None,
            Usage(7, 16, 2101, 30),
            id="an all-zero delta does not undo the start",
        ),
        pytest.param(
            usage(new=7, out=1, read=2101, write=30),
            [usage(out=16)],
            usage(new=0, out=16),
            Usage(7, 16, 2101, 30),
            id="an all-zero stop does not undo the start",
        ),
        pytest.param(
            usage(new=7, out=1, read=2101, write=None),
            [usage(new=None, out=5, read=None), usage(out=16)],
            None,
            Usage(7, 16, 2101, None),
            id="null replaces nothing, and deltas are cumulative",
        ),
        pytest.param(
            usage(new=2399, out=1, read=0, write=120) | SPLIT,
            [usage(new=23258, out=9, read=4, write=500)],
            None,
            Usage(23258, 9, 4, 500, 100, 20),
            id="the delta has no split: the start's is kept",
        ),
        pytest.param(
            usage(new=7, out=0),
            [usage(out=16)],
            usage(new=7, out=16, read=0, write=120) | SPLIT,
            Usage(7, 16, 0, 120, 100, 20),
            id="the stop alone has the cache fields (LiteLLM's fake stream)",
        ),
        pytest.param(
            usage(new=7, out=1, read=9, write=0),
            [usage(out=16)],
            {"inputTokens": 7, "cacheReadInputTokenCount": 9, "cacheWriteInputTokenCount": 2},
            Usage(7, 16, 9, 2),
            id="Bedrock's spellings in the stop",
        ),
        pytest.param(usage(new=7, out=2), [], {}, Usage(7, 2), id="an empty usage says nothing"),
    ],
)
def test_stream_usage_merges_field_by_field(
    start: Any, deltas: list[Any], stop: Any, expected: Usage
) -> None:
    """A later value that is not null replaces the earlier one; nothing is added up."""
    seen = observe(stream(start, *deltas, stop=stop))
    assert (seen.status, seen.usage) == (Status.COMPLETE, expected)


@pytest.mark.parametrize(
    ("counts", "classes"),
    [
        pytest.param(
            usage(new=1, read=2, write=150) | SPLIT, (1, 2, 100, 20, 30), id="partly split"
        ),
        pytest.param(usage(new=1, read=2, write=150), (1, 2, 0, 0, 150), id="not split"),
        pytest.param(usage(new=1, read=2) | SPLIT, (1, 2, 100, 20, 0), id="split without total"),
        pytest.param(
            usage(new=1, read=2, write=150) | {"cache_creation": {"ephemeral_1h_input_tokens": 20}},
            (1, 2, 0, 20, 130),
            id="half of a split",
        ),
        pytest.param(
            usage(new=1, read=2, write=110) | SPLIT, (1, 2, 100, 10, 0), id="split beyond total"
        ),
    ],
)
def test_written_tokens_split_by_ttl(counts: Any, classes: tuple[int, ...]) -> None:
    """The total wins over its split, and the rest is of unknown TTL."""
    assert observe(message(counts), JSON).usage.input_classes() == classes


def test_split_beyond_its_total_is_invalid() -> None:
    """A split larger than its total is clamped, and said to be invalid."""
    seen = observe(message(usage(new=1, write=110) | SPLIT), JSON)
    assert seen.status is Status.INVALID
    assert seen.usage.ephemeral_1h_input_tokens == 20


@pytest.mark.parametrize(
    "value",
    [True, -1, 1.5, "7", [7], {"a": 7}, 2**53 + 1, 2**64, float("nan"), float("inf"), 1e400],
    ids=repr,
)
def test_what_is_no_count_is_invalid(value: Any) -> None:
    """Anything but a whole number from 0 to 2^53 is a fault of its field alone."""
    counts = {"input_tokens": 7, "cache_read_input_tokens": value, "output_tokens": 3}
    for seen in (observe(message(counts), JSON), observe(stream(counts, usage(out=3)))):
        assert seen.status is Status.INVALID
        assert seen.usage == Usage(input_tokens=7, output_tokens=3)


@pytest.mark.parametrize(("value", "count"), [(7.0, 7), (2**53, 2**53), (0, 0)])
def test_whole_numbers_are_counts(value: float, count: int) -> None:
    """A float that is a whole number is a count."""
    seen = observe(message({"input_tokens": value}), JSON)
    assert (seen.status, seen.usage.input_tokens) == (Status.COMPLETE, count)


@pytest.mark.parametrize("odd", ["text", 7, [1], True])
def test_usage_that_is_no_object_is_invalid(odd: Any) -> None:
    """A usage of another JSON type is a fault, not a crash."""
    assert observe(message(odd), JSON).status is Status.INVALID
    assert observe(stream(odd)).status is Status.INVALID
    assert observe(message({"input_tokens": 1, "cache_creation": odd}), JSON).status is (
        Status.INVALID
    )


@pytest.mark.parametrize("absent", [None, {}, {"cost": 0.1, "server_tool_use": None}])
def test_answer_without_counts_is_missing(absent: Any) -> None:
    """An answer whose usage says nothing is missing, in JSON and in streams."""
    assert observe(message(absent), JSON).status is Status.MISSING
    assert observe(stream(absent, absent)).status is Status.MISSING


def test_usage_in_content_is_not_matched() -> None:
    """A model that prints a usage, or a tool that is given one, changes nothing."""
    trap = '{"usage":{"input_tokens":999},"message_stop":1,"error":{}}'
    body = stream(usage(new=7, out=1), usage(out=2), text=[trap, '"usage"', "message_stop"])
    seen = observe(body)
    assert (seen.status, seen.usage) == (Status.COMPLETE, Usage(7, 2))
    tool = event("content_block_start", {"content_block": {"input": {"usage": {"error": 9}}}})
    seen = observe(
        tool.join([body[: body.index(b"event: content")], stream({})[0:0] + body[-200:]])
    )
    assert seen.usage.input_tokens == 7


def test_duplicate_members_last_wins() -> None:
    """Of members that come twice the last is taken, as JSON parsers do."""
    body = b'{"type":"message","usage":{"input_tokens":1},"usage":{"input_tokens":2}}'
    assert observe(body, JSON).usage.input_tokens == 2


def test_lone_surrogates_and_byte_order_mark_are_read() -> None:
    """Text cut inside an emoji, NaN in a member that is skipped, and a BOM do no harm."""
    body = b'\xef\xbb\xbf{"content":"\\ud83d","x":NaN,"y":"\xff","usage":{"input_tokens":2}}'
    seen = observe(body, JSON)
    assert (seen.status, seen.usage.input_tokens) == (Status.COMPLETE, 2)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"type":"error","error":{"type":"api_error"}}', Status.ERROR, id="error"),
        # LiteLLM 1.83.10 answers 200 with this when a JSON answer of the provider breaks off.
        pytest.param(b'{"error":{"message":"x","code":"200"}}', Status.ERROR, id="LiteLLM's error"),
        pytest.param(b"", Status.MISSING, id="empty"),
        pytest.param(b"  \n", Status.MISSING, id="blank"),
        pytest.param(b"[1]", Status.INVALID, id="array"),
        pytest.param(b"<html>", Status.INVALID, id="not JSON"),
        pytest.param(b'{"usage":{"input_tokens":1}', Status.INVALID, id="unfinished"),
        pytest.param(b"[" * 100_000, Status.INVALID, id="deep"),
        pytest.param(b'{"a":' * 100_000, Status.INVALID, id="deep objects"),
    ],
)
def test_other_json_bodies(body: bytes, status: Status) -> None:
    """Bodies that are no message are named for what they are."""
    seen = observe(body, JSON)
    assert (seen.status, seen.usage) == (status, Usage())


def test_json_cut_by_the_upstream_is_partial() -> None:
    """A JSON body that broke off is partial, and nothing of it is counted."""
    seen = observe(message(usage(new=7))[:-9], JSON, end=End.UPSTREAM_CUT)
    assert (seen.status, seen.usage) == (Status.PARTIAL, Usage())


START = event("message_start", {"message": {"usage": {"input_tokens": 7, "output_tokens": 1}}})
DELTA = event("message_delta", {"usage": {"output_tokens": 9}})
STOP = event("message_stop", {})
ERROR = event("error", {"error": {"type": "overloaded_error", "message": "Overloaded"}})


@pytest.mark.parametrize(
    ("body", "end", "status", "counts"),
    [
        pytest.param(START, End.UPSTREAM_CUT, Status.PARTIAL, Usage(7, 1), id="cut after start"),
        pytest.param(START, End.CLIENT_LEFT, Status.PARTIAL, Usage(7, 1), id="client left"),
        pytest.param(
            START + DELTA, End.COMPLETE, Status.PARTIAL, Usage(7, 9), id="no stop, clean end"
        ),
        pytest.param(
            START + DELTA + STOP,
            End.CLIENT_LEFT,
            Status.COMPLETE,
            Usage(7, 9),
            id="left after stop",
        ),
        pytest.param(START + ERROR, End.COMPLETE, Status.PARTIAL, Usage(7, 1), id="error event"),
        pytest.param(
            START + ERROR + STOP, End.COMPLETE, Status.PARTIAL, Usage(7, 1), id="error, then stop"
        ),
        pytest.param(ERROR, End.COMPLETE, Status.ERROR, Usage(), id="error first"),
        pytest.param(
            b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n',
            End.COMPLETE,
            Status.ERROR,
            Usage(),
            id="LiteLLM's error frame",
        ),
        pytest.param(
            START + b'data: {"error": {"message": "x"}}\n\n',
            End.COMPLETE,
            Status.PARTIAL,
            Usage(7, 1),
            id="LiteLLM's error frame after the start",
        ),
        pytest.param(
            START + START + DELTA + STOP, End.COMPLETE, Status.INVALID, Usage(7, 9), id="two starts"
        ),
        pytest.param(DELTA + STOP, End.COMPLETE, Status.INVALID, Usage(None, 9), id="no start"),
        pytest.param(b"", End.COMPLETE, Status.MISSING, Usage(), id="empty"),
        pytest.param(b"", End.UPSTREAM_CUT, Status.PARTIAL, Usage(), id="empty and cut"),
        pytest.param(
            event("ping", {}) + STOP, End.UPSTREAM_CUT, Status.MISSING, Usage(), id="stop alone"
        ),
        pytest.param(
            START + DELTA + STOP[:-1], End.COMPLETE, Status.PARTIAL, Usage(7, 9), id="unfinished"
        ),
        pytest.param(
            START + DELTA[:-9], End.UPSTREAM_CUT, Status.PARTIAL, Usage(7, 1), id="torn at the end"
        ),
        pytest.param(
            START + b'event: message_delta\ndata: {"usage":\n\n' + STOP,
            End.COMPLETE,
            Status.INVALID,
            Usage(7, 1),
            id="unreadable event",
        ),
        pytest.param(
            START + DELTA.replace(b"data", b"event: ping\ndata: {}\n\nta", 1) + STOP,
            End.COMPLETE,
            Status.INVALID,
            Usage(7, 1),
            id="frame torn by a ping",
        ),
        pytest.param(
            b'data: {"type":"message","id":"m","usage":{"input_tokens":0,"output_tokens":0}}\n\n',
            End.COMPLETE,
            Status.COMPLETE,
            Usage(0, 0),
            id="LiteLLM's guardrail frame",
        ),
        pytest.param(
            START + b'event: error\ndata: "error": broken\n\n' + DELTA + STOP,
            End.COMPLETE,
            Status.PARTIAL,
            Usage(7, 9),
            id="an error event that is no JSON",
        ),
        pytest.param(
            START + b"event: message_stop\n\n" + DELTA + STOP,
            End.COMPLETE,
            Status.COMPLETE,
            Usage(7, 9),
            id="an event without data",
        ),
        pytest.param(
            START
            + b'data: {"type":"content_block_start","error":null,"usage":{"output_tokens":5}}\n\n'
            + STOP.replace(b"}", b',"usage":{}}'),
            End.COMPLETE,
            Status.COMPLETE,
            Usage(7, 1),
            id="a usage in an event of another kind",
        ),
        pytest.param(
            event("message_start", {"message": "usage", "usage": {"input_tokens": 9}}) + STOP,
            End.COMPLETE,
            Status.INVALID,
            Usage(),
            id="a message that is no object",
        ),
        pytest.param(
            event("message_start", {"message": None, "usage": {}}) + DELTA + STOP,
            End.COMPLETE,
            Status.COMPLETE,
            Usage(None, 9),
            id="a start without a message",
        ),
        pytest.param(
            START + event("message_delta", {"usage": {"output_tokens": "x" * (1 << 20)}}) + STOP,
            End.COMPLETE,
            Status.OVERSIZED,
            Usage(7, 1),
            id="an event over the bound",
        ),
        pytest.param(
            START + b'event: odd\ndata: "message_stop"\n\n' + DELTA + STOP,
            End.COMPLETE,
            Status.INVALID,
            Usage(7, 9),
            id="an event that is no object",
        ),
    ],
)
def test_streams_that_end_in_other_ways(
    body: bytes, end: End, status: Status, counts: Usage
) -> None:
    """Each way in which a stream can go wrong has its status, and keeps what was said."""
    seen = observe(body, end=end)
    assert (seen.status, seen.usage) == (status, counts)


def test_stream_that_is_cut_anywhere_is_not_invalid() -> None:
    """The beginning of a stream contradicts nothing, wherever it ends."""
    body = stream(usage(new=7, out=1), usage(out=9))
    for at in range(len(body)):
        for end in (End.UPSTREAM_CUT, End.CLIENT_LEFT):
            assert observe(body[:at], end=end).status is Status.PARTIAL
        assert observe(body[:at]).status in (Status.PARTIAL, Status.MISSING)


@pytest.mark.parametrize("ping", [event("ping", {}), b": ping\n\n"], ids=["event", "comment"])
def test_torn_frame_is_noticed(ping: bytes) -> None:
    """LiteLLM 1.100 may send a ping in the middle of a frame. Wherever that is, no stream is
    called complete of which a count is missing."""
    body = START + DELTA + STOP
    for at in range(len(body) + 1):
        seen = observe(body[:at] + ping + body[at:])
        assert seen.status is not Status.COMPLETE or seen.usage == Usage(7, 9), at


@pytest.mark.parametrize(
    "comment", [b': keep-alive "usage"', b':"usage"', b': {"type":"message_stop","usage":{}}']
)
def test_comment_changes_nothing(comment: bytes) -> None:
    """A comment may say anything, on its own or within an event."""
    body = START + DELTA + STOP
    plain = observe(body)
    assert plain.status is Status.COMPLETE
    for at in [at for at in range(len(body)) if at == 0 or body[at - 1 : at] == b"\n"]:
        assert observe(body[:at] + comment + b"\n" + body[at:]) == plain, at
    for at in [0, *(m.end() for m in re.finditer(b"\n\n", body))]:
        assert observe(body[:at] + comment + b"\n\n" + body[at:]) == plain, at


def test_first_usage_over_the_bound() -> None:
    """What is missing with it does not make the stream another fault's."""
    start = event(
        "message_start", {"message": {"usage": {"input_tokens": 7}, "x": "x" * (1 << 20)}}
    )
    seen = observe(start + DELTA + STOP)
    assert (seen.status, seen.usage) == (Status.OVERSIZED, Usage(None, 9))


def test_event_type_without_event_line() -> None:
    """The type in the data does where there is no event line."""
    body = stream(usage(new=7, out=1), usage(out=9))
    bare = b"\n".join(line for line in body.split(b"\n") if not line.startswith(b"event:"))
    assert observe(bare) == observe(body)


@pytest.mark.parametrize(
    ("counts", "asked", "outcome"),
    [
        pytest.param(usage(new=1, read=5, write=9), True, Outcome.HIT, id="read and write"),
        pytest.param(usage(new=1, read=5), None, Outcome.HIT, id="read"),
        pytest.param(usage(new=1, read=0, write=9), False, Outcome.WRITE, id="write"),
        pytest.param({"input_tokens": 1} | SPLIT, True, Outcome.WRITE, id="write, split alone"),
        pytest.param(usage(new=1, read=0, write=0), True, Outcome.NOT_CACHED, id="asked"),
        pytest.param(usage(new=1, read=0, write=0), False, Outcome.NOT_ASKED, id="not asked"),
        pytest.param(usage(new=1, read=0), False, Outcome.NOT_CACHED, id="asked by nobody"),
        pytest.param(usage(new=1, read=0), None, Outcome.UNKNOWN, id="unreadable request"),
        pytest.param(usage(new=1), True, Outcome.UNREPORTED, id="no cache field"),
        pytest.param(usage(new=1, read=None, write=None), True, Outcome.UNREPORTED, id="null"),
    ],
)
def test_outcome_by_precedence(counts: Any, asked: bool | None, outcome: Outcome) -> None:
    """Reading beats writing, an absent field is no miss."""
    assert outcome_of(observe(message(counts), JSON), RequestFacts(caching_asked=asked)) is outcome


_VALUES: tuple[object, ...] = (
    0,
    1,
    7,
    2101,
    2**53,
    None,
    None,
    None,
    -1,
    2**53 + 1,
    5.0,
    1.5,
    True,
    "7",
    [],
    {},
)
_NAMES = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "cacheReadInputTokens",
    "cacheReadInputTokenCount",
    "cacheWriteInputTokens",
    "cacheWriteInputTokenCount",
)


def _any_usage(dice: random.Random) -> object:
    """Make a usage, mostly of counts."""
    values = _VALUES[: dice.choice((8, 8, 8, len(_VALUES)))]
    if dice.random() < 0.05:
        return dice.choice(_VALUES)
    made: dict[str, object] = {
        name: dice.choice(values) for name in dice.sample(_NAMES, dice.randint(0, 6))
    }
    if dice.random() < 0.5:
        names = dice.sample(list(SPLIT["cache_creation"]), dice.randint(0, 2))
        made["cache_creation"] = dice.choice(
            [{name: dice.choice(values) for name in names}] * 9 + [dice.choice(_VALUES)]
        )
    return made


def test_the_fast_decoder_reads_what_the_patient_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two reads a body, the same is counted, and the same is found wrong."""
    dice = random.Random(1)
    bodies: list[tuple[bytes, Any]] = []
    for _ in range(3000):
        names = {} if dice.random() < 0.9 else {dice.choice(("id", "type", "model", "error")): 1}
        bodies.append((message(_any_usage(dice), **names), JSON))
        usages = [_any_usage(dice) for _ in range(dice.randint(0, 3))]
        bodies.append((stream(_any_usage(dice), *usages, stop=_any_usage(dice)), SSE))
    fast = [observe(body, headers) for body, headers in bodies]
    assert {seen.status for seen in fast} >= {Status.COMPLETE, Status.MISSING, Status.INVALID}
    monkeypatch.setattr(anthropic, "_read_plain", lambda _: None)
    for (body, headers), seen in zip(bodies, fast, strict=True):
        assert observe(body, headers) == seen, body


def _remarks(usage: Any, **members: Any) -> Remarks:
    """Read the remarks of an answer, as JSON and in a stream."""
    whole = observe(message(usage, **members), JSON).remarks
    start = {"id": "msg_1", "usage": {"input_tokens": 1, "output_tokens": 1}}
    if "diagnostics" in members:
        start["diagnostics"] = members["diagnostics"]
    delta = {"delta": {"stop_reason": members.get("stop_reason")}, "usage": usage}
    body = event("message_start", {"message": start})
    body += event("message_delta", delta) + event("message_stop", {})
    assert observe(body).remarks == whole
    return whole


@pytest.mark.parametrize(
    ("usage", "members", "remarks"),
    [
        ({}, {}, Remarks()),
        ({}, {"stop_reason": "end_turn"}, Remarks("end_turn")),
        ({}, {"stop_reason": 7}, Remarks()),
        ({}, {"diagnostics": None}, Remarks()),
        ({}, {"diagnostics": {"cache_miss_reason": None}}, Remarks()),
        ({}, {"diagnostics": "odd"}, Remarks()),
        (
            {},
            {"diagnostics": {"cache_miss_reason": "unavailable"}},
            Remarks(None, "unavailable"),
        ),
        (
            {},
            {"diagnostics": {"cache_miss_reason": {"type": "tools_changed"}}},
            Remarks(None, "tools_changed"),
        ),
        ({"server_tool_use": {"web_search_requests": 1}}, {}, Remarks()),
        ({"server_tool_use": {"web_fetch_requests": 2}}, {}, Remarks(None, None, 2)),
        ({"server_tool_use": {"web_fetch_requests": "2"}}, {}, Remarks()),
        ({"server_tool_use": {"web_fetch_requests": 2.0}}, {}, Remarks(None, None, 2)),
        ({"iterations": []}, {}, Remarks()),
        ({"iterations": "odd"}, {}, Remarks()),
        (
            {"iterations": [{"type": "compaction", "input_tokens": 9}, {"type": "message"}]},
            {},
            Remarks(None, None, None, ("compaction", "message")),
        ),
        (
            {"iterations": [{"type": "compaction"}, {"type": 7}, "odd"]},
            {},
            Remarks(None, None, None, ("compaction",)),
        ),
    ],
)
def test_remarks(usage: Any, members: Any, remarks: Remarks) -> None:
    """What an answer says beside its tokens is read; what is odd is left out."""
    assert _remarks({"input_tokens": 7, "output_tokens": 16} | usage, **members) == remarks


def test_odd_start_with_diagnostics() -> None:
    """What the fast decoder refuses is read by the patient one."""
    start = {"id": 7, "diagnostics": {"cache_miss_reason": {"type": "model_changed"}}}
    body = event("message_start", {"message": start | {"usage": {"input_tokens": 1}}})
    assert observe(body).remarks == Remarks(None, "model_changed")


@pytest.mark.parametrize(
    ("ids", "status"),
    [
        (("msg_1", "msg_1"), Status.COMPLETE),
        (("msg_1", "msg_2"), Status.INVALID),
        ((None, None), Status.INVALID),
        (("msg_1", None), Status.INVALID),
    ],
)
def test_start_that_comes_twice(ids: tuple[Any, Any], status: Status) -> None:
    """One message may be begun twice, as LiteLLM 1.83 does; two are a mixture."""
    body = b"".join(
        event("message_start", {"message": {"id": each, "usage": {"input_tokens": 7}}})
        for each in ids
    )
    body += event("message_delta", {"usage": {"output_tokens": 16}}) + event("message_stop", {})
    assert observe(body).status is status
