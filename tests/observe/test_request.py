"""What is learned from request bodies of any size."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from sidecar.exchange import Dialect, RequestFacts
from sidecar.observe.request import BodyReader
from tests.support.bodies import cuts

CONTROL = {"type": "ephemeral", "ttl": "1h"}
MAX = 32 * 1024 * 1024


def read(
    chunks: list[bytes],
    *,
    sized: bool = True,
    headers: Any = (),
    max_bytes: int = MAX,
    ttls: bool = True,
) -> RequestFacts:
    length = sum(map(len, chunks))
    sizes = [(b"content-length", str(length).encode())] if sized else []
    reader = BodyReader([*sizes, *headers], max_bytes, ttls=ttls)
    for chunk in chunks:
        reader.feed(chunk)
    for _ in reader.finish():
        pass
    return reader.facts()


def body(**members: Any) -> bytes:
    return json.dumps(
        {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]} | members
    ).encode()


BLOCK = {"type": "text", "text": "x", "cache_control": CONTROL}
SHORT_BLOCK = BLOCK | {"cache_control": {"type": "ephemeral"}}
CASES = [
    pytest.param(body(model="m"), RequestFacts("m", None, False, False), id="plain"),
    pytest.param(body(model="m", stream=True), RequestFacts("m", True, False, False), id="stream"),
    pytest.param(body(model="m", system=[BLOCK]), RequestFacts("m", None, True, True), id="system"),
    pytest.param(
        body(model="m", cache_control=CONTROL), RequestFacts("m", None, True, True), id="automatic"
    ),
    pytest.param(
        body(model="m", messages=[{"role": "user", "content": [BLOCK]}]),
        RequestFacts("m", None, True, True),
        id="messages",
    ),
    pytest.param(
        body(model="m", system=[SHORT_BLOCK, BLOCK]), RequestFacts("m", None, True, True), id="both"
    ),
    pytest.param(
        body(model="m", system=[SHORT_BLOCK], metadata={"ttl": "1h"}),
        RequestFacts("m", None, True, False),
        id="an hour of something else",
    ),
    pytest.param(
        body(tools=[{"model": "wrong", "x": {"model": "wrong"}}], model="right"),
        RequestFacts("right", None, False, False),
        id="model of a tool",
    ),
    pytest.param(
        body(model="m", system='he wrote {"cache_control": {"type": "ephemeral"}}, "model": "n"'),
        RequestFacts("m", None, False, False),
        id="talks of it",
    ),
    pytest.param(
        body(model="m", tools=[{"input_schema": {"cache_control": {"type": "string"}}}]),
        RequestFacts("m", None, False, False),
        id="a tool parameter of that name",
    ),
    pytest.param(
        body(model="m", system=[{"type": "text", "text": "x", "cache_control": None}]),
        RequestFacts("m", None, False, False),
        id="null",
    ),
    pytest.param(
        body(model=7, stream="yes"), RequestFacts(None, None, False, False), id="wrong types"
    ),
    pytest.param(
        body(model='é🌍\\"\n'), RequestFacts('é🌍\\"\n', None, False, False), id="escapes"
    ),
    pytest.param(
        b'{"model":"m","messages":[{"content":"\\ud83d"}],"x":"\\ud83d","y":"\\\\"}',
        RequestFacts("m", None, False, False),
        id="lone surrogates",
    ),
    pytest.param(
        b'{"a":[[]],"model":"one","b":{},"model":"two"}',
        RequestFacts("two", None, False, False),
        id="twice",
    ),
    pytest.param(b"", RequestFacts(), id="empty"),
    pytest.param(b'{"model":"m"', RequestFacts(), id="unfinished"),
    pytest.param(b'["model","m"]', RequestFacts(), id="array"),
    pytest.param(b"model=m", RequestFacts(), id="form"),
    pytest.param(b'{"model":"m","a":' + b"[" * 5000, RequestFacts(), id="deep and unfinished"),
]


@pytest.mark.parametrize("sized", [True, False], ids=["whole", "scanned"])
@pytest.mark.parametrize(("raw", "facts"), CASES)
def test_facts_in_every_cut(raw: bytes, facts: RequestFacts, sized: bool) -> None:
    """The decoder of small bodies and the scanner of large ones say the same of every cut."""
    assert read([raw], sized=sized) == facts
    for chunks in cuts(raw, seed=2):
        assert read(chunks, sized=sized) == facts


@pytest.mark.parametrize("sized", [True, False], ids=["whole", "scanned"])
@pytest.mark.parametrize(("raw", "facts"), CASES)
def test_the_ttl_is_learned_only_if_it_is_wanted(
    raw: bytes, facts: RequestFacts, sized: bool
) -> None:
    """Where it is not, the rest is learned all the same."""
    expected = facts._replace(hour_asked=None)
    for chunks in cuts(raw, seed=3):
        assert read(chunks, sized=sized, ttls=False) == expected


def test_large_bodies_are_scanned() -> None:
    """20 MB of images, with the model behind them as the Python SDK writes it."""
    image = {"type": "image", "source": {"data": "iVBORw0KGgo" * 100_000}}
    raw = body(messages=[{"role": "user", "content": [image] * 18 + [BLOCK]}], model="m")
    assert len(raw) > 19_000_000
    pieces = [raw[i : i + 65536] for i in range(0, len(raw), 65536)]
    assert read(pieces) == RequestFacts("m", None, True, True)


def test_a_mark_is_found_wherever_it_stands() -> None:
    """A long body is searched in windows; none is lost where one of them ends."""
    for before in (*range(24_400, 24_600), *range(48_960, 49_160), 90_000):
        raw = body(system=[{"type": "text", "text": "x" * before, "cache_control": CONTROL}])
        assert read([raw]) == RequestFacts(None, None, True, True), before


def test_bodies_over_the_capture_bound_say_nothing() -> None:
    """Nothing is learned from what is larger than the bound."""
    raw = body(model="m", system="x" * 1000)
    assert read([raw], max_bytes=len(raw)) == RequestFacts("m", None, False, False)
    for sized in (True, False):
        assert read([raw[:500], raw[500:]], max_bytes=len(raw) - 1, sized=sized) == RequestFacts()


def test_coded_bodies_say_nothing() -> None:
    """LiteLLM decodes no request coding, and neither do we."""
    assert read([body(model="m")], headers=[(b"content-encoding", b"gzip")]) == RequestFacts()
    identity = [(b"content-encoding", b"identity")]
    assert read([body(model="m")], headers=identity).model == "m"


def test_a_top_level_over_its_bound_says_nothing() -> None:
    """A system prompt of megabytes, given as a string, is not kept by the scanner."""
    raw = body(system="x" * (2 * 1024 * 1024), model="m")
    assert read([raw], sized=False) == RequestFacts()
    assert read([raw]).model == "m"


def test_random_documents_scan_as_they_decode() -> None:
    """The scanner agrees with a real decoder on random documents and random cuts."""
    dice = random.Random(11)

    def value(depth: int) -> Any:
        kind = dice.randrange(6 if depth else 3)
        if kind == 0:
            return dice.choice(["", 'a"b', "\\", "{[", "]}", '\\"', "é", "\n"]) * dice.randint(1, 3)
        if kind == 1:
            return dice.choice([True, None, 1.5, -3])
        if kind == 2:
            return [value(depth - 1) for _ in range(dice.randint(0, 3))] if depth else []
        return {
            dice.choice(["model", 'a"', "b}", "stream"]): value(max(depth - 1, 0)) for _ in range(3)
        }

    for round_ in range(400):
        document = {"x": value(4), "model": dice.choice(["m\\", 'q"', "z"]), "stream": False}
        raw = json.dumps(document, indent=dice.choice([None, 1])).encode()
        expected = RequestFacts(str(document["model"]), False, False, False)
        for chunks in cuts(raw, seed=round_):
            assert read(chunks, sized=False) == expected, raw


@pytest.mark.parametrize(
    ("point", "asked", "hour"),
    [
        ({"cachePoint": {"type": "default"}}, True, False),
        ({"cachePoint": {"type": "default", "ttl": "1h"}}, True, True),
        ({"cachePoint": {"type": "other"}}, False, False),
        ({"cache_control": CONTROL}, False, False),
    ],
)
@pytest.mark.parametrize("sized", [True, False])
def test_cache_points_of_converse(point: Any, asked: bool, hour: bool, sized: bool) -> None:
    """Converse asks for caching in words of its own."""
    raw = body(system=[{"text": "x"}, point])
    length = [(b"content-length", b"%d" % len(raw))] if sized else []
    reader = BodyReader(length, MAX, ttls=True, dialect=Dialect.BEDROCK_CONVERSE)
    reader.feed(raw)
    for _ in reader.finish():
        pass
    assert reader.facts() == RequestFacts(None, None, asked, hour)


@pytest.mark.parametrize("sized", [True, False], ids=["whole", "scanned"])
@pytest.mark.parametrize("ttls", [True, False])
def test_only_so_many_keys_are_looked_at(sized: bool, ttls: bool) -> None:
    """Behind a thousand false ones it is not known whether caching is asked for, or how long."""

    def facts(*blocks: Any) -> RequestFacts:
        raw = body(tools=blocks)
        pieces = [raw[at : at + 999] for at in range(0, len(raw), 999)]
        return read(pieces, sized=sized, ttls=ttls)

    false = [{"cache_control": {"type": "string"}}]
    assert facts(*false * 1023).caching_asked is False
    assert facts(*false * 1022, BLOCK)[2:4] == (True, True if ttls else None)
    assert facts(*false * 1024)[2:4] == (None, None)
    assert facts(*false * 1024, BLOCK)[2:4] == (None, None)
    assert facts(SHORT_BLOCK, *false * 1024)[2:4] == (True, None)


@pytest.mark.parametrize("sized", [True, False], ids=["whole", "scanned"])
def test_a_mark_is_the_same_wherever_its_text_is_cut(sized: bool) -> None:
    """Blanks within it may be many: it is looked at up to a bound, which is the same for all."""
    for blanks, asked in ((200, True), (300, False)):
        raw = b'{"x":{"cache_control":%b{"type":"ephemeral"}}}' % (b" " * blanks)
        for at in range(len(raw)):
            assert read([raw[:at], raw[at:]], sized=sized).caching_asked is asked


@pytest.mark.parametrize("value", [b"1", b"{}", b"[]", b'""', b"[[[[]]]]"])
def test_dense_bodies_are_scanned_in_steps(value: bytes) -> None:
    """Millions of values would hold up the loop in a decoder; in steps they say the same."""
    many = (2 * 1024 * 1024) // (len(value) + 1)
    raw = b'{"model":"m","messages":[%b],"stream":true}' % b",".join([value] * many)
    reader = BodyReader([(b"content-length", b"%d" % len(raw))], MAX, ttls=True)
    for at in range(0, len(raw), 65536):
        reader.feed(raw[at : at + 65536])
    steps = sum(1 for _ in reader.finish())
    assert steps >= len(raw) // 8192
    assert reader.facts()[:2] == ("m", True)
