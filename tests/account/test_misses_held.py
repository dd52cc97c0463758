"""What the tracker of misses holds: how much, and nothing of any prompt."""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest

from sidecar.exchange import (
    Breakpoint,
    Observation,
    Outcome,
    Prefix,
    RequestFacts,
    Status,
    Usage,
)
from sidecar.observe.recall import MAX_HELD_BYTES
from tests.account.test_ledger import exchange
from tests.account.test_misses import SHORT, Play, block, facts_of, request, turns

CANARY = "canary-7d1f"


def reachable(root: object) -> Iterator[object]:
    """Go through all objects that one leads to, but for code."""
    seen: set[int] = set()
    left = [root]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, ModuleType | FunctionType | type | logging.Logger):
            continue
        seen.add(id(each))
        yield each
        left += gc.get_referents(each)


def texts(root: object) -> Iterator[str]:
    for each in reachable(root):
        if isinstance(each, str):
            yield each
        elif isinstance(each, bytes | bytearray):
            yield each.decode("latin-1")


def test_nothing_of_a_prompt_is_held_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Neither in any object that the ledger leads to, nor in a line of the log."""
    caplog.set_level(logging.DEBUG)
    play = Play()
    tools = [{"name": CANARY, "input_schema": {"title": CANARY}}]
    system = [block(f"{CANARY} rules " * 1000, SHORT)]
    said = [CANARY * 500]
    for _ in range(3):
        play.ask(request(tools=tools, system=system, messages=turns(*said)))
        said += [CANARY, f"{CANARY} more"]
    play.ask(request(tools=tools, system=[block("other" * 1000, SHORT)]))
    held = list(texts(play.books.ledger))
    assert any("claude-sonnet-4-5" in text for text in held), "the search finds what is there"
    assert [text for text in held if "canary" in text] == []
    # Nor what would lead back to it: the quick digests are hashed before they are kept.
    digests = facts_of(request(tools=tools, system=system, messages=turns(*said))).prefix
    assert digests is not None
    quick = {digests.tools, digests.system, digests.messages[:16], digests.messages[-16:]}
    raw = [each for each in reachable(play.books.ledger) if isinstance(each, bytes)]
    assert not [each for each in raw if any(digest in each for digest in quick)]
    assert "canary" not in caplog.text


def test_ten_thousand_conversations_take_less_than_64_mb() -> None:
    """With all that can be held of each: a key of its own, three breakpoints, two turns, four
    deployments, both TTLs."""
    play = Play(max_conversations=10_000)
    wrote = Observation(Status.COMPLETE, Usage(7, 5, 0, 6000, 5000, 1000))

    def ask(number: int, turn: int, deployment: str) -> None:
        dice = random.Random(number)
        tools, system, second = (dice.randbytes(16) for _ in range(3))
        messages = dice.randbytes(16 * (2 * turn + 1))
        digests = (tools, tools + system, tools + system + messages[-16:])
        prefix = Prefix(
            tools,
            system,
            messages,
            second if turn else b"",
            tuple(
                Breakpoint(digest, 300, 1000 * at, 2 * turn + 1)
                for at, digest in enumerate(digests, 1)
            ),
            4000,
        )
        facts = RequestFacts("m", None, True, None, prefix)
        given = exchange()._replace(facts=facts)
        key = hash(b"%d" % number)
        play.tracker.judge(given, wrote, Outcome.WRITE, key, deployment, 1024, None)

    gc.disable()  # it would go through all of it again and again
    try:
        for number in range(10_000):
            for turn, deployment in ((0, "a"), (1, "a"), (1, "b"), (1, "c"), (1, "d")):
                ask(number, turn, deployment)
    finally:
        gc.enable()
    # Memory is given out in pieces of 16 bytes.
    held = sum(sys.getsizeof(each) + 15 & ~15 for each in reachable(play.tracker))
    assert held > 5e6
    held += MAX_HELD_BYTES  # what the readers of requests know, at most
    assert held < 64e6, f"{held / 1e6:.1f} MB"
    print(f"{held / 1e6:.1f} MB")
