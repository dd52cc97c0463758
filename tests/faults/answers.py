"""What the upstream of a play says: a small answer of each kind, its framings, and bombs."""

from __future__ import annotations

import gzip
import json
from functools import cache

import brotli
import zstandard

__all__ = [
    "BLANKS",
    "CHUNKED_HEAD",
    "EVENTS",
    "INPUT",
    "JSON_BODY",
    "JSON_TYPE",
    "LAST_CHUNK",
    "MEGABYTE",
    "PING",
    "SSE_BODY",
    "SSE_TYPE",
    "STOP",
    "USAGE",
    "chunk",
    "chunked",
    "coded",
    "event",
    "head",
    "message",
    "padded",
    "padded_br",
    "padded_zstd",
    "sized",
    "start",
    "text",
    "unframed",
]

Headers = tuple[bytes, ...]

USAGE = {
    "input_tokens": 7,
    "cache_creation_input_tokens": 40,
    "cache_read_input_tokens": 2101,
    "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 10},
    "output_tokens": 1,
}
INPUT = {"uncached": 7, "read": 2101, "write_5m": 30, "write_1h": 10}
"""What it counts on the input side."""

JSON_TYPE = b"content-type: application/json"
SSE_TYPE = b"content-type: text/event-stream; charset=utf-8"


def compact(value: object) -> bytes:
    """Write JSON as providers do, without blanks."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(name: str, **members: object) -> bytes:
    """Write one event of a stream."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), compact({"type": name, **members}))


def start(usage: object = USAGE) -> bytes:
    """Write a `message_start`."""
    message = {"id": "msg_01", "type": "message", "model": "claude-sonnet-4-5", "usage": usage}
    return event("message_start", message=message)


def text(piece: str) -> bytes:
    """Write a piece of the answer's text."""
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})


def delta(**usage: object) -> bytes:
    """Write a `message_delta`."""
    return event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


PING = event("ping")
STOP = event("message_stop")
EVENTS = (start(), text("Hé 🌍"), PING, delta(output_tokens=16), STOP)
SSE_BODY = b"".join(EVENTS)


def message(usage: object, **members: object) -> bytes:
    """Write a JSON answer."""
    return compact(
        {
            "id": "msg_01",
            "type": "message",
            "model": "claude-sonnet-4-5",
            "content": [{"type": "text", "text": "Hé 🌍"}],
        }
        | members
        | {"usage": usage}
    )


JSON_BODY = message(USAGE | {"output_tokens": 16})


def head(*lines: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    """Write a response's head."""
    return b"\r\n".join([b"HTTP/%b %b" % (version, status), *lines, b"", b""])


def sized(body: bytes, *lines: bytes) -> bytes:
    """Write a response with a length; a stream of events if no line says otherwise."""
    return head(*(lines or (SSE_TYPE,)), b"content-length: %d" % len(body)) + body


def chunk(data: bytes) -> bytes:
    """Write one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
CHUNKED_HEAD = head(SSE_TYPE, b"transfer-encoding: chunked")


def chunked(*pieces: bytes, lines: Headers = (SSE_TYPE,)) -> bytes:
    """Write a response in chunks."""
    chunks = b"".join(map(chunk, pieces))
    return head(*lines, b"transfer-encoding: chunked") + chunks + LAST_CHUNK


def unframed(body: bytes, *lines: bytes) -> bytes:
    """Write a response that ends with its connection."""
    return head(*(lines or (SSE_TYPE,))) + body


# Bombs

MEGABYTE = 1 << 20


BLANKS = 200_000
"""Bytes of padding that come to no harm: less than any decoder of the sidecar's may expand to."""


@cache
def padded(blanks: int) -> bytes:
    """Make a JSON answer behind so many blanks, in gzip.

    In members of a megabyte, of which one is as long as the other (RFC 1952 section 2.2).
    """
    whole, rest = divmod(blanks, MEGABYTE)
    parts = [gzip.compress(b" " * MEGABYTE, mtime=0)] * whole
    return b"".join([*parts, gzip.compress(b" " * rest + JSON_BODY, mtime=0)])


@cache
def padded_br(blanks: int) -> bytes:
    """The same, in brotli."""
    whole, rest = divmod(blanks, MEGABYTE)
    packer = brotli.Compressor(quality=1)
    parts = [packer.process(b" " * MEGABYTE) for _ in range(whole)]
    return b"".join([*parts, packer.process(b" " * rest + JSON_BODY), packer.finish()])


@cache
def padded_zstd(blanks: int) -> bytes:
    """The same, in zstd, in frames (RFC 8878 section 3)."""
    whole, rest = divmod(blanks, MEGABYTE)
    packer = zstandard.ZstdCompressor(level=3)
    parts = [packer.compress(b" " * MEGABYTE)] * whole
    return b"".join([*parts, packer.compress(b" " * rest + JSON_BODY)])


def coded(coding: bytes, body: bytes) -> bytes:
    """Write a JSON answer whose body has a content coding."""
    return sized(body, JSON_TYPE, b"content-encoding: %b" % coding)
