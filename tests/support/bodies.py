"""Answers in the shapes of the dialects, and ways to cut them into chunks."""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sidecar.exchange import Dialect, End, Observation
from sidecar.observe.tap import tap_for

__all__ = [
    "ADDED",
    "JSON",
    "MESSAGES",
    "SSE",
    "chunk",
    "converse",
    "cuts",
    "damaged",
    "event",
    "frame",
    "frames",
    "invocation",
    "message",
    "observe",
    "response_event",
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
MESSAGES = [(b"content-type", b"application/vnd.amazon.eventstream")]


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


def chunk(usage: Any = None, *, choices: Any = None, **members: Any) -> bytes:
    """Write one event of a chat completion."""
    if choices is None:
        choices = [{"index": 0, "delta": {"content": 'a "prompt_tokens"'}, "finish_reason": None}]
    body = {"id": "chatcmpl-1", "model": "gpt-4o-2024-08-06", "choices": choices, "usage": usage}
    return f"data: {json.dumps(body | members)}\n\n".encode()


def response_event(name: str, **response: Any) -> bytes:
    """Write one event of a response, with the response as it then stands."""
    body = {"id": "resp_1", "model": "gpt-4o-2024-08-06", "error": None, "usage": None} | response
    return event(name, {"response": body})


def frame(headers: Mapping[str, str | bytes], payload: bytes = b"") -> bytes:
    """Write one message of an AWS event stream.

    Args:
        headers: strings; a value in bytes is written as it is, its type first.
    """
    packed = b""
    for name, value in headers.items():
        packed += bytes([len(name)]) + name.encode()
        if isinstance(value, str):
            packed += b"\x07" + struct.pack("!H", len(value.encode())) + value.encode()
        else:
            packed += value
    lengths = struct.pack("!II", 16 + len(packed) + len(payload), len(packed))
    body = lengths + struct.pack("!I", zlib.crc32(lengths)) + packed + payload
    return body + struct.pack("!I", zlib.crc32(body))


def frames(*events: tuple[str, Any], kind: str = "event") -> bytes:
    """Write messages with these names and JSON payloads."""
    return b"".join(
        frame(
            {f":{kind}-type": name, ":message-type": kind, ":content-type": "application/json"},
            payload if isinstance(payload, bytes) else json.dumps(payload).encode(),
        )
        for name, payload in events
    )


def converse(usage: Any) -> bytes:
    """Write a stream of `ConverseStream`."""
    return frames(
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"delta": {"text": "Hello"}, "contentBlockIndex": 0}),
        ("contentBlockStop", {"contentBlockIndex": 0}),
        ("messageStop", {"stopReason": "end_turn"}),
        ("metadata", {"usage": usage, "metrics": {"latencyMs": 812}}),
    )


def invocation(*events: Any) -> bytes:
    """Write a stream of `InvokeModelWithResponseStream`."""
    return frames(
        *[
            ("chunk", {"bytes": base64.b64encode(json.dumps(data).encode()).decode(), "p": "abc"})
            for data in events
        ]
    )


def observe(
    chunks: Sequence[bytes] | bytes,
    headers: Sequence[tuple[bytes, bytes]] = SSE,
    *,
    status_code: int = 200,
    end: End = End.COMPLETE,
    dialect: Dialect = Dialect.ANTHROPIC,
) -> Observation:
    """Read an answer through the tap."""
    tap = tap_for(dialect, status_code, headers)
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
