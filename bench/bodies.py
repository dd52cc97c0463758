"""What goes over the wire in a measure: requests, answers, and their cutting into frames.

Sizes and headers are those of Claude Code talking to LiteLLM 1.83.10. Every answer carries a
usage with a cache read, so that each peer that counts has something to count.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "MODEL",
    "PACED_INTERVAL_MS",
    "READ_TOKENS",
    "REQUEST",
    "REQUEST_HEADERS",
    "STREAM_REQUEST",
    "UPLOAD",
    "Answer",
    "burst",
    "message",
    "paced",
]

MODEL = "claude-sonnet-4-5"
READ_TOKENS = 2101
PACED_INTERVAL_MS = 20

REQUEST_HEADERS = {
    "content-type": "application/json",
    "accept": "application/json",
    "user-agent": "claude-cli/2.0.31 (external, cli)",
    "authorization": "Bearer sk-bench-0123456789abcdef",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "x-app": "cli",
}

_LITELLM_HEADERS = (
    ("date", "Mon, 24 Nov 2025 09:00:00 GMT"),
    ("server", "uvicorn"),
    ("x-litellm-call-id", "8f14e45f-ceea-467f-9a8b-0f2d6a1d2c31"),
    ("x-litellm-model-id", "1f3870be274f6c49b3e31a0c6728957f5d2c1f4e7a9b0c3d2e1f4a5b6c7d8e9f"),
    ("x-litellm-version", "1.83.10"),
    ("x-litellm-key-spend", "0.0134"),
    ("x-litellm-response-duration-ms", "1021.3"),
    ("x-litellm-overhead-duration-ms", "9.7"),
    ("x-litellm-team-alias", "Team Red"),
)

_USAGE = {
    "input_tokens": 7,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": READ_TOKENS,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 96,
    "service_tier": "standard",
}
_TEXT = "The cache holds the prefix of the prompt up to the breakpoint that was set in it. "


def _request(text: str, *, stream: bool = False) -> bytes:
    body = {
        "model": MODEL,
        "max_tokens": 1024,
        "stream": stream,
        "system": [
            {
                "type": "text",
                "text": _TEXT * 6,
                "cache_control": {"type": "ephemeral"},
            }
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
        "metadata": {"user_id": "user_0123456789abcdef_session_0123456789abcdef"},
    }
    return json.dumps(body).encode()


_QUESTION = "What does the cache hold? " * 8
REQUEST = _request(_QUESTION)
"""About 1 KB."""
STREAM_REQUEST = _request(_QUESTION, stream=True)
"""The same, asking for a stream."""
UPLOAD = _request(_TEXT * (1024 * 1024 // len(_TEXT)))
"""About 1 MB, as a long conversation is."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as the upstream writes it."""

    frames: tuple[bytes, ...]
    """Wire bytes, one write each; the first has the head."""
    body: bytes
    """What a client has to get, transfer coding aside."""

    def write(self, path: Path) -> None:
        """Write the file that `upstream.c` reads."""
        path.write_bytes(b"".join(struct.pack("<I", len(frame)) + frame for frame in self.frames))


def _head(content_type: str, framing: str) -> bytes:
    lines = [*_LITELLM_HEADERS, ("content-type", content_type)]
    return (
        "HTTP/1.1 200 OK\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in lines)
        + f"{framing}\r\n\r\n"
    ).encode()


@cache
def message() -> Answer:
    """Make a JSON answer of about 800 bytes."""
    body = json.dumps(
        {
            "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [{"type": "text", "text": _TEXT * 5}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": _USAGE,
        }
    ).encode()
    return Answer((_head("application/json", f"content-length: {len(body)}") + body,), body)


def _event(name: str, **members: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | members)}\n\n".encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _events(count: int) -> list[bytes]:
    start: dict[str, object] = {
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _USAGE | {"output_tokens": 1},
    }
    delta = {"type": "text_delta", "text": " breakpoint"}
    first = [
        _event("message_start", message=start),
        _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    ]
    last = [
        _event("content_block_stop", index=0),
        _event(
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={key: value for key, value in _USAGE.items() if key.endswith("_tokens")},
        ),
        _event("message_stop"),
    ]
    deltas = [_event("content_block_delta", index=0, delta=delta)] * (
        count - len(first) - len(last)
    )
    return first + deltas + last


_SSE_HEAD = ("text/event-stream; charset=utf-8", "transfer-encoding: chunked")


@cache
def burst(count: int = 300) -> Answer:
    """Make a stream whose events, an HTTP chunk each, come all at once."""
    events = _events(count)
    wire = _head(*_SSE_HEAD) + b"".join(map(_chunk, events)) + b"0\r\n\r\n"
    return Answer((wire,), b"".join(events))


@cache
def paced(count: int) -> Answer:
    """Make a stream whose events come one by one."""
    events = _events(count)
    frames = [_chunk(event) for event in events]
    frames[0] = _head(*_SSE_HEAD) + frames[0]
    frames[-1] += b"0\r\n\r\n"
    return Answer(tuple(frames), b"".join(events))
