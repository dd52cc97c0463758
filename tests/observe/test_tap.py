"""Which reader a response gets, the bounds, and the recorded corpus."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sidecar.exchange import Dialect, End, Status, Usage
from sidecar.observe.sse import MAX_EVENT_BYTES
from sidecar.observe.tap import MAX_JSON_BYTES, tap_for
from tests.support.bodies import (
    JSON,
    MESSAGES,
    SSE,
    chunk,
    converse,
    cuts,
    damaged,
    frames,
    invocation,
    message,
    observe,
    response_event,
    stream,
)
from tests.support.requirements import require_corpus

COUNTS = {"input_tokens": 7, "output_tokens": 16, "cache_read_input_tokens": 2101}


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        (b"application/json", message(COUNTS), Status.COMPLETE),
        (b"Application/JSON ; charset=utf-8", message(COUNTS), Status.COMPLETE),
        (b"application/vnd.x+json", message(COUNTS), Status.COMPLETE),
        (b"text/event-stream;charset=UTF-8", stream(COUNTS, COUNTS), Status.COMPLETE),
        (b"text/html", message(COUNTS), Status.MISSING),
    ],
)
def test_content_type_chooses_the_reader(content_type: bytes, body: bytes, status: Status) -> None:
    """The response's own content type decides, not what the request asked for."""
    assert observe(body, [(b"content-type", content_type)]).status is status


def test_response_without_content_type_is_missing() -> None:
    """What says nothing of its type is not guessed at."""
    assert observe(message(COUNTS), []).status is Status.MISSING
    assert observe(b"", [], end=End.CLIENT_LEFT).status is Status.PARTIAL


@pytest.mark.parametrize("status_code", [301, 400, 401, 429, 500, 529])
def test_other_than_2xx_is_an_error(status_code: int) -> None:
    """An answer that is not 2xx has no usage to be read."""
    seen = observe(message(COUNTS), JSON, status_code=status_code)
    assert (seen.status, seen.usage) == (Status.ERROR, Usage())


def test_oversized_json_is_not_kept() -> None:
    """A JSON body over the bound is given up, and its memory with it."""
    tap = tap_for(Dialect.ANTHROPIC, 200, JSON)
    chunk = b" " * 65536
    tracemalloc.start()
    for _ in range(40 * 1024 * 1024 // len(chunk)):
        tap.feed(bytes(bytearray(chunk)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tap.finish(End.COMPLETE).status is Status.OVERSIZED
    assert peak < MAX_JSON_BYTES + 2 * 1024 * 1024


def test_largest_json_is_read() -> None:
    """A JSON body at the bound is read."""
    body = message(COUNTS)
    body += b" " * (MAX_JSON_BYTES - len(body))
    assert observe(body, JSON).status is Status.COMPLETE
    assert observe(body + b" ", JSON).status is Status.OVERSIZED
    announced = [*JSON, (b"content-length", b"%d" % (MAX_JSON_BYTES + 1))]
    assert observe(body[:100], announced).status is Status.OVERSIZED


def test_huge_delta_is_skipped_and_the_rest_is_read() -> None:
    """An 8 MB text in one frame does no harm to the counts around it."""
    body = stream(COUNTS, {"output_tokens": 17}, text=["x" * (8 * 1024 * 1024)])
    for chunks in ([body], [body[i : i + 65536] for i in range(0, len(body), 65536)]):
        seen = observe(chunks)
        assert (seen.status, seen.usage.output_tokens) == (Status.COMPLETE, 17)


def test_huge_event_with_usage_is_oversized() -> None:
    """If the usage itself is in a frame over the bound, that is said."""
    body = stream(COUNTS | {"pad": "x" * MAX_EVENT_BYTES}, {"output_tokens": 17})
    seen = observe(body)
    assert seen.usage.cache_read_input_tokens is None
    assert seen.status in (Status.OVERSIZED, Status.INVALID)


def test_first_token_is_noticed_across_chunks() -> None:
    """The flag rises with the first content, also when a cut goes through its name."""
    body = stream(COUNTS)
    at = body.index(b"content_block_delta")
    tap = tap_for(Dialect.ANTHROPIC, 200, SSE)
    tap.feed(body[: at + 9])
    assert not tap.first_token_seen
    tap.feed(body[at + 9 :])
    assert tap.first_token_seen


def test_coded_body_is_read_through_its_decoder() -> None:
    """The tap of a coded response reads what the coding hides."""
    headers = [*SSE, (b"content-encoding", b"gzip")]
    body = gzip.compress(stream(COUNTS))
    tap = tap_for(Dialect.ANTHROPIC, 200, headers)
    tap.feed(body)
    assert tap.first_token_seen
    assert tap.finish(End.COMPLETE).usage == Usage(7, 16, 2101)


_KINDS = {
    "anthropic-json": Dialect.ANTHROPIC,
    "anthropic-sse": Dialect.ANTHROPIC,
    "openai-chat-json": Dialect.OPENAI_CHAT,
    "openai-chat-sse": Dialect.OPENAI_CHAT,
    "openai-responses-json": Dialect.OPENAI_RESPONSES,
    "openai-responses-sse": Dialect.OPENAI_RESPONSES,
    "bedrock-converse-json": Dialect.BEDROCK_CONVERSE,
}
_ENDPOINTS = {
    "converse": Dialect.BEDROCK_CONVERSE,
    "converse-stream": Dialect.BEDROCK_CONVERSE,
    "invoke": Dialect.BEDROCK_INVOKE,
    "invoke-with-response-stream": Dialect.BEDROCK_INVOKE,
    "completions": Dialect.OPENAI_CHAT,
}
_UNOBSERVED = {"embeddings", "count_tokens", "complete", "generations"}
_WRONG_TYPE = "DataDog__dd-trace-py/v1--chat_completion_streamed_tokens.0.sse"
"""The recording says `application/json` of what is an event stream."""


def _corpus() -> Iterator[tuple[Dialect, dict[str, Any], bytes]]:
    """Yield the recorded bodies of all observed routes."""
    folder = require_corpus()
    for line in (folder / "index.jsonl").read_text().splitlines():
        row = json.loads(line)
        endpoint = (row["url"] or "").partition("?")[0].rpartition("/")[2]
        dialect = _KINDS.get(row["kind"])
        if endpoint.startswith("invoke") or dialect is None:
            dialect = _ENDPOINTS.get(endpoint)
        if row["file"] == _WRONG_TYPE:
            row["content_type"] = "text/event-stream"
        if dialect is None:
            assert endpoint in _UNOBSERVED, row["file"]
        else:
            yield dialect, row, (folder / row["file"]).read_bytes()


def _true_usage(dialect: Dialect, row: dict[str, Any]) -> Usage:
    """Say what was really used; of OpenAI's the corpus gives the input as sent, cache included."""
    usage = Usage(**(row["expected"] or {}))
    if dialect in (Dialect.OPENAI_CHAT, Dialect.OPENAI_RESPONSES) and usage.input_tokens:
        cached = usage.read_tokens + usage.write_tokens
        return usage._replace(input_tokens=usage.input_tokens - cached)
    return usage


def test_every_recorded_answer_gives_its_true_usage() -> None:
    """All recorded bodies of observed routes: whole, byte by byte, and under random cuts."""
    seen: Counter[Dialect] = Counter()
    for number, (dialect, row, body) in enumerate(_corpus()):
        headers = [(b"content-type", row["content_type"].encode())]
        status_code = row["status"] or 200
        whole = observe(body, headers, status_code=status_code, dialect=dialect)
        assert whole.usage == _true_usage(dialect, row), row["file"]
        for chunks in cuts(body, seed=number):
            split = observe(chunks, headers, status_code=status_code, dialect=dialect)
            assert split == whole, row["file"]
        seen[dialect] += 1
    assert seen == {
        Dialect.ANTHROPIC: 799,
        Dialect.OPENAI_CHAT: 254,
        Dialect.OPENAI_RESPONSES: 89,
        Dialect.BEDROCK_CONVERSE: 146,
        Dialect.BEDROCK_INVOKE: 64,
    }


@pytest.mark.parametrize("part", range(2))
def test_mutations_raise_nothing_and_stay_within_the_bound(part: int) -> None:
    """100,000 damaged answers in all: no exception, and no more memory than the bound."""
    dice = random.Random(20261123 + part)
    chat = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    response = {"usage": COUNTS | {"input_tokens_details": {"cached_tokens": 4}}}
    seeds: list[tuple[Dialect, list[tuple[bytes, bytes]], bytes]] = [
        (Dialect.ANTHROPIC, SSE, stream(COUNTS, {"output_tokens": 17})),
        (Dialect.ANTHROPIC, JSON, message(COUNTS)),
        (Dialect.OPENAI_CHAT, SSE, chunk(chat) + chunk(chat, choices=[]) + b"data: [DONE]\n\n"),
        (Dialect.OPENAI_CHAT, JSON, message(chat)),
        (Dialect.OPENAI_RESPONSES, SSE, response_event("response.completed", **response)),
        (Dialect.OPENAI_RESPONSES, JSON, json.dumps(response).encode()),
        (Dialect.BEDROCK_CONVERSE, MESSAGES, converse({"inputTokens": 7})),
        (Dialect.BEDROCK_CONVERSE, JSON, message({"inputTokens": 7})),
        (Dialect.BEDROCK_INVOKE, MESSAGES, invocation({"metadata": {"usage": COUNTS}})),
        (Dialect.BEDROCK_INVOKE, JSON, message({"inputTokens": 7})),
    ]
    seeds += [
        (dialect, [*headers, (b"content-encoding", b"gzip")], gzip.compress(body))
        for dialect, headers, body in seeds[:2]
    ]
    tokens = [
        b'"usage"',
        b"\n\n",
        b"\r",
        b"{",
        b"}",
        b'"',
        b"data:",
        b"null",
        b"1e999",
        b"\xff",
        b"[",
    ]
    for round_ in range(50_000):
        if round_ == 45_000:  # to trace takes three times as long
            tracemalloc.start()
        dialect, headers, body = dice.choice(seeds)
        broken = damaged(body, dice, tokens)
        cut = dice.randrange(len(broken) + 1)
        pieces = [broken[:cut], broken[cut:]]
        observe(pieces, headers, end=dice.choice(list(End)), dialect=dialect)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_JSON_BYTES


@pytest.mark.parametrize(
    ("dialect", "content_type", "piece"),
    [
        (Dialect.ANTHROPIC, SSE, b'data: {"usage"\n\n'),
        (Dialect.OPENAI_CHAT, SSE, b'data: {"prompt_tokens"\n\n'),
        (Dialect.OPENAI_RESPONSES, SSE, b'data: {"usage"\n\n'),
        (Dialect.BEDROCK_CONVERSE, MESSAGES, frames(("metadata", b"{"))),
        (Dialect.BEDROCK_INVOKE, MESSAGES, frames(("chunk", b"{"))),
        (Dialect.BEDROCK_INVOKE, MESSAGES, frames(("chunk", {"bytes": "eyJ1c2FnZSI="}))),
    ],
    ids=["anthropic", "chat", "responses", "converse", "invoke", "invoke, within"],
)
def test_any_number_of_faults_takes_no_memory(
    dialect: Dialect, content_type: list[tuple[bytes, bytes]], piece: bytes
) -> None:
    """The first is told, and the rest are not kept."""
    tap = tap_for(dialect, 200, content_type)
    tap.feed(piece * 10)
    tracemalloc.start()
    try:
        for _ in range(100):
            tap.feed(piece * 100)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 30_000
    assert tap.finish(End.COMPLETE).status is Status.INVALID
