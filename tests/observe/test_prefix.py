"""What is digested of a prompt: where it can be cached, however it is spelled."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from sidecar.exchange import Dialect, Prefix
from sidecar.observe import prefix as module
from sidecar.observe.members import end_of_item
from sidecar.observe.prefix import PrefixReader
from sidecar.observe.request import BodyReader
from tests.support.bodies import cuts
from tests.support.requests import facts_of

Json = dict[str, Any]
SHORT: Json = {"type": "ephemeral"}
LONG: Json = {"type": "ephemeral", "ttl": "1h"}
STYLES: list[Json] = [
    {},
    {"separators": (",", ":")},
    {"indent": 2},
]


def read(
    body: Json | bytes, dialect: Dialect = Dialect.ANTHROPIC, *, pieces: int = 0, **style: Any
) -> Prefix | None:
    raw = body if isinstance(body, bytes) else json.dumps(body, **style).encode()
    return facts_of(raw, dialect, PrefixReader(dialect, 7), piece_bytes=pieces).prefix


def prefix(body: Json | bytes, dialect: Dialect = Dialect.ANTHROPIC, **style: Any) -> Prefix:
    found = read(body, dialect, **style)
    assert found is not None
    return found


def text(words: str, control: Json | None = None, **others: Any) -> Json:
    block = {"type": "text", "text": words} | others
    return block | ({"cache_control": control} if control else {})


def user(*content: Json) -> Json:
    return {"role": "user", "content": list(content)}


TOOLS: list[Json] = [{"name": "a", "input_schema": {"type": "object"}}, {"name": "b"}]


def marked(blocks: list[Json], at: int, control: Json = SHORT) -> list[Json]:
    return [
        block | {"cache_control": control} if index == at else block
        for index, block in enumerate(blocks)
    ]


@pytest.mark.parametrize("style", STYLES)
def test_marks_move_and_nothing_changes(style: Json) -> None:
    """The digests up to a place are the same, whether a mark stands there, before it, or after."""
    blocks = [text("one"), text('two "cache_control": x'), text("three")]
    for at in range(3):
        messages = [user(*marked(blocks, at)), user(text("end", SHORT))]
        body = {"tools": TOOLS, "system": [text("s")], "messages": messages}
        found = prefix(body, **style)
        plain = prefix(body | {"messages": [user(*blocks), user(text("end", SHORT))]}, **style)
        assert found.tools == plain.tools
        assert found.messages == plain.messages
        assert found.breakpoints[-1] == plain.breakpoints[-1]
        ending_there = {**body, "messages": [user(*blocks[:at], text("x", SHORT) | blocks[at])]}
        assert found.breakpoints[0].digest == prefix(ending_there, **style).breakpoints[0].digest


@pytest.mark.parametrize("style", STYLES)
def test_a_block_that_is_a_mark_alone(style: Json) -> None:
    """It is an empty block, and the prefix ends with it."""
    alone = prefix({"messages": [user(text("one"), {"cache_control": LONG})]}, **style)
    empty = {"messages": [user(text("one"), {})], "cache_control": LONG}
    assert alone == prefix(empty, **style)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "order", [("type", "text", "cache_control"), ("cache_control", "type", "text")]
)
def test_a_text_is_the_same_alone_and_in_a_list(style: Json, order: tuple[str, ...]) -> None:
    """As a string, as a block, as a marked block; in a system prompt and in a message."""
    control: Json = {"type": "text", "text": 'a "b" \\ é\n', "cache_control": SHORT}
    block = {name: control[name] for name in order}
    last = user(text("end", SHORT))
    as_text = {
        "system": control["text"],
        "messages": [{"role": "user", "content": control["text"]}, last],
    }
    as_list = {"system": [text(control["text"])], "messages": [user(text(control["text"])), last]}
    as_mark = {"system": [block], "messages": [user(block), last]}
    one, two, three = (prefix(body, **style) for body in (as_text, as_list, as_mark))
    assert one.system == two.system == three.system
    assert one.messages == two.messages == three.messages
    assert len(three.breakpoints) == 3
    assert three.breakpoints[0].digest == one.tools + one.system
    assert three.breakpoints[1].digest == one.tools + one.system + one.messages[:16]


def test_each_section_has_its_digest() -> None:
    """A change shows in its own section, and in what comes after it in its own chain."""
    body = {
        "tools": TOOLS,
        "system": "s",
        "messages": [user(text("a")), user(text("b" * 99, SHORT))],
    }
    before = prefix(body)
    tools = prefix(body | {"tools": TOOLS[:1]})
    assert (tools.tools != before.tools, tools.system == before.system) == (True, True)
    system = prefix(body | {"system": "S"})
    assert (system.tools == before.tools, system.system != before.system) == (True, True)
    assert system.messages == before.messages
    second = prefix(body | {"messages": [user(text("a")), user(text("B" * 99, SHORT))]})
    assert second.messages[:16] == before.messages[:16]
    assert second.messages[16:] != before.messages[16:]
    assert second.second != before.second
    first = prefix(body | {"messages": [user(text("A")), user(text("b" * 99, SHORT))]})
    assert first.second == before.second
    role = prefix(
        body | {"messages": [user(text("a")), user(text("b" * 99, SHORT)) | {"role": "x"}]}
    )
    assert role.messages[16:] != before.messages[16:]
    short = prefix(body | {"messages": [user(text("a")), user(text("yes", SHORT))]})
    assert short.second == b""


def test_breakpoints_in_all_places() -> None:
    """Tools, system, messages; within and at the end; each with its time to live."""
    body: Json = {
        "messages": [user(text("a", SHORT), text("b")), user(text("c"))],
        "system": [text("s", LONG), text("t")],
        "tools": marked(TOOLS, 0, LONG),
        "cache_control": SHORT,
    }
    found = prefix(body).breakpoints
    assert [each.ttl_s for each in found] == [3600, 3600, 300, 300]
    assert [each.messages for each in found] == [0, 0, 0, 2]
    assert [len(each.digest) for each in found] == [16, 32, 48, 48]
    assert sorted(each.size for each in found) == [each.size for each in found]
    assert found[-1].size == prefix(body).size


def test_a_mark_within_another_block_goes_to_that_block() -> None:
    """What a tool found may have blocks of its own."""
    inner = {"type": "tool_result", "content": [text("a", SHORT), text("b")]}
    deep = {"type": "tool_use", "input": {"a": [{"b": [{"c": {}}]}]}}
    outer = {"type": "tool_result", "content": [text("a"), text("b")], "cache_control": SHORT}
    tail = user(text("end", SHORT))
    found = prefix({"messages": [user(deep, inner, text("c")), tail]})
    whole = prefix({"messages": [user(deep, outer, text("c")), tail]})
    assert found.messages == whole.messages
    assert found.breakpoints == whole.breakpoints


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [user(text("a"))]},
        {"messages": [user(text("a", {"type": "other"}))]},
        {"messages": "not a list", "cache_control": SHORT},
        {"messages": [7], "cache_control": SHORT},
        {"messages": [user(text("a"))], "cache_control": None},
        {"messages": [user(text("a"))], "cache_control": "ephemeral"},
        {"messages": [], "x": {"cache_control": SHORT}},
    ],
)
def test_what_has_no_breakpoint(body: Json) -> None:
    """Nothing is said of it."""
    assert read(body) is None


def test_null_marks_are_no_part_of_a_prompt() -> None:
    """Some clients write all members that a type has."""
    tail = user(text("end", SHORT))
    with_null = prefix({"messages": [user(text("a", cache_control=None)), tail], "tools": []})
    assert with_null.messages == prefix({"messages": [user(text("a")), tail]}).messages
    assert with_null.tools == prefix({"messages": [tail], "tools": None}).tools
    automatic = prefix({"messages": [user(text("a")), tail], "cache_control": None})
    assert automatic == prefix({"messages": [user(text("a")), tail]})


def test_what_only_looks_like_a_mark() -> None:
    """A name in a list, a parameter of a tool, a text that quotes one."""
    tool = {"name": "a", "input_schema": {"properties": {"cache_control": {"type": "string"}}}}
    tool |= {"required": ["cache_control"]}
    body = {
        "tools": [tool],
        "messages": [user(text('{"cache_control": {}}')), user(text("b", SHORT))],
    }
    found = prefix(body)
    assert len(found.breakpoints) == 1
    odd = prefix(
        b'{"cache_control":{"type":"ephemeral"},"messages":[{"content":"x","cache_control" :1}]}'
    )
    assert len(odd.breakpoints) == 1
    string = (
        b'{"messages":[{"content":[ "cache_control"  ]},{"content":"cache_control"}],'
        b'"cache_control":%s}'
    )
    assert len(prefix(string % json.dumps(SHORT).encode()).breakpoints) == 1


def test_too_much_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that would hold up the loop are left alone."""
    body = {"messages": [user(text("a", SHORT))] * 5}
    monkeypatch.setattr(module, "_MAX_MARKS", 4)
    assert read(body) is None
    monkeypatch.setattr(module, "_MAX_MARKS", 5)
    assert len(prefix(body).breakpoints) == 4
    monkeypatch.setattr(module, "_COUNTED_FROM_BYTES", 10)
    monkeypatch.setattr(module, "_MAX_OBJECTS", 14)
    assert read(body) is None


def test_a_part_full_of_marks_is_gone_through_for_the_last_four_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than a provider takes; the way through a part goes on where the last one ended."""
    looked: list[tuple[int, int]] = []

    def counted(content: bytes, at: int, begin: int) -> int:
        looked.append((begin, at))
        return end_of_item(content, at, begin)

    monkeypatch.setattr(module, "end_of_item", counted)
    blocks = [text("a", SHORT), text("b"), *[text("c" * 50, SHORT) for _ in range(1000)]]
    found = prefix({"messages": [user(*blocks, text("d"))]})
    assert len(looked) == len(found.breakpoints) == 4
    assert [begin > 1 for begin, _ in looked] == [False, True, True, True]
    fewer = prefix({"messages": [user(text("a"), *blocks[1:-4], *blocks[-4:], text("d"))]})
    assert [each.digest for each in fewer.breakpoints] == [
        each.digest for each in found.breakpoints
    ]


def test_two_marks_in_one_block_end_where_it_ends() -> None:
    """A mark within a block and one at its end tell of one place."""
    inner = {"type": "tool_result", "content": [text("a", SHORT)], "cache_control": SHORT}
    found = prefix({"messages": [user(inner, text("b"), text("c", SHORT))]}).breakpoints
    assert len(found) == 3
    assert found[0].digest == found[1].digest != found[2].digest


@pytest.mark.parametrize("section", ["tools", "system", "messages"])
def test_nothing_is_said_of_a_block_among_too_many_brackets(section: str) -> None:
    """Where its end would take long to find, in a prompt that is read where it need not be."""

    def body(brackets: int, *after: Json) -> Json:
        blocks = [text("a", SHORT) | {"x": [[]] * brackets}, *after]
        others: Json = {"tools": [], "system": [], "messages": [user(text("e", SHORT))]}
        return others | {section: blocks if section != "messages" else [user(*blocks)]}

    assert read(body(8000, text("b"))) is not None
    assert read(body(9000, text("b"))) is None
    last = {"type": "x", "x": [[]] * 9000} | text("a", SHORT)
    assert read(body(0) | {section: [user(last)] if section == "messages" else [last]}) is not None


def test_nothing_is_said_of_too_many_messages() -> None:
    """Each costs a step."""
    messages = [user(text("a"))] * 2047
    assert read({"messages": [*messages, user(text("a", SHORT))]}) is not None
    assert read({"messages": [*messages, *messages, user(text("a", SHORT))]}) is None


def test_nothing_is_said_of_a_long_input_string() -> None:
    """It would be decoded in one go; a list of items that is as long is not."""
    longest = 262_144 - len('""')
    assert read({"input": "a" * longest}, Dialect.OPENAI_RESPONSES) is not None
    assert read({"input": "a" * (longest + 1)}, Dialect.OPENAI_RESPONSES) is None
    items = [{"role": "user", "content": "a" * 1000}]
    few, many = (prefix({"input": items * count}, Dialect.OPENAI_RESPONSES) for count in (200, 300))
    assert many.messages.startswith(few.messages)
    for bad in (1, {"role": "user"}, [1], [{"role": "user"}, "a"]):
        assert read({"input": bad, "x": "a" * 300_000}, Dialect.OPENAI_RESPONSES) is None
    assert read({"x": "a" * 300_000}, Dialect.OPENAI_RESPONSES) is None


def test_nothing_is_said_where_the_ends_of_blocks_are_far() -> None:
    """All parts together have a bound; what is marked at its end alone has none."""

    def part(size: int, *after: Json) -> Json:
        return user(text("a" * size, SHORT), *after)

    assert read({"messages": [part(250_000, text("b"))] * 2}) is not None
    assert read({"messages": [part(250_000, text("b"))] * 3}) is None
    lost = [part(250_000, text("b"))] * 3 + [user(text("c"))] * 300
    assert read({"messages": lost}) is None
    assert read({"messages": [part(500_000)] * 3}) is not None
    blanks = b'{"messages":[{"content":[{"text":"a","cache_control":{"type":"ephemeral"}%b}]}]}'
    far = prefix(blanks % (b" " * 5000))
    assert far.breakpoints[0].digest == far.tools + far.system + far.messages
    assert read(blanks % (b" " * 1_048_576)) is None


def test_large_bodies_give_the_loop_a_turn() -> None:
    """They are joined, decoded, searched and digested in a step each."""
    raw = json.dumps({"messages": [user(text("a" * 100_000, SHORT))]}).encode()
    reader = BodyReader(
        [(b"content-length", b"%d" % len(raw))],
        1 << 25,
        prefixes=PrefixReader(Dialect.ANTHROPIC, 7),
    )
    reader.feed(raw)
    assert len(list(reader.finish())) == 6
    assert reader.facts().prefix is not None


@pytest.mark.parametrize("dialect", [Dialect.ANTHROPIC, Dialect.OPENAI_CHAT])
def test_many_messages_are_digested_in_steps(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those at the beginning that are a system prompt, too; it is the same prefix."""
    roles = ["system"] * 300 + ["user"] * 600
    messages = [{"role": role, "content": [text("a" * 100, SHORT), 1]} for role in roles]
    body = {"messages": messages}
    in_steps = prefix(body, dialect)
    monkeypatch.setattr(module, "_STEP_MESSAGES", 1000)
    assert prefix(body, dialect) == in_steps
    assert bool(in_steps.second)


@pytest.mark.parametrize("style", STYLES)
def test_long_contents_are_digested_as_short_ones(
    style: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not copied where short ones are, which is quicker for these."""
    bodies = []
    for first in (text("a" * 50), {"type": "x", "y": [1, {}]}):
        for at in range(7):
            blocks = marked([first, text("b"), {"z": 1}], at)
            bodies.append({"tools": blocks, "messages": [user(*blocks), user(text("c", LONG))]})
    short = [prefix(body, **style) for body in bodies]
    monkeypatch.setattr(module, "_COUNTED_FROM_BYTES", 1)
    assert [prefix(body, **style) for body in bodies] == short


def test_a_long_mark_is_none() -> None:
    """A mark is seen where it is short, and so is the brace before a point."""
    for size, count in ((400, 1), (600, 0)):
        control = {"type": "ephemeral", "x": "a" * size}
        assert len(
            prefix({"messages": [user(text("a", control), text("b", SHORT))]}).breakpoints
        ) == (count + 1)
        found = read({"messages": [user(text("a"))], "cache_control": control})
        assert (found is not None) == bool(count)
    far = b'{"messages":[{"role":"user","content":[{%b"cachePoint":{"type":"default"}}]}]}'
    assert read(far % (b" " * 250), Dialect.BEDROCK_CONVERSE) is not None
    assert read(far % (b" " * 260), Dialect.BEDROCK_CONVERSE) is None


def test_blanks_around_the_end_of_a_block() -> None:
    """A block ends the same with blanks before its brace and without, where a text comes first."""
    raw = (
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"a"%b},'
        b'{"x":1,"cache_control":{"type":"ephemeral"}},{"cache_control":{"type":"ephemeral"}},1]}]}'
    )
    plain, spaced = prefix(raw % b""), prefix(raw % b" ")
    assert [each.size for each in plain.breakpoints] == [11, 14]
    assert [each.size for each in spaced.breakpoints] == [12, 15]
    raw = (
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"a",'
        b'"cache_control":{"type":"ephemeral"}%b},1]}]}'
    )
    assert prefix(raw % b"").breakpoints == prefix(raw % b" ").breakpoints
    first = user({"cachePoint": {"type": "default"}}, {"text": "a"})
    nothing, *_ = prefix({"messages": [first]}, Dialect.BEDROCK_CONVERSE).breakpoints
    assert nothing.size == len("[]")
    raw = (
        b'{"messages":[{"content":[{"type":"text","text":"a"}%b,'
        b'{"cachePoint":{"type":"default"}},{"text":"b"}]}]}'
    )
    plain, spaced = (prefix(raw % blank, Dialect.BEDROCK_CONVERSE) for blank in (b"", b" "))
    assert plain.breakpoints[0] == spaced.breakpoints[0]


def test_converse() -> None:
    """Its marks are blocks of their own, in the tools, the system prompt and the messages."""
    point = {"cachePoint": {"type": "default"}}
    hour = {"cachePoint": {"type": "default", "ttl": "1h"}}
    tools = [{"toolSpec": {"name": "a"}}]
    body = {
        "toolConfig": {"tools": [*tools, hour], "toolChoice": {"auto": {}}},
        "system": [{"text": "s"}, point],
        "messages": [user({"text": "a"}, point, {"text": "b"}), user({"text": "c"}, point)],
    }
    plain = {
        "toolConfig": {"tools": tools, "toolChoice": {"auto": {}}},
        "system": [{"text": "s"}],
        "messages": [user({"text": "a"}, {"text": "b"}), user({"text": "c"}, point)],
    }
    for style in STYLES[:2]:
        found = prefix(body, Dialect.BEDROCK_CONVERSE, **style)
        bare = prefix(plain, Dialect.BEDROCK_CONVERSE, **style)
        assert (found.tools, found.system) == (bare.tools, bare.system)
        assert found.messages == bare.messages
        assert [each.ttl_s for each in found.breakpoints] == [3600, 300, 300, 300]
        alone = prefix(
            body | {"messages": [user({"text": "a"}, point)]}, Dialect.BEDROCK_CONVERSE, **style
        )
        assert alone.breakpoints[-1].digest == found.breakpoints[2].digest
    leading = {"messages": [user(point, {"text": "a"}), user({"text": "c"}, point)]}
    assert prefix(leading, Dialect.BEDROCK_CONVERSE).messages


def test_chat() -> None:
    """The system prompt is what the first messages say; the calls of tools belong to a message."""
    system = {"role": "developer", "content": "rules"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    messages = [system, {"role": "user", "content": "hi"}, call]
    body = {"model": "m", "messages": messages, "tools": TOOLS}
    found = prefix(body, Dialect.OPENAI_CHAT)
    assert [each.ttl_s for each in found.breakpoints] == [0, 0]
    assert [each.messages for each in found.breakpoints] == [0, 2]
    other = prefix(
        body | {"messages": [*messages[:2], call | {"tool_calls": []}]}, Dialect.OPENAI_CHAT
    )
    assert other.messages[:16] == found.messages[:16]
    assert other.messages[16:] != found.messages[16:]
    asking = [system | {"content": [text("rules", LONG)]}, *messages[1:]]
    asked = prefix(body | {"messages": asking}, Dialect.OPENAI_CHAT)
    assert [each.ttl_s for each in asked.breakpoints] == [3600]
    assert asked.breakpoints[0].digest == found.breakpoints[0].digest
    alone = prefix({"messages": [system]}, Dialect.OPENAI_CHAT)
    assert alone.messages == b""
    assert len(prefix({"messages": [messages[1]]}, Dialect.OPENAI_CHAT).breakpoints) == 1


def test_responses() -> None:
    """A string is the user's message; where the provider has the rest, nothing is said."""
    one = prefix({"instructions": "rules", "input": "hi"}, Dialect.OPENAI_RESPONSES)
    items = [{"role": "user", "content": "hi"}]
    two = prefix({"instructions": "rules", "input": items}, Dialect.OPENAI_RESPONSES)
    assert one == two
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    three = prefix({"instructions": "rules", "input": [*items, output]}, Dialect.OPENAI_RESPONSES)
    assert three.messages[:16] == two.messages
    assert len(three.messages) == 32
    for name in ("previous_response_id", "conversation"):
        assert read({"input": "hi", name: "x"}, Dialect.OPENAI_RESPONSES) is None


def test_another_salt_gives_other_digests() -> None:
    """What one process makes tells nothing in another one."""
    raw = {"messages": [user(text("a", SHORT))]}
    reader = PrefixReader(Dialect.ANTHROPIC, 8)
    prompt = reader.read(json.dumps(raw).encode())
    with pytest.raises(StopIteration) as done:
        next(reader.prefix(prompt, None, 1, in_steps=False))
    other: Prefix = done.value.value
    assert other.messages != prefix(raw).messages


def test_random_prompts_in_any_cut_and_with_marks_anywhere() -> None:
    """Marks change no digest of a whole message, and cuts change nothing at all."""
    dice = random.Random(5)
    for round_ in range(150):
        style = dice.choice(STYLES)
        messages, bare = [], []
        for _ in range(dice.randint(1, 4)):
            blocks = [
                text(
                    dice.choice(["a", 'b"]}', "é\\", "[{", '"cache_control"']) * dice.randint(1, 3)
                )
                if dice.random() < 0.7
                else {"type": "x", "input": {"a": [{"b": [1, {}]}]}}
                for _ in range(dice.randint(1, 3))
            ]
            at = dice.randint(0, 2 * len(blocks))
            messages.append(user(*marked(blocks, at)))
            bare.append(user(*blocks))
        end = user(text("end", SHORT))
        raw = json.dumps({"system": "s", "messages": [*messages, end]}, **style).encode()
        found = prefix(raw)
        assert found.messages == prefix({"system": "s", "messages": [*bare, end]}, **style).messages
        for chunks in list(cuts(raw, seed=round_))[:3]:
            assert b"".join(chunks) == raw
            assert read(raw, pieces=max(map(len, chunks))) == found
