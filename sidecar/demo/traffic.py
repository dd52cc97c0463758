"""The demo's traffic: who asks what, how the provider is to misbehave, and what the client saw.

It knows the Messages API and the provider's markers. It must not know the sidecar: to a client
there is only an address. `python -m sidecar.demo.traffic` makes calls without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import click
import httpx

__all__ = ["KEYS", "MODELS", "SEARCH", "Ask", "Ending", "Key", "send", "the_round", "the_trickle"]

MODELS = ("claude-sonnet-4-5", "claude-haiku-4-5")

_BYTES_PER_TOKEN = 4  # the provider's rule
# Smallest prefix that the provider keeps, in tokens, and some room.
_LONG = {"claude-sonnet-4-5": 1200, "claude-haiku-4-5": 4300}
_MAX_TOKENS = 256
_CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and whose it is."""

    secret: str
    team: str
    """Its team's alias; `None`, in LiteLLM's spelling, for a key without team."""
    named_by_callback: bool = False
    """Whether the upstream names the team in a response header; else the team file does."""

    @property
    def hashed(self) -> str:
        """SHA-256 of the secret, in hex."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


SEARCH = Key("sk-demo-search", "search")
# The blank shows that the header's percent-encoding is undone.
DATA_SCIENCE = Key("sk-demo-data-science", "data science", named_by_callback=True)
LONER = Key("sk-demo-loner", "None")
KEYS = (SEARCH, DATA_SCIENCE, LONER)


class Ending(StrEnum):
    """How an exchange ended, as the client saw it."""

    COMPLETE = "complete"
    BROKEN = "broken"
    """The connection broke in the answer, or there was no answer."""
    ERROR_EVENT = "with an error event"
    """The stream said that it failed, and ended in good order."""
    LEFT = "left"
    """The client closed the connection in the middle of the answer."""
    REFUSED = "refused"
    """The status was not 2xx."""
    SHORT = "short"
    """The stream ended in good order, but without its last event. Nobody may do this."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One call to be made, and how it should end."""

    about: str
    """What it shows, in a few words."""
    key: Key
    model: str
    system: str
    """The system prompt."""
    question: str
    streamed: bool = False
    ttl: str | None = "5m"
    """Time to live of the cache breakpoint after the system prompt; None for no breakpoint."""
    ends: Ending = Ending.COMPLETE

    def body(self) -> dict[str, Any]:
        """The request's body, before it is JSON."""
        system: dict[str, Any] = {"type": "text", "text": self.system}
        if self.ttl is not None:
            system["cache_control"] = {"type": "ephemeral", "ttl": self.ttl}
        return {
            "model": self.model,
            "max_tokens": _MAX_TOKENS,
            "stream": self.streamed,
            "system": [system],
            "messages": [{"role": "user", "content": self.question}],
        }


async def send(client: httpx.AsyncClient, ask: Ask) -> Ending:
    """Make a call and read its answer as far as the ask says."""
    tail = b""
    events = b""
    headers = {"x-api-key": ask.key.secret, "anthropic-version": "2023-06-01"}
    try:
        async with client.stream(
            "POST", "/v1/messages", json=ask.body(), headers=headers
        ) as response:
            async for chunk in response.aiter_bytes():
                window = tail + chunk
                tail = window[-64:]
                for name in (b"content_block_delta", b"event: error", b"event: message_stop"):
                    if name in window and name not in events:
                        events += name
                if ask.ends is Ending.LEFT and b"content_block_delta" in events:
                    return Ending.LEFT
    except httpx.TransportError:
        return Ending.BROKEN
    if not response.is_success:
        return Ending.REFUSED
    if b"error" in events:
        return Ending.ERROR_EVENT
    if ask.streamed and b"message_stop" not in events:
        return Ending.SHORT
    return Ending.COMPLETE


def the_round() -> list[Ask]:
    """One of everything for each model, in an order in which the cache does what each `about`
    says; the refused call comes last, when its model has been answered before."""
    return [ask for model in MODELS for ask in _round_of(model)]


def _round_of(model: str) -> Iterator[Ask]:
    # No two prompts have the same size: a count in the wrong place is then a wrong count.
    for number, streamed in enumerate((False, True), start=1):
        system = _prompt(model, f"search {number}", extra=17 * number)
        # One read more in the second go: what is read and what is written must differ in sum.
        for about in ("write", *["read"] * number):
            yield Ask(about, SEARCH, model, system, "What is new?", streamed=streamed)
    yield Ask("too short to cache", SEARCH, model, "Be brief.", "What is this?")
    plain = _prompt(model, "plain", extra=51)
    yield Ask("caching not asked for", SEARCH, model, plain, "Why?", streamed=True, ttl=None)

    kept = _prompt(model, "data science", extra=68)
    yield Ask("write for an hour", DATA_SCIENCE, model, kept, "Sum it up.", streamed=True, ttl="1h")
    yield Ask("read", DATA_SCIENCE, model, kept, "Sum it up.", ttl="1h")
    yield _broken("cut after the start", DATA_SCIENCE, model, kept, "cut-after-start", ttl="1h")
    fresh = _prompt(model, "fresh", extra=85)
    yield _broken("write, cut in mid-stream", DATA_SCIENCE, model, fresh, "cut-mid-stream")
    yield _broken(
        "error in mid-stream", DATA_SCIENCE, model, fresh, "error-mid-stream", Ending.ERROR_EVENT
    )

    alone = _prompt(model, "alone", extra=102)
    for about, streamed in (("write", True), ("read", False), ("read", True)):
        yield Ask(about, LONER, model, alone, "Who is there?", streamed=streamed)
    slow = "Tell me all. [[event-gap-ms 20]] [[many-events 200]]"
    yield Ask("client leaves", LONER, model, alone, slow, streamed=True, ends=Ending.LEFT)
    yield Ask("529", LONER, model, alone, "Busy? [[status-529]]", ends=Ending.REFUSED)


def _broken(
    about: str,
    key: Key,
    model: str,
    system: str,
    marker: str,
    ends: Ending = Ending.BROKEN,
    *,
    ttl: str = "5m",
) -> Ask:
    question = f"Go on. [[{marker}]]"
    return Ask(about, key, model, system, question, streamed=True, ttl=ttl, ends=ends)


def the_trickle() -> Iterator[Ask]:
    """Calls without end: mostly reads, now and then a write and a prompt that is not cached."""
    for number in itertools.count():
        model = MODELS[number % len(MODELS)]
        key = KEYS[number // len(MODELS) % len(KEYS)]
        topic = f"{key.team}, part {number // 30}" if number % 5 == 4 else f"{key.team}, trickle"
        ttl = None if number % 7 == 6 else "5m"
        system = _prompt(model, topic)
        yield Ask("trickle", key, model, system, "And now?", streamed=number % 3 > 0, ttl=ttl)


def _prompt(model: str, topic: str, *, extra: int = 0) -> str:
    """A system prompt of so many more tokens than the provider's minimum; its topic comes first,
    so that no two share a prefix."""
    size = (_LONG[model] + extra) * _BYTES_PER_TOKEN
    head = f"You know everything about {topic}. "
    return (head + "All of it matters. " * (size // 18))[:size]


async def _make_calls(base_url: str, every_s: float) -> None:
    """Make the trickle's calls until a signal comes; say which of them did not end well."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for received in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(received, stop.set)
    async with httpx.AsyncClient(
        base_url=base_url, trust_env=False, timeout=_CALL_TIMEOUT_S
    ) as client:
        for made, ask in enumerate(the_trickle(), start=1):
            ending = await send(client, ask)
            if ending is not ask.ends:
                click.echo(f"call {made}, {ask.model}: {ending}", err=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), every_s)
            if stop.is_set():
                return


@click.command()
@click.option("--base-url", required=True, help="Where the calls go.")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.01),
    default=2.0,
    show_default=True,
    help="Seconds between an answer and the next call.",
)
def main(base_url: str, every_s: float) -> None:
    """Make calls without end, most of which read from the prompt cache."""
    asyncio.run(_make_calls(base_url, every_s))


if __name__ == "__main__":
    main()
