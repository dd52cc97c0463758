"""Answers in Anthropic's shapes, and ways to cut them into chunks."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sidecar.exchange import Dialect, End, Observation
from sidecar.observe.tap import tap_for

__all__ = [
    "ADDED",
    "JSON",
    "SSE",
    "cuts",
    "damaged",
    "event",
    "message",
    "observe",
    "stream",
    "without_additions",
]

ADDED = re.compile(
    rb',?"prompt_tokens_details":\{"cached_tokens":\d+(?:,"cache_creation_tokens":\d+)?\}'
    rb'(?:,"prompt_tokens":\d+)?(?:,"completion_tokens":\d+)?'
    rb'|,?"prompt_tokens":\d+(?:,"completion_tokens":\d+)?|,?"completion_tokens":\d+'
)

JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


def message(usage: Any, **members: Any) -> bytes:
    """Write a JSON answer."""
    body = {
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5-20250929",
        "content": [{"type": "text", "text": 'He said "usage" and {"usage": 1}'}],
        "usage": usage,
    }
    return json.dumps(body | members).encode()


def event(name: str, data: dict[str, Any]) -> bytes:
    """Write one event."""
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


def stream(
    start: Any, *deltas: Any, stop: Any = None, text: Sequence[str] = ("Hel", "lo 🌍")
) -> bytes:
    """Write an event stream with this usage in its start, its deltas and its stop."""
    head = {"id": "msg_01XFDUDYJgAACzvnptvVoYEL", "model": "claude-sonnet-4-5", "usage": start}
    parts = [event("message_start", {"message": head})]
    parts += [
        event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece}})
        for piece in text
    ]
    parts += [event("message_delta", {"delta": {}, "usage": usage}) for usage in deltas]
    parts.append(event("message_stop", {} if stop is None else {"usage": stop}))
    return b"".join(parts)


def observe(
    chunks: Sequence[bytes] | bytes,
    headers: Sequence[tuple[bytes, bytes]] = SSE,
    *,
    status_code: int = 200,
    end: End = End.COMPLETE,
) -> Observation:
    """Read an answer through the tap."""
    tap = tap_for(Dialect.ANTHROPIC, status_code, headers)
    for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
        tap.feed(chunk)
    return tap.finish(end)


def cuts(body: bytes, seed: int, rounds: int = 3) -> Iterator[list[bytes]]:
    """Cut a body: byte by byte, then at random places."""
    yield [body[i : i + 1] for i in range(len(body))]
    places = random.Random(seed)
    for _ in range(rounds):
        inner = sorted(places.choices(range(len(body) + 1), k=places.randint(1, 20)))
        bounds = [0, *inner, len(body)]
        yield [body[a:b] for a, b in itertools.pairwise(bounds)]


def without_additions(out: bytes, source: bytes) -> bytes:
    """Take out of `out` what was added to `source`.

    What the source has itself is not taken for an addition: it stands in both at the same place.
    """
    kept = bytearray()
    at = 0
    for match in ADDED.finditer(out):
        kept += out[at : match.start()]
        at = match.end()
        if source.startswith(match[0], len(kept)):
            kept += match[0]
    return bytes(kept + out[at:])


def damaged(body: bytes, dice: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Damage a body in one to six places: bytes changed, cut out, put in, or repeated.

    Args:
        tokens: what may be put in.
    """
    text = bytearray(body)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(text))
        kind = dice.randrange(4)
        if kind == 0:
            text[at] = dice.randrange(256)
        elif kind == 1:
            del text[at : at + dice.randint(1, 40)]
        elif kind == 2:
            text[at:at] = dice.choice(tokens)
        else:
            text[at:at] = text[at : at + 200]
        text = text or bytearray(b"x")
    return bytes(text)
