"""What is learned from request bodies of any size."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest

from sidecar.exchange import Dialect, RequestFacts
from sidecar.observe import request as module
from sidecar.observe.members import SHALLOW
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


def soup(dice: random.Random, *, balanced: bool) -> bytes:
    """Brackets, strings and what is between them."""
    brackets = [b"[", b"]", b"{", b"}", b"[]", b"[[[]]]"]
    others = [b",", b"1", b' "a]"', b'"\\""', b'"{\\\\"', b'"\\\\\\"["', b'""', b"\xff", b"\2"]
    broken = [b"\\", b'"', b'"model":"n",', b"]" * 5]
    tokens = brackets * 4 + others * 2 + broken * (not balanced)
    pieces = []
    depth = 0
    for _ in range(dice.randint(1, 60)):
        token = dice.choice(tokens)
        if token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            if balanced and not depth:
                continue
            depth -= 1
        pieces.append(token)
    pieces.append(b"]" * depth)
    return b'{"model":"m","x":[%b],"stream":true}' % b"".join(pieces)


def test_counted_brackets_are_as_deep_as_matched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way and the patient one say the same of every cut, of JSON and of anything else."""
    dice = random.Random(17)
    known = 0
    for round_ in range(1000):
        raw = soup(dice, balanced=round_ % 2 == 0)
        found = set()
        for patience, dense in ((10**9, 1), (0, 1), (3, 16)):
            monkeypatch.setattr(module, "_PATIENCE", patience)
            monkeypatch.setattr(module, "_DENSE", dense)
            for chunks in ([raw], *cuts(raw, seed=round_)):
                found.add(read(chunks, sized=False))
        assert len(found) == 1, raw
        known += found.pop().model is not None
    assert 500 <= known < 800


class Counter:
    """A pattern that counts its matches."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self.pattern = pattern
        self.matches = 0

    def match(self, *arguments: Any) -> Any:
        self.matches += 1
        return self.pattern.match(*arguments)


@pytest.mark.parametrize(
    "unit",
    [
        b"[",
        b"{}",
        b"[],",
        b'"a":{},',
        b'"a":[[[[]]]],',
        b"[{}{[[]]}]",
        b"[" * 4000 + b"]" * 3999,
        b'["",["",[""]]],',
        b'["\\"",["\\\\",["["]]],',
        b'{"a":',
        b"]}",
        b'"',
        b"\\",
    ],
)
@pytest.mark.parametrize("before", [b"", b"{", b'{"x":[[', b'{"x":' + b"[" * 500])
def test_a_piece_takes_a_bounded_number_of_matches(
    before: bytes, unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever brackets it is made of: each match costs a step of Python's."""
    counters = [Counter(module._FLAT), Counter(SHALLOW)]
    monkeypatch.setattr(module, "_FLAT", counters[0])
    monkeypatch.setattr(module, "SHALLOW", counters[1])
    reader = BodyReader([], MAX)
    raw = before + unit * (400_000 // len(unit))
    counts = []
    for at in range(0, len(raw), 65536):
        reader.feed(raw[at : at + 65536])
        counts.append(sum(counter.matches for counter in counters))
    assert max(b - a for a, b in itertools.pairwise([0, *counts])) <= 64 + 1024 + 8
    assert counts[-1] <= 7 * 64 + 1024 + 8


@pytest.mark.parametrize("sized", [True, False], ids=["whole", "scanned"])
@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"m"}{}',
        b'{"model":"m"}}{',
        b'}{"model":"m"}',
        b'{"model":"m","x":\\}',
        b'{"model":"m","x":[\\]}',
        b'{"model":"m","x":[\\"]"]}',
    ],
)
def test_what_is_no_json_says_nothing(raw: bytes, sized: bool) -> None:
    """A second value, a bracket too many, or a backslash outside of strings."""
    for chunks in ([raw], *cuts(raw, seed=4)):
        assert read(chunks, sized=sized) == RequestFacts()


def test_a_top_level_with_too_many_values_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects and arrays are counted, and quotes; what is below the top level is not."""

    def scanned(members: bytes) -> str | None:
        return read([b'{"model":"m",%b"z":1}' % members], sized=False).model

    assert scanned(b'"a":[],' * 1024) == "m"
    assert scanned(b'"a":[],' * 1025) is None
    assert scanned(b'"a":[%b],' % b",".join([b"{}"] * 5000)) == "m"
    monkeypatch.setattr(module, "_MAX_TOP_QUOTES", 20)
    assert scanned(b'"a":1,' * 6 + b'"a":[%b],' % b",".join([b'""'] * 99)) == "m"
    assert scanned(b'"a":1,' * 8) is None


@pytest.mark.parametrize("sized", [True, False], ids=["whole", "scanned"])
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (b'"%b"' % (b"x" * 4094), "x" * 4094),
        (b'"%b"' % (b"x" * 4095), None),
        (b'"m\xff"', "m\ufffd"),
        (b'"m\xff\\u00e9"', "m\ufffdé"),
        (b"7" * 5000, None),
        (b"1e999999", None),
        (b"[%b1]" % (b"1," * 5000), None),
        (b"null", None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_model_is_a_short_string(model: bytes, expected: str | None, sized: bool) -> None:
    """Nothing else is decoded; the rest of the body is read all the same."""
    raw = b'{"model":%b,"stream":true}' % model
    assert read([raw], sized=sized) == RequestFacts(expected, True, False, False)


def test_what_only_the_slow_decoder_takes_has_no_long_model_either() -> None:
    """Half an emoji elsewhere changes nothing about names."""
    for size, known in ((4096, True), (4097, False)):
        raw = b'{"x":"\\ud83d","n":%b,"model":"%b"}' % (b"7" * 5000, b"m" * size)
        assert (read([raw]).model is not None) == known


def test_a_large_scanned_body_gives_the_loop_a_turn_before_its_top_is_decoded() -> None:
    """Its last piece was scanned just before."""
    for size, turns in ((1000, 0), (100_000, 1)):
        reader = BodyReader([], MAX)
        reader.feed(body(model="m", system="x" * size))
        assert len(list(reader.finish())) == turns
        assert reader.facts().model == "m"


def test_a_large_body_that_is_no_json_gives_the_loop_turns() -> None:
    """It is tried to be decoded, and then scanned."""
    raw = body(model="m", system="x" * 100_000)[:-1]
    reader = BodyReader([(b"content-length", b"%d" % len(raw))], MAX)
    reader.feed(raw)
    assert len(list(reader.finish())) >= 100_000 // 8192
    assert reader.facts() == RequestFacts()
