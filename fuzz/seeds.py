"""Writes the inputs that fuzzing begins with, made of the repository's own test data."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import brotli
import zstandard

from fuzz.harness import CONTROL_BYTES

__all__ = ["write_seeds"]

DATA = Path(__file__).parents[1] / "tests" / "data"
_ENCODE = (gzip.compress, zlib.compress, brotli.compress, zstandard.ZstdCompressor().compress)
_COUNTS = (
    b'{"inputTokens":7,"outputTokens":16,"cacheReadInputTokens":1,"cacheWriteInputTokens":3,'
    b'"cacheDetails":[{"ttl":"5m","inputTokens":1},{"ttl":"1h","inputTokens":2}]}'
)
_CONVERSED = b"\n".join(
    (b'0{"delta":{}}', b'1{"stopReason":"end_turn"}', b'2{"usage":%b}' % _COUNTS, b"!{}")
)
_NOVA = b'{"metadata":{"usage":%b}}' % _COUNTS


def _events(streams: list[bytes]) -> list[bytes]:
    """Give what the data lines of streams hold, of the shortest stream first."""
    lines = b"\n".join(sorted(streams, key=len)[:2]).splitlines()
    return [line[6:] for line in lines if line.startswith(b"data: {")]


def _bodies(suffix: str, dialect: str = "anthropic") -> list[bytes]:
    found = sorted((DATA / dialect).glob(f"*{suffix}"))
    return [path.read_bytes() for path in found if ".expected." not in path.name]


def _without_checksums(body: bytes) -> bytes:
    """Write zeros for the checksums of an AWS event stream."""
    text, at = bytearray(body), 0
    while at < len(text):
        end = at + int.from_bytes(text[at : at + 4], "big")
        text[at + 8 : at + 12] = text[end - 4 : end] = bytes(4)
        at = end
    return bytes(text)


def _cases(name: str) -> list[bytes]:
    lines = (DATA / "smuggling" / name).read_text().splitlines()
    return [json.loads(line)["bytes"].encode("latin-1") for line in lines]


def _seeds(target: str) -> Iterator[tuple[bytes, int]]:
    """Give inputs of a target, and what the control bytes of each are to say."""
    streams, messages = _bodies(".sse"), _bodies(".json")
    if target in ("tap", "rewrite"):
        yield from ((body, seed << 6) for body in messages for seed in range(2))
        yield from ((body, seed << 6 | 1) for body in streams for seed in range(2))
    if target == "tap":
        for coding, encode in enumerate(_ENCODE, 3):
            yield from ((encode(body), 1 << 6 | coding << 1 | 1) for body in streams)
    elif target == "openai":
        for number, dialect in enumerate(("openai_chat", "openai_responses")):
            for kind, suffix in enumerate((".json", ".sse")):
                control = 1 << 6 | number << 1 | kind
                yield from ((body, control) for body in _bodies(suffix, dialect))
    elif target == "bedrock":
        for number, dialect in enumerate(("bedrock_converse", "bedrock_invoke")):
            for shape, suffix in enumerate((".json", ".eventstream")):
                control = 1 << 6 | shape << 1 | number
                yield from ((body, control) for body in _bodies(suffix, dialect))
        # What their messages hold; the first byte of a line makes it one (`fuzz_bedrock`).
        for shape in (2, 3):
            yield _CONVERSED, 1 << 6 | shape << 1
            yield b"\n".join(b"c" + line for line in _events(streams)), 1 << 6 | shape << 1 | 1
            yield b"c" + _NOVA, 1 << 6 | shape << 1 | 1
    elif target == "request":
        text, mark = b'{"type":"text","text":"a"}', b'"cache_control":{"type":"ephemeral"}'
        marked = text[:-1] + b"," + mark + b"}"
        said = b'{"model":"m","system":[%b],"messages":[{"role":"user","content":[%b,%b]}],%b}'
        for number in range(5):
            yield said % (text, marked, text, mark), 1 << 4 | number
        yield b'{"input":"a","instructions":"b"}', 1 << 4 | 4
        yield b'{"messages":[{"content":[{"text":"a"},{"cachePoint":{"type":"default"}}]}]}', 1
        yield b'{"messages":[{"role":"system","content":"a\\ud83d"}],' + mark + b"}", 1 << 4
    elif target == "decoding":
        for coding, encode in enumerate(_ENCODE):
            yield from ((encode(body), 1 << 2 | coding) for body in messages)
            yield encode(b"\0" * 200_000), 1 << 2 | coding
    elif target == "sse":
        yield from ((body.replace(b'"usage"', b'"u"'), 1) for body in streams)
    elif target == "response":
        yield from ((raw, seed << 4 | 8) for raw in _cases("responses.jsonl") for seed in (0, 1))
    elif target == "head":
        yield from ((raw, 1 << 4) for raw in _cases("requests.jsonl"))
    elif target == "chunks":
        bodies = [raw.partition(b"\r\n\r\n")[2] for raw in _cases("requests.jsonl")]
        yield from ((body, 1) for body in bodies)
    elif target == "handshake":
        yield from ((raw, 0) for raw in _cases("handshakes.jsonl"))
    elif target == "answer":
        yield from ((raw, seed << 1 | 1) for raw in _cases("responses.jsonl") for seed in (0, 1))
        for raw in _cases("handshakes.jsonl"):
            yield raw.replace(b"GET /a HTTP/1.1", b"HTTP/1.1 101 Switching Protocols"), 1 << 1


def write_seeds(target: str, folder: Path) -> None:
    """Write the seeds of a target into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (body, control) in zip(count(), _seeds(target), strict=False):
        (folder / f"seed-{number}").write_bytes(body + control.to_bytes(CONTROL_BYTES, "big"))


if __name__ == "__main__":
    write_seeds(sys.argv[1], Path(sys.argv[2]))
