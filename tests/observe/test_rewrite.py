"""What is put into the usage of Anthropic's answers, where, and when bytes go out."""

from __future__ import annotations

import itertools
import json
import random
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sidecar.exchange import Dialect, RequestFacts, Rewrite, Transformer, Usage
from sidecar.observe.rewrite import Rewriter, transformer_for
from sidecar.observe.sse import MAX_EVENT_BYTES
from sidecar.observe.tap import MAX_JSON_BYTES
from tests.support.bodies import (
    ADDED,
    JSON,
    SSE,
    cuts,
    damaged,
    event,
    message,
    observe,
    stream,
    without_additions,
)
from tests.support.requirements import require_corpus

COUNTS = {"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": 2101}
WRITTEN = COUNTS | {"cache_creation_input_tokens": 30}
DETAILS = b'"prompt_tokens_details":{"cached_tokens":2101}'


def made(headers: Sequence[tuple[bytes, bytes]], *, full: bool = False) -> Transformer:
    transformer = transformer_for(headers, full=full)
    assert not isinstance(transformer, Rewrite)
    return transformer


def rewritten(
    chunks: Sequence[bytes] | bytes,
    headers: Sequence[tuple[bytes, bytes]] = SSE,
    *,
    full: bool = False,
) -> tuple[bytes, Rewrite]:
    """Rewrite an answer."""
    transformer = made(headers, full=full)
    pieces = [
        transformer.feed(chunk) for chunk in ([chunks] if isinstance(chunks, bytes) else chunks)
    ]
    return b"".join([*pieces, transformer.finish()]), transformer.result


def usages(body: bytes, *, sse: bool = True) -> Iterator[dict[str, Any]]:
    """Read the usages of an answer as a plain client does."""
    if not sse:
        texts = [body.decode("utf-8-sig", "replace")]
    else:
        blocks = re.split("\n\n+", re.sub("\r\n?", "\n", body.decode("utf-8-sig", "replace")))
        datas = [re.findall(r"(?m)^data: ?(.*)$", block) for block in blocks]
        texts = ["\n".join(data) for data in datas if data]
    for text in texts:
        if text.strip() == "[DONE]":
            continue
        decoded = json.loads(text)
        holder = decoded["message"] if decoded.get("type") == "message_start" else decoded
        usage = holder.get("usage")
        if isinstance(usage, dict):
            yield usage


# What is added


@pytest.mark.parametrize(
    ("counts", "full", "expected"),
    [
        pytest.param(COUNTS, False, {"prompt_tokens_details": {"cached_tokens": 2101}}, id="read"),
        pytest.param(
            WRITTEN,
            False,
            {"prompt_tokens_details": {"cached_tokens": 2101, "cache_creation_tokens": 30}},
            id="read and written",
        ),
        pytest.param(
            {"input_tokens": 7, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0},
            False,
            {"prompt_tokens_details": {"cached_tokens": 0}},
            id="zero is an answer",
        ),
        pytest.param(
            {"cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 5}},
            False,
            {"prompt_tokens_details": {"cached_tokens": 0, "cache_creation_tokens": 9}},
            id="the split alone",
        ),
        pytest.param(
            {"cacheReadInputTokenCount": 3},
            False,
            {"prompt_tokens_details": {"cached_tokens": 3}},
            id="Bedrock's spelling",
        ),
        pytest.param(
            WRITTEN,
            True,
            {
                "prompt_tokens_details": {"cached_tokens": 2101, "cache_creation_tokens": 30},
                "prompt_tokens": 2138,
                "completion_tokens": 1,
            },
            id="full",
        ),
        pytest.param(
            {"input_tokens": 7, "output_tokens": None},
            True,
            {"prompt_tokens": 7},
            id="full, what is known",
        ),
        pytest.param(
            COUNTS | {"prompt_tokens": 5},
            True,
            {"prompt_tokens_details": {"cached_tokens": 2101}, "completion_tokens": 1},
            id="full, one is there",
        ),
    ],
)
def test_members_that_are_added(counts: Any, full: bool, expected: dict[str, Any]) -> None:
    """The counts of the answer under OpenAI's names, in JSON and in streams."""
    for body, headers in ((message(counts), JSON), (stream(counts), SSE)):
        out, result = rewritten(body, headers, full=full)
        assert result is Rewrite.REWRITTEN
        (usage,) = usages(out, sse=headers is SSE)
        assert usage == counts | expected
        assert without_additions(out, body) == body


@pytest.mark.parametrize(
    ("counts", "result"),
    [
        pytest.param({"input_tokens": 7, "output_tokens": 1}, Rewrite.UNREPORTED, id="no cache"),
        pytest.param(
            {"input_tokens": 7, "cache_read_input_tokens": None}, Rewrite.UNREPORTED, id="null"
        ),
        pytest.param({"cache_read_input_tokens": -1}, Rewrite.UNREPORTED, id="no count"),
        pytest.param({}, Rewrite.UNREPORTED, id="empty"),
        pytest.param(
            COUNTS | {"prompt_tokens_details": {"cached_tokens": 1}}, Rewrite.PRESENT, id="there"
        ),
        pytest.param(COUNTS | {"prompt_tokens_details": None}, Rewrite.PRESENT, id="there, null"),
        pytest.param(None, Rewrite.MISSING, id="usage is null"),
        pytest.param("text", Rewrite.UNREADABLE, id="a string"),
        pytest.param([COUNTS], Rewrite.UNREADABLE, id="a list"),
    ],
)
def test_usage_that_is_left_alone(counts: Any, result: Rewrite) -> None:
    """A usage that has the member, or nothing to make it of, passes as it came."""
    for body, headers in ((message(counts), JSON), (stream(counts), SSE)):
        assert rewritten(body, headers) == (body, result)


def test_every_usage_of_a_stream_has_what_is_known_by_then() -> None:
    """Deltas and stops that lack the cache fields get those of the start, by the rule of what is
    counted: an all-zero one undoes nothing, a lower one replaces."""
    body = stream(WRITTEN, {"output_tokens": 9}, {"input_tokens": 0, "output_tokens": 16}, stop={})
    out, result = rewritten(body, full=True)
    assert result is Rewrite.REWRITTEN
    details = {"cached_tokens": 2101, "cache_creation_tokens": 30}
    assert [
        (usage["prompt_tokens_details"], usage["prompt_tokens"], usage["completion_tokens"])
        for usage in usages(out)
    ] == [(details, 2138, 1), (details, 2138, 9), (details, 2138, 16), (details, 2138, 16)]
    assert b'"usage": {"prompt_tokens_details"' in out, "no comma in an empty object"
    assert without_additions(out, body) == body

    lower = {"input_tokens": 3, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 0}
    out, _ = rewritten(stream(WRITTEN, lower))
    assert [usage["prompt_tokens_details"] for usage in usages(out)] == [
        details,
        {"cached_tokens": 5},
    ]


def test_start_without_cache_fields_gets_nothing() -> None:
    """What is first said in the stop (LiteLLM's fake stream) is added from there on."""
    body = stream({"input_tokens": 7, "output_tokens": 0}, {"output_tokens": 16}, stop=COUNTS)
    out, result = rewritten(body)
    assert result is Rewrite.REWRITTEN
    assert ["prompt_tokens_details" in usage for usage in usages(out)] == [False, False, True]


# Where it is added


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(b'{"cache_read_input_tokens":2101%b}', b",", id="bare"),
        pytest.param(b'{ "cache_read_input_tokens" : 2101 %b}', b",", id="spaces"),
        pytest.param(b'{\t"cache_read_input_tokens":\t2101\t%b}', b",", id="tabs"),
        pytest.param(
            b'{"cache_creation":{"x":{"y":[{}]}},"cache_read_input_tokens":2101%b}', b",", id="deep"
        ),
        pytest.param(
            b'{"cache_read_input_tokens":2101,"cache_creation":{"a":0}%b}', b",", id="nested last"
        ),
        pytest.param(
            b'{"cache_read_input_tokens":2101,"s":"}{\\"usage\\":{"%b}', b",", id="braces"
        ),
        pytest.param(b'{"s":"\\\\","cache_read_input_tokens":2101%b}', b",", id="backslash"),
        pytest.param(b'{"cache_re\\u0061d_input_tokens":2101%b}', b",", id="escaped key within"),
        pytest.param(
            b'{"cache_read_input_tokens":1,"cache_read_input_tokens":2101%b}', b",", id="repeat"
        ),
        pytest.param(
            b'{"x":NaN,"s":"\\ud83d","cache_read_input_tokens":2101%b}', b",", id="lenient"
        ),
        pytest.param(b'{"cache_read_input_tokens":2101,"s":"\xff"%b}', b",", id="invalid UTF-8"),
    ],
)
@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b'{"type":"message","usage":%b}', id="last"),
        pytest.param(b'{"usage":%b,"type":"message"}', id="first"),
        pytest.param(b'{"usage":{"a":1},"type":"message","usage":%b}', id="second of two"),
        pytest.param(
            b'{"type":"message","c":[{"usage":{"a":1}},{"input":{"usage":{}}}],"usage" : %b }',
            id="after others",
        ),
        pytest.param(
            b'{"type":"message","c":"\\"usage\\":{}","usage":%b,"t":{"usage":{"b":1}},"d":"usage"}',
            id="before others",
        ),
    ],
)
def test_members_stand_before_the_closing_brace(frame: bytes, before: bytes, after: bytes) -> None:
    """The brace is found by structure, whatever stands in and around the object."""
    source = frame.replace(b"%b", before.replace(b"%b", b""))
    expected = frame.replace(b"%b", before.replace(b"%b", after + DETAILS))
    assert rewritten(source, JSON) == (expected, Rewrite.REWRITTEN)
    for line in (b"data: %b\n\n", b"data:%b   \r\n\r\n", b"data:  %b\r\r", b"data: %b"):
        assert rewritten(line % source) == (line % expected, Rewrite.REWRITTEN)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"usage":{"cache_read_input_tokens":1}', id="unfinished"),
        pytest.param(b'{"usage":{"cache_read_input_tokens":1}}}', id="trailing brace"),
        pytest.param(b'{"usage":{"cache_read_input_tokens":1},}', id="trailing comma"),
        pytest.param(b'[{"usage":{"cache_read_input_tokens":1}}]', id="list"),
        pytest.param(b'{"usage":' * 5000 + b"}", id="too deep"),
        pytest.param(b'{"usage":{"cache_read_input_tokens":1},"usage":7}', id="last is a number"),
        pytest.param(
            b'{"\\u0075sage":{"cache_read_input_tokens":1},"b":{"usage":{}}}', id="escaped key"
        ),
    ],
)
def test_unreadable_usage_passes(body: bytes) -> None:
    """What is no JSON object, or where the place is not clear, passes and is called so."""
    assert rewritten(body, JSON) == (body, Rewrite.UNREADABLE)
    line = b"event: message\ndata: " + body + b"\n\n"
    assert rewritten(line) == (line, Rewrite.UNREADABLE)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"content":[{"usage":{"cache_read_input_tokens":1}}]}', id="in content"),
        pytest.param(b'{"type":"error","error":{},"usage":{"input_tokens":1}}', id="error"),
        pytest.param(b'{"type":"ping","usage":{"cache_read_input_tokens":1}}', id="other type"),
        pytest.param(b'{"type":"x","s":"usage"}', id="a string"),
        pytest.param(b'{"message":{"usage":{"cache_read_input_tokens":1}}}', id="one too deep"),
        pytest.param(b'{"a":1}', id="none"),
        pytest.param(b"", id="empty"),
        pytest.param(b"  ", id="blank"),
    ],
)
def test_what_is_no_usage_of_the_answer_passes(body: bytes) -> None:
    """Only `usage` at the top, or `message.usage` of a message_start, is one."""
    assert rewritten(body, JSON) == (body, Rewrite.MISSING)
    line = b"data: " + body + b"\n\n"
    assert rewritten(line) == (line, Rewrite.MISSING)


def test_type_may_stand_in_the_event_line() -> None:
    """Where the data have no type, the event's name says what they are."""
    source = b'event: message_delta\ndata: {"usage":{"cache_read_input_tokens":2101}}\n\n'
    out, result = rewritten(source)
    assert result is Rewrite.REWRITTEN
    assert out == source.replace(b"2101}", b"2101," + DETAILS + b"}")
    nameless = source.replace(b"message_delta", b"ping").replace(b"\n\n", b"\n\nevent: x\n\n")
    assert rewritten(nameless) == (nameless, Rewrite.MISSING)


def test_byte_order_mark_is_no_part_of_a_field() -> None:
    """A stream, a body and a data value may begin with one."""
    for body, headers in (
        (b"\xef\xbb\xbf" + stream(COUNTS).partition(b"\n")[2], SSE),
        (b"\xef\xbb\xbf" + message(COUNTS), JSON),
        (b"data: \xef\xbb\xbf" + message(COUNTS) + b"\n\n", SSE),
    ):
        for chunks in ([body], *cuts(body, seed=3)):
            out, result = rewritten(chunks, headers)
            assert result is Rewrite.REWRITTEN
            assert without_additions(out, body) == body != out


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'data: {"type":"message","usage":\ndata: {"cache_read_input_tokens":1}}\n\n'),
        pytest.param(b'data: {"type":"message",\ndata: "usage":{"cache_read_input_tokens":1}}\n\n'),
        pytest.param(
            b'data: {"type":"message_start","message":\n'
            b'data: {"type":"message","usage":{"cache_read_input_tokens":1}}\n'
            b"data: }\n\n",
        ),
    ],
    ids=["in the usage", "before it", "a message of its own"],
)
def test_json_over_several_data_lines_passes(body: bytes) -> None:
    """An event whose JSON spans several lines is not rewritten; the next one is."""
    more = stream(COUNTS)
    for chunks in ([body + more], *cuts(body + more, seed=4)):
        out, result = rewritten(chunks)
        assert result is Rewrite.UNREADABLE
        assert out.startswith(body)
        assert out[len(body) :] == rewritten(more)[0]


def test_blank_data_lines_do_not_make_it_several() -> None:
    """`data:` alone adds nothing but white space to a JSON text."""
    body = b"data:\ndata: " + message(COUNTS) + b"\ndata:\n\n"
    out, result = rewritten(body)
    assert (result, without_additions(out, body)) == (Rewrite.REWRITTEN, body)


# When bytes go out


def test_a_line_without_usage_is_never_held() -> None:
    """Whatever has come of such a line is out: also half a line, and half of an event."""
    transformer = made(SSE)
    delta = {"index": 0, "delta": {"type": "text_delta", "text": 'a } "usage" }'}}
    body = event("content_block_delta", delta) + b": ping }\n\nid: 1\ndata: {}\ndata: }\n\n"
    for at in range(len(body)):
        assert transformer.feed(body[at : at + 1]) == body[at : at + 1]


def test_a_line_with_usage_is_held_from_a_brace_to_its_end() -> None:
    """It is out with its line end, before its event ends; until then no more than has to is
    held."""
    transformer = made(SSE)
    head = b'event: message_start\ndata: {"message":{"id":"x","usage":{"input_tokens":7'
    rest = b',"cache_read_input_tokens":2101,"x":{}},"y":1},"type":"message_start"}'
    for at in range(len(head)):
        assert transformer.feed(head[at : at + 1]) == head[at : at + 1]
    brace = rest.index(b"}")
    assert transformer.feed(rest[:brace]) == rest[:brace]
    assert transformer.feed(rest[brace:]) == b""
    assert transformer.held == rest[brace:]
    assert transformer.feed(b"\n") == (rest[brace:] + b"\n").replace(
        b"}}", b"}," + DETAILS + b"}", 1
    )
    assert (transformer.feed(b"\n"), transformer.held) == (b"\n", b"")


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_every_kind_of_line_end(ending: bytes) -> None:
    """LF, CRLF and CR, in any split, give the same; a CR ends its line at once."""
    body = stream(WRITTEN, {"output_tokens": 9}, stop={}).replace(b"\n", ending)
    whole, result = rewritten(body)
    assert result is Rewrite.REWRITTEN
    assert len(list(usages(whole))) == 3
    assert without_additions(whole, body) == body
    for at in range(len(body)):
        assert rewritten([body[:at], body[at:]])[0] == whole
    for chunks in cuts(body, seed=5, rounds=20):
        assert rewritten(chunks)[0] == whole
    transformer = made(SSE)
    first_byte_of_line_end = body.index(ending, body.index(b"data:")) + 1
    assert b"cached_tokens" in transformer.feed(body[:first_byte_of_line_end])
    assert transformer.held == b""


def test_body_goes_out_up_to_a_brace() -> None:
    """A JSON body, too, is held from the first brace behind a `"usage"` on alone."""
    transformer = made(JSON)
    body = message(COUNTS)
    brace = body.index(b"}", body.index(b'"usage":'))
    assert transformer.feed(body[:50]) == body[:50]
    assert transformer.feed(body[50:]) == body[50:brace]
    assert transformer.held == body[brace:]
    assert transformer.finish() == b"," + DETAILS + body[brace:]


def test_chunks_without_usage_are_the_same_objects() -> None:
    """Nothing is copied of what passes."""
    chunk = event("content_block_delta", {"delta": {"text": "x"}})
    transformer = made(SSE)
    assert transformer.feed(chunk) is chunk
    assert transformer.feed(chunk[:-5]) == chunk[:-5]
    assert made(JSON).feed(chunk) is chunk


# Bounds


@pytest.mark.parametrize("extra", [0, 1])
def test_bound_of_a_line_is_the_same_for_every_cut(extra: int) -> None:
    """A line over the bound passes and is called oversized; what follows is rewritten."""
    usage = b'"usage":{"cache_read_input_tokens":2101}}'
    head = b'event: message_delta\ndata: {"x":"'
    line = head + b"x" * (MAX_EVENT_BYTES - len(head) - len(usage) - 2 + extra) + b'",' + usage
    body = line + b"\nid: 3\n\n"
    expected = body if extra else body.replace(b"2101}", b"2101," + DETAILS + b"}")
    more = stream(COUNTS)
    result = Rewrite.OVERSIZED if extra else Rewrite.REWRITTEN
    places = [1, 5000, len(line) - 1, len(line), len(line) + 1, len(body) - 1, len(body)]
    for at in places:
        out = rewritten([body[:at], (body + more)[at:]])
        assert out == (expected + rewritten(more)[0], result)
    tail = [(body + more)[i : i + 1] for i in range(len(line) - 30, len(body + more))]
    assert rewritten([body[: len(line) - 30], *tail]) == out


def test_usage_far_behind_the_bound_is_oversized() -> None:
    """A needle that only comes when the event is being skipped is noticed, in any cut."""
    body = b"data: " + b"x" * (2 * MAX_EVENT_BYTES) + b'"usage":{}}\n\n'
    for at in (1, len(body) - 9, len(body) - 1, len(body)):
        for chunks in ([body[:at], body[at:]], [body[:MAX_EVENT_BYTES], body[MAX_EVENT_BYTES:]]):
            assert rewritten(chunks) == (body, Rewrite.OVERSIZED)


def test_bound_does_not_undo_what_went_before() -> None:
    """A usage that ends within the bound is rewritten, however long its event goes on."""
    head = b'data: {"type":"message","usage":{"cache_read_input_tokens":2101}}\n'
    for rest in (b"id: " + b"x" * MAX_EVENT_BYTES, b"id: x\n" * (MAX_EVENT_BYTES // 6)):
        body = head + rest + b"\n\n"
        for chunks in (
            [body],
            [head, rest, b"\n\n"],
            [body[i : i + 9999] for i in range(0, len(body), 9999)],
        ):
            out, result = rewritten(chunks)
            assert (without_additions(out, body), result) == (body, Rewrite.REWRITTEN)


def test_large_deltas_cost_no_more_than_the_bound() -> None:
    """Of an 8 MB text in one frame no more than the bound is kept, and it is never held."""
    transformer = made(SSE)
    transformer.feed(b"data: ")
    tracemalloc.start()
    piece = b"x" * 65536
    for _ in range(128):
        assert transformer.feed(piece) is piece
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * MAX_EVENT_BYTES
    assert transformer.feed(b"\n\n") + transformer.feed(stream(COUNTS)) == (
        b"\n\n" + rewritten(stream(COUNTS))[0]
    )
    assert transformer.result is Rewrite.REWRITTEN


@pytest.mark.parametrize("extra", [0, 1])
def test_bound_of_a_body(extra: int) -> None:
    """A body over the bound passes, from where it is known to be over; an announced one at
    once."""
    body = message(COUNTS)
    body += b" " * (MAX_JSON_BYTES - len(body) + extra)
    for chunks in ([body], [body[:300], body[300:]], [body[:-1], body[-1:]]):
        out, result = rewritten(chunks, JSON)
        assert (out == body) is bool(extra)
        assert without_additions(out, body) == body
        assert result is (Rewrite.OVERSIZED if extra else Rewrite.REWRITTEN)
    announced = [*JSON, (b"content-length", b"%d" % len(body))]
    assert (transformer_for(announced, full=False) is Rewrite.OVERSIZED) is bool(extra)
    transformer = made(JSON)
    transformer.feed(body)
    transformer.feed(b" ")
    assert (transformer.held, transformer.feed(b"more")) == (b"", b"more")


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param(SSE, b'data: {"usage":{}}\n\n' * 20_000, id="needles"),
        pytest.param(SSE, b'data: "usage"\r\n' * 40_000, id="lines of one event"),
        pytest.param(SSE, b"\r\n" * 200_000, id="blank lines"),
        pytest.param(JSON, b'{"usage":' + b"[" * 400_000, id="brackets"),
        pytest.param(JSON, b'{"a":[' + b"[],{}," * 100_000 + b'1],"usage":{}}', id="dense"),
        pytest.param(JSON, b'{"usage":"' + b"\\" * 400_001, id="backslashes"),
        pytest.param(
            JSON,
            b'{"a":"' + b'","a":"'.join([b"x"] * 100_000 + [b"y" * 400_000]) + b'","usage":{}}',
            id="repeats",
        ),
    ],
)
def test_work_is_linear(headers: Any, body: bytes) -> None:
    """Bodies made to be slow are gone through in time, whole and in small pieces."""
    whole = rewritten(body, headers)
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    assert rewritten(pieces, headers) == whole
    assert without_additions(whole[0], body) == body


# Which answers


@pytest.mark.parametrize(
    ("headers", "result"),
    [
        ([*JSON, (b"content-encoding", b"gzip")], Rewrite.ENCODED),
        ([*SSE, (b"content-encoding", b"br")], Rewrite.ENCODED),
        ([(b"content-type", b"text/html")], Rewrite.MISSING),
        ([], Rewrite.MISSING),
    ],
)
def test_bodies_that_cannot_be_rewritten(headers: Any, result: Rewrite) -> None:
    """A coded body passes, and so does what is neither JSON nor an event stream."""
    assert transformer_for(headers, full=False) is result
    identity = [*JSON, (b"content-encoding", b"Identity")]
    assert rewritten(message(COUNTS), identity)[1] is Rewrite.REWRITTEN


def decided(
    only: Sequence[str],
    model: str | None = "claude-opus",
    agent: str = "OpenAI/Python 3.1",
    status_code: int = 200,
    request: Sequence[tuple[bytes, bytes]] = (),
    response: Sequence[tuple[bytes, bytes]] = JSON,
) -> tuple[bool, object]:
    rewriter = Rewriter(full=False, only=only)
    headers = [(b"user-agent", agent.encode()), *request]
    facts = RequestFacts(model=model)
    made = rewriter.transformer(Dialect.ANTHROPIC, headers, facts, status_code, response)
    if made is not None and not isinstance(made, Rewrite):
        return rewriter.wanted(Dialect.ANTHROPIC, headers), True
    return rewriter.wanted(Dialect.ANTHROPIC, headers), made


@pytest.mark.parametrize(
    ("only", "model", "agent", "expected"),
    [
        pytest.param([], None, "", (True, True), id="all"),
        pytest.param(["model:claude-opus"], "claude-opus", "", (True, True), id="model"),
        pytest.param(["model:claude-opus"], "Claude-Opus", "", (True, None), id="case of a model"),
        pytest.param(["model:claude-*"], "claude-x", "", (True, True), id="wildcard"),
        pytest.param(["model:opus"], "claude-opus", "", (True, None), id="the whole name"),
        pytest.param(
            ["model:claude-*"], None, "", (True, Rewrite.UNKNOWN_MODEL), id="model not known"
        ),
        pytest.param(
            ["user-agent:OpenAI/*"], None, "openai/python 3.1", (True, True), id="user agent"
        ),
        pytest.param(["user-agent:openai/*"], None, "curl/8", (False, None), id="another one"),
        pytest.param(["user-agent:*"], None, "", (True, True), id="any user agent"),
        pytest.param(
            ["model:x", "user-agent:curl/?"], None, "curl/8", (True, True), id="one of two"
        ),
        pytest.param(
            ["model:[x", "model:*a*b*c*"], "a" * 9999, "", (True, None), id="odd patterns"
        ),
    ],
)
def test_limits_to_models_and_user_agents(
    only: list[str], model: str | None, agent: str, expected: object
) -> None:
    """Whether identity is asked for, and whether the answer is rewritten."""
    assert decided(only, model, agent) == expected


def test_answers_that_are_not_to_be_rewritten() -> None:
    """Errors and answers without whole content are none of it; `no-transform` forbids it."""
    for status_code in (204, 205, 206, 301, 400, 500):
        assert decided([], status_code=status_code) == (True, None)
    assert decided([], status_code=201) == (True, True)
    forbidden = (b"cache-control", b"max-age=0, No-Transform")
    assert decided([], request=[forbidden]) == (False, Rewrite.NO_TRANSFORM)
    assert decided([], response=[*JSON, forbidden]) == (True, Rewrite.NO_TRANSFORM)


# Recorded answers, and damaged ones


def test_every_recorded_answer() -> None:
    """All 831 recorded Anthropic bodies: whole, byte by byte, and under random cuts: they parse,
    hold the numbers that are counted, and without the additions are what they were."""
    folder = require_corpus()
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    corpus = [row for row in rows if row["kind"].startswith("anthropic-")]
    assert len(corpus) == 831
    changed = 0
    for number, row in enumerate(corpus):
        body = (folder / row["file"]).read_bytes()
        headers = [(b"content-type", row["content_type"].encode())]
        sse = row["content_type"].startswith("text/event-stream")
        out, result = rewritten(body, headers, full=number % 2 == 1)
        for chunks in cuts(body, seed=number):
            assert rewritten(chunks, headers, full=number % 2 == 1) == (out, result), row["file"]
        assert ADDED.sub(b"", out) == body, row["file"]
        # What the sidecar reads of it is the same, and its own fields are all there.
        assert observe(out, headers) == observe(body, headers), row["file"]
        true = Usage(**row["expected"]) if row["expected"] else Usage()
        found = list(usages(out, sse=sse))
        if true.cache_reported:
            assert result is Rewrite.REWRITTEN, row["file"]
            details = {"cached_tokens": true.read_tokens}
            if true.write_tokens:
                details["cache_creation_tokens"] = true.write_tokens
            assert found[-1]["prompt_tokens_details"] == details, row["file"]
            changed += 1
        if number % 2 == 1 and true.input_tokens is not None:
            assert found[-1]["prompt_tokens"] == sum(true.input_classes()), row["file"]
            assert found[-1]["completion_tokens"] == true.output_tokens, row["file"]
    assert changed > 700


def test_lines_without_usage_of_recorded_streams_are_never_held() -> None:
    """At every byte of them all that came is out, but for lines that have a `"usage"`."""
    folder = require_corpus()
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    for row in [row for row in rows if row["kind"] == "anthropic-sse"][::9]:
        transformer = made(SSE)
        body = (folder / row["file"]).read_bytes()
        for line in re.findall(rb"[^\n]*\n|[^\n]+$", body):
            for at in range(len(line)):
                transformer.feed(line[at : at + 1])
                if b'"usage"' not in line[: at + 1]:
                    assert transformer.held == b"", row["file"]
            if line.endswith(b"\n"):
                assert transformer.held == b"", row["file"]


TOKENS = [
    b'"usage"',
    b'"usage":{}',
    b'"usage":{"cache_read_input_tokens":5}',
    b'"prompt_tokens_details":',
    DETAILS,
    b'"type":"message"',
    b'"\\u0075sage":{}',
    b"\n\n",
    b"\r",
    b"\r\n",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"data:",
    b"\ndata: ",
    b"event: message_delta\n",
    b"null",
    b"1e999",
    b"\xff",
    b"[",
    b",",
]


@pytest.mark.parametrize("part", range(4))
def test_mutations_raise_nothing_and_lose_nothing(part: int) -> None:
    """100,000 damaged answers in all: no exception, no byte lost, the same in two cuts, and no
    more memory than the bound."""
    dice = random.Random(20261124 + part)
    seeds = [(SSE, stream(WRITTEN, {"output_tokens": 17}, stop={})), (JSON, message(WRITTEN))]
    seeds.append((SSE, seeds[0][1].replace(b"\n", b"\r\n")))
    seeds.append((JSON, message(WRITTEN | {"prompt_tokens_details": {}})))
    results = set()
    for round_ in range(25_000):
        if round_ == 23_750:  # to trace takes four times as long
            tracemalloc.start()
        headers, body = dice.choice(seeds)
        source = damaged(body, dice, TOKENS)
        full = dice.random() < 0.5
        bounds = [0, *sorted(dice.choices(range(len(source) + 1), k=3)), len(source)]
        out, result = rewritten(
            [source[a:b] for a, b in itertools.pairwise(bounds)], headers, full=full
        )
        results.add(result)
        assert (out, result) == rewritten(source, headers, full=full), source
        assert without_additions(out, source) == source, source
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_EVENT_BYTES
    assert results == {
        Rewrite.REWRITTEN,
        Rewrite.PRESENT,
        Rewrite.UNREADABLE,
        Rewrite.UNREPORTED,
        Rewrite.MISSING,
    }


@pytest.mark.parametrize("dialect", sorted(set(Dialect) - {Dialect.ANTHROPIC}))
def test_other_dialects_are_left_alone(dialect: Dialect) -> None:
    """What is added is OpenAI's own, and has no place in Bedrock's."""
    rewriter = Rewriter(full=True)
    assert not rewriter.wanted(dialect, [])
    assert rewriter.transformer(dialect, [], RequestFacts("m"), 200, JSON) is None
