"""How long a request's body can hold up the event loop: `python -m bench.hostile [NAME…]`.

Bodies that nobody sends by chance, and large ones that somebody does, are read as the relay
reads them, with miss reasons on: up to 64 KB in one go, longer ones in pieces of 64 KB and then
in the steps of `finish`. What a step takes is the processor time of the thread. A body is read
several times; shown is the longest step of that reading whose longest was the shortest, as
other work on the machine can only add to it.

After it the answer is counted and judged (`account/`), which counts as a step, too. The exit code
is 1 where a step took more than 5 ms. Names on the command line choose bodies that have them in
their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from time import thread_time
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from sidecar.account.ledger import Ledger
from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.exchange import (
    NO_USAGE,
    Dialect,
    End,
    Exchange,
    Observation,
    Route,
    Status,
)
from sidecar.observe import asking, prefix, request
from sidecar.observe.prefix import PrefixReader
from sidecar.observe.request import BodyReader

MAX_STEP_MS = 5.0
_STEP_BYTES = 64 * 1024
"""The relay's."""
_CAPTURE_BYTES = 32 * 1024 * 1024
_KB, _MB = 1024, 1024 * 1024
_MARK = b'"cache_control":{"type":"ephemeral"}'
_POINT = b'{"cachePoint":{"type":"default"}}'
_USAGE = NO_USAGE._replace(input_tokens=9, cache_creation_input_tokens=100_000)
_OBSERVATION = Observation(Status.COMPLETE, usage=_USAGE)

_ITEM = (
    b'{"role":1,"content":1,"type":1,"name":1,"arguments":1,"output":1,"call_id":1,'
    b'"encrypted_content":1},'
)

Make = Callable[[], bytes]


class Body(NamedTuple):
    """A body, and how it comes."""

    name: str
    make: Make
    dialect: Dialect = Dialect.ANTHROPIC
    sized: bool = True


class Read(NamedTuple):
    """How a body was read."""

    steps: int
    longest_ms: float
    total_ms: float
    known: str


def filled(before: bytes, unit: bytes, after: bytes, size: int) -> bytes:
    """Repeat a unit up to a size, without a comma behind the last one."""
    body = before + unit * ((size - len(before) - len(after)) // len(unit))
    return body.removesuffix(b",") + after


def _messages(unit: bytes, size: int, before: bytes = b"", after: bytes = b"") -> Make:
    return lambda: filled(b'{"model":"m",%b"messages":[' % before, unit, b"]%b}" % after, size)


def _content(unit: bytes, size: int) -> Make:
    """One message of many blocks, the last of which is marked."""
    return lambda: filled(
        b'{"model":"m","messages":[{"role":"user","content":[',
        unit,
        b',{"type":"text","text":"x",%b}]}]}' % _MARK,
        size,
    )


def _text(unit: bytes, size: int, *, list_: bool = True) -> Make:
    """One message of one long text, marked."""
    before, after = b'"', b'"'
    if list_:
        before, after = b'[{"type":"text","text":"', b'",%b}]' % _MARK
    return lambda: filled(
        b'{"model":"m","messages":[{"role":"user","content":%b' % before,
        unit,
        b"%b}]}" % after,
        size,
    )


def _last(before: bytes, unit: bytes, after: bytes, size: int) -> Make:
    """The content of one message."""
    return lambda: filled(
        b'{"model":"m","messages":[{"role":"user","content":[%b' % before,
        unit,
        b"%b]}]}" % after,
        size,
    )


def _member(name: bytes, unit: bytes, size: int, ends: bytes = b"[]") -> Make:
    """One member of the top level, and a marked message."""
    message = b'{"role":"user","content":[{"type":"text","text":"x",%b}]}' % _MARK
    return lambda: filled(
        b'{"model":"m","messages":[%b],"%b":%b' % (message, name, ends[:1]),
        unit,
        b"%b}" % ends[1:],
        size,
    )


def _top(unit: bytes, size: int) -> Make:
    """Many members of the top level."""
    return lambda: filled(b'{"model":"m",', unit, b"}", size)


def _nest(begin: bytes, core: bytes, end: bytes, size: int) -> Make:
    return lambda: (
        b'{"model":"m","x":'
        + begin * (count := size // len(begin + end))
        + core
        + end * count
        + b"}"
    )


def _raw(unit: bytes, size: int) -> Make:
    return lambda: filled(b"", unit, b"", size)


def _conversation(messages: int, size: int, *, marked: bool = True) -> Make:
    """What a coding agent sends: tools, a system prompt, and many messages of three kinds."""

    def make() -> bytes:
        text = 'A line of text, "quoted", with a path /a/b/c.py and a number 12345.\n'
        words = (text * (size // messages // len(text) + 1))[: size // messages - 150]
        turns: list[dict[str, object]] = []
        for at in range(messages // 2):
            use = {"type": "tool_use", "id": f"toolu_{at}", "name": "Bash", "input": {"c": words}}
            result = {"type": "tool_result", "tool_use_id": f"toolu_{at}", "content": words}
            turns.append({"role": "assistant", "content": [{"type": "text", "text": "Go."}, use]})
            turns.append({"role": "user", "content": [result]})
        control = {"cache_control": {"type": "ephemeral"}} if marked else {}
        schema = {"type": "object", "properties": {"c": {"type": "string", "description": "x"}}}
        tools = [
            {"name": f"t{at}", "description": text * 9, "input_schema": schema} for at in range(60)
        ]
        turns.append({"role": "user", "content": [{"type": "text", "text": "Next."} | control]})
        system = [{"type": "text", "text": text * 200} | control]
        whole = {"model": "m", "tools": tools, "system": system, "messages": turns, "stream": True}
        return json.dumps(whole, separators=(",", ":")).encode()

    return make


def _cases() -> Iterator[Body]:
    mib4 = 4 * _MB
    sizes = {
        "64K": 64 * _KB,
        "128K": 128 * _KB,
        "1M": _MB,
        "2M": 2 * _MB,
        "4M": mib4,
    }
    shapes: dict[str, Callable[[int], Make]] = {
        "text in a string": lambda n: _text(b"x", n, list_=False),
        "text in a marked block": lambda n: _text(b"x", n),
        "text of lines": lambda n: _text(rb"A line of text, and an end.\n", n),
        "text of backslashes": lambda n: _text(rb"\\", n),
        "text of escaped quotes": lambda n: _text(rb"\"", n),
        "text of \\u": lambda n: _text(rb"\u00e9", n),
        "text of emoji": lambda n: _text("🌍".encode(), n),
        "text of half emoji": lambda n: _text(rb"\ud83d", n),
        "text not UTF-8": lambda n: _text(b"\xff", n),
        "text of control characters": lambda n: _text(b"\n", n),
        "text of marks": lambda n: _text(rb"\"cache_control\": ", n),
        "marked messages": lambda n: _messages(
            b'{"role":"user","content":[{"type":"text","text":"a",%b}]},' % _MARK, n
        ),
        "short messages": lambda n: _messages(b'{"role":"user","content":"a"},', n),
        "empty messages": lambda n: _messages(b"{},", n),
        "messages that are none": lambda n: _messages(b"1,", n),
        "marked blocks": lambda n: _content(b'{"type":"text","text":"a",%b},' % _MARK, n),
        "false marks": lambda n: _content(b'{"cache_control":{"type":"string"}},', n),
        "keys of that name": lambda n: _content(b'{"cache_control":1},', n),
        "blocks": lambda n: _content(b'{"type":"text","text":"a"},', n),
        "blocks of one byte": lambda n: _content(b"1,", n),
        "blocks of []": lambda n: _content(b"[],", n),
        "blocks of [[[[]]]]": lambda n: _content(b"[[[[]]]],", n),
        "tools": lambda n: _member(b"tools", b'{"name":"a","input_schema":{}},', n),
        "marked tools": lambda n: _member(b"tools", b'{"name":"a",%b},' % _MARK, n),
        "system of blocks": lambda n: _member(b"system", b'{"type":"text","text":"a"},', n),
        "system in a string": lambda n: _member(b"system", b"x", n, b'""'),
        "system of escapes": lambda n: _member(b"system", rb"\n", n, b'""'),
        "model of [1,1": lambda n: _member(b"model", b"1,", n),
        "model of [[],[]": lambda n: _member(b"model", b"[],", n),
        "model of {}": lambda n: _member(b"model", b"{},", n),
        "model of strings": lambda n: _member(b"model", b'"a",', n),
        "marks of a text": lambda n: _content(
            b'{"a":1,"cache_control":{"x":"%b","type":"ephemeral"}},' % (b"x" * (n // 2 - 999)), n
        ),
        "a mark at the top of a text": lambda n: (
            lambda: filled(
                b'{"messages":[{"content":"a"}],"cache_control":{"type":"ephemeral","x":"',
                b"x",
                b'"}}',
                n,
            )
        ),
        "model of a text": lambda n: _member(b"model", b"x", n, b'""'),
        "model of escapes": lambda n: _member(b"model", rb"\u00e9", n, b'""'),
        "model of half emoji": lambda n: _member(b"model", rb"\ud83d", n, b'""'),
        "stream of {}": lambda n: _member(b"stream", b'{"a":1},', n),
        "members [] at the top": lambda n: _top(b'"a":[],', n),
        "[],[] at the top": lambda n: _top(b"[],", n),
        "members of one byte": lambda n: _top(b'"a":1,', n),
        "the model again and again": lambda n: _top(b'"model":"m",', n),
        "messages again and again": lambda n: _top(b'"messages":[{}],', n),
        "members and half an emoji": lambda n: _top(rb'"\ud83d":1,', n),
        "members of 1.5e300": lambda n: _top(b'"a":1.5e300,', n),
        "floats": lambda n: _member(b"x", b"1.234567890123e-300,", n),
        "1e999999": lambda n: _member(b"x", b"1e999999,", n),
        "digits": lambda n: _member(b"x", b"7", n, b"1 "),
        "digits for a model": lambda n: _member(b"model", b"7", n, b"1 "),
        "fraction for a model": lambda n: _member(b"model", b"7", n, b"0."),
        "blanks": lambda n: _member(b"x", b" ", n, b"[]"),
        "blanks before the last mark": lambda n: _last(b'{"a":1', b" ", b",%b}" % _MARK, n),
        "blanks behind a last comma": lambda n: _last(b'{"a":1,', b" ", b"%b}" % _MARK, n),
        "blanks behind a first comma": lambda n: _last(b"{%b," % _MARK, b" ", b'"a":1}', n),
        "blanks behind the last mark": lambda n: _last(b'{"a":1,%b' % _MARK, b" ", b"}", n),
        "blanks at the end": lambda n: _last(b'{"type":"text","text":"a"}', b" ", b"", n),
        "blanks at the beginning": lambda n: _last(
            b"", b" ", b'{"type":"text","text":"a",%b}' % _MARK, n
        ),
        "text behind a mark": lambda n: _last(b'{"a":1,%b},"' % _MARK, b"x", b'"', n),
        "strings of that name": lambda n: _content(b'"cache_control",', n),
        "blanks before a mark": lambda n: _content(b'{"a":1 %b},' % (b" " * 500), n),
        "nest of [": lambda n: _nest(b"[", b"", b"]", n),
        "nest of objects": lambda n: _nest(b'{"a":', b"1", b"}", n),
        "nest of strings": lambda n: _nest(b'["",', b"1", b"]", n),
        "unfinished [": lambda n: _raw(b"[", n),
        "unfinished {": lambda n: _raw(b'{"a":', n),
        "unfinished string": lambda n: lambda: b'{"model":"' + b"x" * n,
        "unfinished backslashes": lambda n: lambda: b'{"model":"' + b"\\" * n,
        "closing": lambda n: _raw(b"]}", n),
        "{}{}": lambda n: _raw(b"{}", n),
        "brackets of all kinds": lambda n: _raw(b"[{}{[[]]}]", n),
        "brackets below": lambda n: lambda: b'{"x":[[' + b"[[[]]]" * (n // 6),
        "brackets deep below": lambda n: lambda: b'{"x":' + b"[" * 99 + b"[[[[[]]]]]" * (n // 10),
        "brackets down and up": lambda n: (
            lambda: b'{"x":' + (b"[" * 4000 + b"]" * 3999) * (n // 8000)
        ),
        "brackets to the top": lambda n: lambda: b'{"x":' + b"[[[[]]]]," * (n // 9),
        "brackets and strings": lambda n: lambda: b'{"x":[' + b'["",["",[""]]],' * (n // 15),
        "brackets and escapes": lambda n: (
            lambda: b'{"x":[' + b'["\\"",["\\\\",["["]]],' * (n // 23)
        ),
        "quotes": lambda n: _raw(b'"', n),
        "strings": lambda n: lambda: b"{" + b'"",' * (n // 3),
        "backslashes": lambda n: _raw(b"\\", n),
        "bytes that are no text": lambda n: _raw(b"\xff", n),
        "marks alone": lambda n: _raw(b'"cache_control":{"type":"ephemeral","ttl":"5m"}', n),
        "marks with blanks": lambda n: _raw(b'"cache_control" : {' + b" " * 230, n),
    }
    for size_name, size in sizes.items():
        for name, shape in shapes.items():
            yield Body(f"{name}, {size_name}", shape(size))
    for name, shape in shapes.items():
        yield Body(f"{name}, chunked, 64K", shape(64 * _KB), sized=False)
        yield Body(f"{name}, chunked, 5M", shape(5 * _MB), sized=False)
    chat = _messages(b'{"role":"tool","name":"a","content":"b","tool_call_id":"c"},', _MB)
    raws = b'{"role":1,"content":1,"type":1,"name":1,"arguments":1,"output":1,"call_id":1},'
    for name, dialect, make in (
        ("short messages", Dialect.OPENAI_CHAT, chat),
        ("empty messages", Dialect.OPENAI_CHAT, _messages(b"{},", 128 * _KB)),
        ("text in a string", Dialect.OPENAI_CHAT, _text(b"x", mib4, list_=False)),
        ("text of half emoji", Dialect.OPENAI_CHAT, _text(rb"\ud83d", mib4, list_=False)),
        ("marked blocks", Dialect.OPENAI_CHAT, _content(b'{"text":"a",%b},' % _MARK, mib4)),
        ("items of members", Dialect.OPENAI_RESPONSES, _items(raws, _MB)),
        ("items of members", Dialect.OPENAI_RESPONSES, _items(raws, 128 * _KB)),
        ("items of members", Dialect.OPENAI_RESPONSES, _items(raws, mib4)),
        ("items of all members", Dialect.OPENAI_RESPONSES, _items(_ITEM, 16_000 * len(_ITEM))),
        ("items of nothing", Dialect.OPENAI_RESPONSES, _items(b"{},", 128 * _KB)),
        ("input of text", Dialect.OPENAI_RESPONSES, _member(b"input", b"x", 256 * _KB, b'""')),
        ("input of text", Dialect.OPENAI_RESPONSES, _member(b"input", b"x", mib4, b'""')),
        ("input of escapes", Dialect.OPENAI_RESPONSES, _member(b"input", rb"\n", mib4, b'""')),
        ("input of \\u", Dialect.OPENAI_RESPONSES, _member(b"input", rb"\u00e9", mib4, b'""')),
        ("input of \\u", Dialect.OPENAI_RESPONSES, _member(b"input", rb"\u00e9", _MB, b'""')),
        ("conversation of {}", Dialect.OPENAI_RESPONSES, _member(b"conversation", b"{},", _MB)),
        ("text", Dialect.OPENAI_CHAT, _text(b"x", mib4)),
        ("blanks at the end", Dialect.OPENAI_CHAT, _last(b"{}", b" ", b"", mib4)),
        (
            "system messages",
            Dialect.OPENAI_CHAT,
            _messages(
                b'{"role":"system","content":[{"type":"text","text":"a",%b},1]},' % _MARK, 80 * _KB
            ),
        ),
        ("points", Dialect.BEDROCK_CONVERSE, _converse(_POINT + b",", 64 * _KB)),
        ("points far from braces", Dialect.BEDROCK_CONVERSE, _far_points),
        ("points", Dialect.BEDROCK_CONVERSE, _converse(_POINT + b",", mib4)),
        ("false points", Dialect.BEDROCK_CONVERSE, _converse(b'{"cachePoint":1},', mib4)),
        ("braces", Dialect.BEDROCK_CONVERSE, _converse(b"{},", mib4)),
        ("text of half emoji", Dialect.BEDROCK_INVOKE, _text(rb"\ud83d", mib4)),
    ):
        yield Body(f"{dialect}: {name}, {len(make()) // _KB} KB", make, dialect)
    for name, module, constant, make_one in (
        ("messages", prefix, "_MAX_MESSAGES", lambda n: _messages_of(n, 400)),
        ("messages of 2 KB", prefix, "_MAX_MESSAGES", lambda n: _messages_of(n, 2000)),
        ("marked messages", prefix, "_MAX_MARKS", lambda n: _messages_of(n, 400, mark=True)),
        ("marks in one block", prefix, "_MAX_MARKS", _marks_in_one),
        ("marks in a 1 MB block", prefix, "_MAX_MARKS", lambda n: _marks_in_one(n, _MB - 99_999)),
        ("objects", prefix, "_MAX_OBJECTS", lambda n: _objects(n - 5)),
        ("brackets before a mark", prefix, "_MAX_BRACKETS", _brackets_before),
        ("bytes before a mark", prefix, "_MAX_WALKED_BYTES", _bytes_before),
        ("ends behind a mark", prefix, "_MAX_ENDS", _ends),
        ("roles of a message", request, "_MAX_TOKENS", _roles),
        ("models", request, "_MAX_TOKENS", lambda n: _top(b'"model":1,', 10 * n)),
        ("values", request, "_MAX_TOKENS", lambda n: _content(b"12345678,", 9 * n)),
        ("lists", request, "_MAX_TOKENS", lambda n: _content(b"[12345],", 4 * n)),
        ("blanks before 1,000 marks", prefix, "_MAX_BLANKS", _blanks_before),
        ("ends of blanks", prefix, "_MAX_BLANKS", _ends),
        ("ends of many blanks", prefix, "_COUNTED_FROM_BYTES", lambda n: _ends(n // 32)),
        ("false marks", asking, "_MAX_KEYS", _false_marks),
    ):
        bound = getattr(module, constant)
        for count in (bound - 200, bound + 200):
            yield Body(f"{name}: {count}, {constant} is {bound}", make_one(count))
    for bound in (request._STEP_BYTES, prefix._COUNTED_FROM_BYTES, request._COUNTED_FROM_BYTES):
        for size in (bound - 99, bound + 99):
            yield Body(f"[] in a message, {size} bytes", _content(b"[],", size))
            yield Body(f"{{}} in messages, {size} bytes", _messages(b"{},", size))
    names = _content(b'"cache_control",', 2_300_000)
    yield Body("strings of a mark's name, as many as are read", names)
    for over in (-99, 99):
        size = request._WHOLE_BYTES + over
        yield Body(f"conversation, {size} bytes", _content(b'{"text":"%b"},' % (b"x" * 900), size))
        yield Body(f"text, {size} bytes", _text(b"x", size))
    for count, size in ((100, 100 * _KB), (400, _MB), (800, 2 * _MB), (2000, 3900 * _KB)):
        yield Body(f"agent, {count} messages, {size // _KB} KB", _conversation(count, size))
        yield Body(
            f"agent on chat, {count} messages, {size // _KB} KB",
            _conversation(count, size, marked=False),
            Dialect.OPENAI_CHAT,
        )


def _items(unit: bytes, size: int) -> Make:
    return lambda: filled(b'{"model":"m","input":[', unit, b"]}", size)


def _converse(unit: bytes, size: int) -> Make:
    return lambda: filled(
        b'{"messages":[{"role":"user","content":[', unit, b',{"text":"a"}]}]}', size
    )


def _far_points() -> bytes:
    points = b",".join([b'"cachePoint"'] * 900)
    content = b'["%b",%b,%b]' % (b"x" * 4 * 1000 * _KB, points, _POINT)
    return b'{"messages":[{"role":"user","content":%b}]}' % content


def _messages_of(count: int, size: int, *, mark: bool = False) -> Make:
    one = b'{"role":"user","content":[{"type":"text","text":"%b"%b}]}' % (
        b"x" * size,
        b"," + _MARK if mark else b"",
    )
    last = b'{"role":"user","content":[{"type":"text","text":"end",%b}]}' % _MARK
    return lambda: b'{"model":"m","messages":[%b]}' % b",".join([*[one] * (count - 1), last])


def _marks_in_one(count: int, size: int = 10) -> Make:
    mark = b'{"type":"text","text":"a",%b}' % _MARK
    rest = b'{"type":"text","text":"%b"}' % (b"x" * size)
    blocks = b",".join([*[mark] * (count // 2), rest, *[mark] * (count - count // 2), rest[-40:]])
    blocks = blocks[: -min(40, len(rest))] + b'{"type":"text"}'
    return lambda: b'{"model":"m","messages":[{"role":"user","content":[%b]}]}' % blocks


def _objects(count: int) -> Make:
    blocks = b",".join([b'{"a":%d}' % (10**200)] * count)
    last = b'{"type":"text","text":"x",%b}' % _MARK
    return lambda: b'{"model":"m","messages":[{"role":"user","content":[%b,%b]}]}' % (blocks, last)


def _brackets_before(count: int) -> Make:
    block = b'{"x":[%b],%b}' % (b",".join([b"[]"] * (count - 10)), _MARK)
    return lambda: b'{"messages":[{"role":"user","content":[%b,{"a":1}]}]}' % block


def _bytes_before(count: int) -> Make:
    block = b'{"x":"%b",%b}' % (b"x" * count, _MARK)
    return lambda: b'{"messages":[{"role":"user","content":[%b,{"a":1}]}]}' % block


def _ends(count: int) -> Make:
    block = b'{"x":"a",%b%b}' % (_MARK, b" " * count)
    return lambda: b'{"messages":[%b]}' % b",".join([b'{"content":[%b]}' % block] * 1000)


def _roles(count: int) -> Make:
    roles = b'"role":12,' * count
    return lambda: b'{"model":"m","messages":[{%b"content":"a"}]}' % roles


def _blanks_before(count: int) -> Make:
    """So many blanks before and behind each of 1,000 marks in one block."""
    mark = b'{"a":1,%b%b%b},' % (b" " * count, _MARK, b" " * count)
    return lambda: b'{"messages":[{"role":"user","content":[%b{"a":1}]}]}' % (mark * 1000)


def _false_marks(count: int) -> Make:
    mark = b'{"cache_control":{"type":"%b"}}' % (b"x" * 200)
    return lambda: b'{"system":[%b]}' % b",".join([mark] * count)


def read(ledger: Ledger, body: bytes, dialect: Dialect, *, sized: bool) -> Read:
    """Read a body as the relay does, and judge its answer."""
    length = [(b"content-length", b"%d" % len(body))] if sized else []
    reader = BodyReader(
        length, _CAPTURE_BYTES, ttls=True, dialect=dialect, prefixes=PrefixReader(dialect, 7)
    )
    pieces = [body[at : at + _STEP_BYTES] for at in range(0, len(body), _STEP_BYTES)]
    steps: list[float] = []
    began = thread_time()

    def step() -> None:
        nonlocal began
        now = thread_time()
        steps.append(now - began)
        began = thread_time()

    for piece in pieces[:-1]:
        reader.feed(piece)
        step()
    reader.feed(pieces[-1])
    for _ in reader.finish():
        if len(pieces) > 1:
            step()
    step()
    facts = reader.facts()
    exchange = Exchange(
        route=Route.MESSAGES,
        method="POST",
        status_code=200,
        observed=True,
        end=End.COMPLETE,
        facts=facts,
        observation=_OBSERVATION,
        request_headers=[],
        response_headers=[],
        duration_s=1.0,
        first_byte_s=0.1,
        first_token_s=0.1,
        overhead_s=0.0001,
    )
    ledger.begin(Route.MESSAGES)
    began = thread_time()
    ledger.submit(exchange)
    step()
    known = ("m" if facts.model is not None else "-") + ("p" if facts.prefix is not None else "-")
    return Read(len(steps), max(steps) * 1e3, sum(steps) * 1e3, known)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all bodies, and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of the bodies to read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--over", type=float, default=0.0, help="show what takes more, in ms")
    options = parser.parse_args(arguments)
    settings = Settings(upstream="http://127.0.0.1:9", port=0, admin_port=0, usage_log="off")
    ledger = Sidecar(settings, registry=CollectorRegistry()).ledger
    logging.disable()
    gc.collect()
    gc.freeze()
    print("known: m, the model; p, the prefix\n")
    print("| body | size | steps | longest, ms | total, ms | known |\n|" + " --- |" * 6)
    over = count = 0
    for body in _cases():
        if options.names and not any(name in body.name for name in options.names):
            continue
        raw = body.make()
        rounds = [read(ledger, raw, body.dialect, sized=body.sized) for _ in range(options.rounds)]
        best = min(rounds, key=lambda each: each.longest_ms)
        count += 1
        over += best.longest_ms > MAX_STEP_MS
        if best.longest_ms >= options.over:
            print(
                f"| {body.name} | {len(raw)} | {best.steps} | {best.longest_ms:.2f} "
                f"| {best.total_ms:.1f} | {best.known} |",
                flush=True,
            )
    print(f"\n{count} bodies, {over} with a step over {MAX_STEP_MS:g} ms")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
