"""What was digested before is known: it is found, it is the same, and it is bounded."""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sidecar.exchange import Dialect, Prefix, RequestFacts
from sidecar.observe import recall
from sidecar.observe.prefix import PrefixReader
from sidecar.observe.recall import Beginning, Recall, Stretch
from tests.support.requests import facts_of

Json = dict[str, Any]
MARK: Json = {"cache_control": {"type": "ephemeral"}}
HOUR: Json = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
POINT: Json = {"cachePoint": {"type": "default"}}
KEY = b'"cache_control"'
STYLES: list[Json] = [{"separators": (",", ":")}, {}, {"indent": 1}]


def facts(
    raw: bytes, reader: PrefixReader | None, dialect: Dialect, *, ttls: bool = True
) -> RequestFacts:
    return facts_of(raw, dialect, reader, ttls=ttls)


def read(raw: bytes, reader: PrefixReader, dialect: Dialect) -> Prefix | None:
    return facts(raw, reader, dialect).prefix


def conversation(dice: random.Random, dialect: Dialect) -> Iterator[Json]:
    """Grow a conversation, change it now and then, and move its marks about."""
    converse = dialect is Dialect.BEDROCK_CONVERSE
    said: list[Json] = []
    tools: Any = [{"name": "t", "input_schema": {"title": "x" * dice.choice([0, 400])}}]
    system: Any = [{"text": "rules " * dice.choice([1, 50]), "type": "text"}]
    if dice.random() < 0.5:
        system[0] |= dice.choice([MARK, HOUR])
        system.append({"text": "more"} | MARK)

    def words() -> str:
        return dice.choice(["a", "é\\", '"},{"role":"']) * dice.choice([1, 40, 2000])

    def message(role: str, nested: int) -> Json:
        block: Json = {"type": "text", "text": words()}
        within = [message("user", 0) for _ in range(nested)]
        called: Json = {"type": "tool_use", "input": {"said": within}}
        content: Any = dice.choice([words(), [block], [block, called], [called, block]])
        made = {"role": role, "content": content}
        return dict(reversed(made.items())) if dice.random() < 0.05 else made

    sizes: tuple[int, ...] = dice.choice([(), (9,), (99,), (99, 50), (99, 5000)])
    head: list[Json] = [{"role": "system", "content": "s" * size} for size in sizes]
    for _ in range(12):
        roles = ("user", "assistant", "user")
        said += [message(role, dice.choice([0, 0, 3])) for role in roles]
        if dice.random() < 0.2:
            said[dice.randrange(len(said))] = message("user", 0)
        if dice.random() < 0.2:
            said = said[: dice.randrange(1, len(said) + 1)]
        messages: list[Json] = [dict(each) for each in said]
        for at in {len(messages) - 1, *dice.choices(range(len(messages)), k=dice.choice([0, 1]))}:
            content = messages[at]["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            marked = [*blocks, POINT] if converse else [*blocks[:-1], blocks[-1] | MARK]
            messages[at]["content"] = marked
        if dialect is Dialect.OPENAI_CHAT:
            messages = [*head, *messages]
        if dialect is Dialect.OPENAI_RESPONSES:
            yield {"instructions": system, "input": messages}
        elif converse:
            yield {"toolConfig": {"tools": tools}, "system": system, "messages": messages}
        elif dialect is Dialect.OPENAI_CHAT:
            yield {"tools": tools, "messages": messages}
        else:
            whole = dice.choice([{}, {}, MARK, HOUR, {"cache_control": None}])
            yield {"tools": tools, "system": system, "messages": messages} | whole


@pytest.mark.parametrize("dialect", [each for each in Dialect if each.value != "bedrock_invoke"])
def test_known_is_what_would_be_found_anew(dialect: Dialect) -> None:
    """However a conversation grows, is changed, is spelled, and where its marks stand."""
    reader = PrefixReader(dialect, 7)
    known = 0
    for seed in range(24):
        dice = random.Random(seed)
        style = dice.choice(STYLES)
        for body in conversation(dice, dialect):
            raw = json.dumps(body, **style).encode()
            messages = body.get("messages", body.get("input"))
            text = json.dumps(messages, **style).encode()
            known += reader._recall.stretch(reader._kind, memoryview(text))[0] is not None
            ttls = dice.random() < 0.7
            found = facts(raw, reader, dialect, ttls=ttls)
            assert found == facts(raw, PrefixReader(dialect, 7), dialect, ttls=ttls)
            assert found._replace(prefix=None) == facts(raw, None, dialect, ttls=ttls)
    assert known > 20


def growing(count: int, size: int = 2000) -> bytes:
    """Write a request of an agent, of so many messages, the last of which is marked."""
    messages: list[Json] = [
        {"role": "user", "content": [{"type": "text", "text": f"{at} " * (size // 3)}]}
        for at in range(count)
    ]
    messages[-1]["content"][0] |= MARK
    return json.dumps({"messages": messages}, separators=(",", ":")).encode()


def test_most_of_a_conversation_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what grows by two messages a time, a quarter is gone through at most."""
    reader = PrefixReader(Dialect.ANTHROPIC, 7)
    for count in range(20, 60, 2):
        raw = growing(count)
        text = memoryview(raw)[len('{"messages":') : -1]
        _, end = reader._recall.stretch(reader._kind, text)
        assert count == 20 or end > len(text) * 0.7
        assert read(raw, reader, Dialect.ANTHROPIC) is not None


def test_what_is_lost_is_not_kept() -> None:
    """A prompt of which nothing can be said tells nothing of another one with its messages."""
    body = json.loads(growing(60))
    far = [{"type": "text", "text": "d" * 600_000} | MARK, {"type": "text", "text": "e"} | MARK]
    for dialect, lost in ((Dialect.ANTHROPIC, "system"), (Dialect.OPENAI_CHAT, "tools")):
        reader = PrefixReader(dialect, 7)
        assert read(json.dumps(body | {lost: far}).encode(), reader, dialect) is None
        raw = json.dumps(body).encode()
        for _ in range(2):
            assert read(raw, reader, dialect) == read(raw, PrefixReader(dialect, 7), dialect)


def test_bounds_hold_for_what_is_known() -> None:
    """The number of messages, and what is gone through in all parts together."""
    reader = PrefixReader(Dialect.OPENAI_CHAT, 7)
    system = [{"role": "system", "content": "s" * 99}] * 3
    said = [{"role": "user", "content": f"hello {at}" * 8} for at in range(2048)]
    for count in (2000, 2045, 2046):
        raw = json.dumps({"messages": [*system, *said[:count]]}).encode()
        assert (read(raw, reader, Dialect.OPENAI_CHAT) is None) == (count == 2046)
    reader = PrefixReader(Dialect.ANTHROPIC, 7)
    far = [{"type": "text", "text": "d" * 300_000} | MARK, {"type": "text", "text": "e"} | MARK]
    raw = json.dumps({"system": far, "messages": [{"role": "user", "content": far}]}).encode()
    for _ in range(2):
        assert read(raw, reader, Dialect.ANTHROPIC) is None


def test_another_text_is_not_known() -> None:
    """A stretch is one of its text, of its dialect's mark and of its salt."""
    reader = PrefixReader(Dialect.ANTHROPIC, 7)
    raw = growing(20)
    read(raw, reader, Dialect.ANTHROPIC)
    for changed in (raw.replace(b"0 0 0", b"0 0 1", 1), raw.replace(b"user", b"tool", 1)):
        text = memoryview(changed)[len('{"messages":') : -1]
        assert reader._recall.stretch(reader._kind, text) == (None, 0)


def test_what_is_held_is_bounded() -> None:
    """Whoever makes up prompts has the oldest forgotten; what is used stays."""
    held = Recall(7)
    text = memoryview(growing(20)[len('{"messages":') : -1])
    end = held.place(text, 0, bytes(text).find(KEY))
    stretch = Stretch(10, 0, b"e" * 160, 5, b"", b"", 0)
    used = Beginning(b"d" * 32, 40, (), 0, 0, False, False, (0, 0))
    held.keep_beginning(1, used)
    for _ in range(10_000):
        held.keep_stretch(b"k", text, end, stretch)
    assert len(held._stretches) == 1
    for number in range(20_000):
        other = memoryview(b"%d" % number + bytes(text))
        held.keep_stretch(b"k", other, end, Stretch(200, 0, bytes(3200), 5, b"", b"", 0))
        held.keep_beginning(-number - 5, used)
        if number % 1000 == 0:
            held.keep_stretch(b"k", text, end, stretch)
        assert held.beginning(1) is used
        assert held.stretch(b"k", text) == (stretch, end)
        assert held.stretch(b"l", text) == (None, 0)
    taken = sys.getsizeof(held._stretches) + sum(
        sys.getsizeof(each) + sum(map(sys.getsizeof, each)) for each in held._stretches.values()
    )
    assert 0.8 * recall.MAX_HELD_BYTES < taken < recall.MAX_HELD_BYTES
    assert len(held._beginnings) == 512


def test_nothing_of_a_prompt_is_held() -> None:
    """Neither its text, nor a digest of so little that it could be found out."""
    reader = PrefixReader(Dialect.ANTHROPIC, 7)
    body = json.loads(growing(20).replace(b"1 1", b"canary"))
    body["system"] = [{"type": "text", "text": "canary " * 50} | MARK]
    body["tools"] = [{"name": "canary" * 50}]
    raw = json.dumps(body).encode()
    for _ in range(2):
        assert read(raw, reader, Dialect.ANTHROPIC) is not None
    assert reader._recall._beginnings
    assert reader._recall._stretches
    del body, raw
    seen: set[int] = set()
    left: list[object] = [reader._recall]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        assert not isinstance(each, memoryview | bytearray)
        assert not isinstance(each, bytes) or b"canary" not in each
        assert not isinstance(each, str) or "canary" not in each
        left += gc.get_referents(each)


@pytest.mark.parametrize(
    ("change", "beginnings", "stretches"),
    [
        ({}, 1, 1),
        ({"system": "short"}, 0, 1),
        ({"tools": [{"name": "short"}]}, 0, 1),
        ({"system": [{"type": "text", "text": "short"} | MARK, {"text": "x" * 99} | MARK]}, 0, 1),
        ({"messages": "short"}, 1, 0),
        ({"messages": [{"type": "text", "text": "short"}]}, 1, 0),
    ],
)
def test_short_texts_are_not_kept(change: Json, beginnings: int, stretches: int) -> None:
    """The quick digest of a few bytes could be turned back into them."""
    body = json.loads(growing(20))
    if change.get("messages"):
        body["messages"][0]["content"] = change["messages"]
        change = {}
    reader = PrefixReader(Dialect.ANTHROPIC, 7)
    assert read(json.dumps(body | change).encode(), reader, Dialect.ANTHROPIC) is not None
    assert len(reader._recall._beginnings) == beginnings
    assert len(reader._recall._stretches) == stretches


def test_place_of_a_stretch() -> None:
    """Between two messages, before the first mark, and behind what is known."""
    held = Recall(7)

    def place(text: bytes, known: int) -> int:
        mark = text.find(KEY, known)
        return held.place(memoryview(text), known, mark if mark >= 0 else len(text))

    text = growing(20)[len('{"messages":') : -1]
    end = place(text, 0)
    assert text[end:].startswith(b',{"role":')
    assert place(text, end) == 0
    for where, least in ((0, 0), (11_000, 0), (27_000, 19_000)):
        marked = text[:where] + text[where:].replace(b'"text":"', b'"cache_control":"')
        found = place(marked, 0)
        assert least <= found <= where + 100
        assert b"cache_control" not in marked[:found]
    assert place(text[:4000], 0) == 0
    assert place(text.replace(b'},{"role"', b'}, \n{"role"'), 0) == 0
    assert place(text.replace(b'},{"role"', b'}, {"role"'), 0) > 0
    assert recall._PLACES[-1] > 4_000_000


@pytest.mark.parametrize("messages", [None, [], 1, "a" * 20_000])
def test_long_bodies_without_messages(messages: Any) -> None:
    """They have a prefix as far as their system prompt reaches, as short ones do."""
    system = [{"type": "text", "text": "rules " * 3000} | MARK]
    body: Json = {"system": system} | ({} if messages is None else {"messages": messages})
    reader = PrefixReader(Dialect.ANTHROPIC, 7)
    found = read(json.dumps(body).encode(), reader, Dialect.ANTHROPIC)
    if messages:
        assert found is None
    else:
        assert found is not None
        assert [each.messages for each in found.breakpoints] == [0]
        assert found.messages == b""
