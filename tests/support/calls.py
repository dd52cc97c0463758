"""Calls as a client of the Messages API makes them, and the report's script of two of them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tests.support.wire import Answer, ask

__all__ = ["SONNET_USD", "ask_now", "body_for", "post", "request", "samples", "series_count"]

SONNET_USD = {
    "input_tokens": 3.0,
    "output_tokens": 15.0,
    "cache_read_input_tokens": 0.3,
    "ephemeral_5m_input_tokens": 3.75,
    "ephemeral_1h_input_tokens": 6.0,
}
"""What a million tokens cost of the model that the tests ask, by the name in its usage."""


def body_for(
    model: str,
    topic: str,
    *,
    tokens: int = 1500,
    question: str = "What is new?",
    stream: bool = False,
    ttl: str | None = "5m",
) -> dict[str, Any]:
    """Write the body of a call whose system prompt is to be cached.

    Args:
        topic: no two topics share a prefix.
        tokens: size of the system prompt as the stand-in counts it, four bytes each.
        ttl: time to live of the cache breakpoint; None for none.
    """
    text = (f"You know all about {topic}. " + "Every word of it matters. " * tokens)[: 4 * tokens]
    system: dict[str, Any] = {"type": "text", "text": text}
    if ttl is not None:
        system["cache_control"] = {"type": "ephemeral"} | ({"ttl": ttl} if ttl != "5m" else {})
    return {
        "model": model,
        "max_tokens": 64,
        "stream": stream,
        "system": [system],
        "messages": [{"role": "user", "content": question}],
    }


def request(
    method: str,
    target: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | dict[str, Any] | None = None,
    *,
    host: str = "llm.test",
) -> bytes:
    """Write one request as bytes; the same bytes for whoever is asked."""
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if raw is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(raw)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (raw or b"")


def post(body: dict[str, Any], key: str, **headers: str) -> bytes:
    """Write a call of the Messages API."""
    named = {"x-api-key": key, "anthropic-version": "2023-06-01"} | headers
    return request("POST", "/v1/messages", named, body)


async def send(url: str, raw: bytes, *, source: str | None = None) -> Answer:
    """Send a request to a URL's host and port, from a loopback address, and read the answer."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return await ask((parts.hostname, parts.port), raw, source=source, timeout_s=30)


def ask_now(url: str, raw: bytes, *, source: str | None = None) -> Answer:
    """Do the same where no loop runs."""
    return asyncio.run(send(url, raw, source=source))


_SAMPLE = re.compile(r"^([a-z_:]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def samples(exposition: str) -> list[tuple[str, dict[str, str], float]]:
    """Read name, labels and value of every sample of an exposition."""
    return [
        (name, dict(_LABEL.findall(labels)), float(value))
        for name, labels, value in _SAMPLE.findall(exposition)
    ]


def series_count(exposition: str) -> int:
    """Count the samples."""
    return len(samples(exposition))
