"""A stand-in for Anthropic's Messages API, with a prompt cache and a set of books.

Knows how the provider counts (cache prefixes, time to live, the shape of `usage`) and how its
answers look on the wire. It must not know that a sidecar or LiteLLM exists: what it says in its
books is the truth the sidecar is measured against, so it shares no code with the observing side.

Contract: every response that carried a usage has exactly one `BookEntry`, and the entry says only
what was handed to the client's connection. Answers are deterministic but for ids and times.

Behaviour on demand comes as markers in the text of the last user message, because that text is
the one part of a request that reaches a provider unchanged through LiteLLM:

    [[cut-after-start]]   the connection breaks right after the start of the answer
    [[cut-mid-stream]]    it breaks half-way through the content
    [[error-mid-stream]]  an `error` event half-way through the content, then a clean end
    [[hang-after-start]]  the start of the answer, then nothing until the client leaves
    [[slow]]              200 ms between events
    [[event-gap-ms N]]    N ms between events
    [[delay-ms N]]        N ms before the head of the answer
    [[many-events N]]     N content deltas
    [[status-N]]          an error answer with that status, 529 for example
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import secrets
import string
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

__all__ = [
    "ANTHROPIC",
    "BookEntry",
    "BookTotals",
    "Books",
    "CacheUse",
    "Dialect",
    "InvalidRequestError",
    "MessagesEndpoint",
    "PromptCache",
    "create_provider",
    "encode_sse",
    "main",
]

# platform.claude.com/docs/en/build-with-claude/prompt-caching.
MAX_BREAKPOINTS = 4
# Each breakpoint looks at this many block positions for an earlier write, itself included.
LOOK_BACK_BLOCKS = 20
MIN_PREFIX_TOKENS = 1024
MIN_PREFIX_TOKENS_LARGE = 4096
LARGE_PREFIX_MODELS = ("haiku-4-5", "opus-4-5")
TTL_SECONDS = {"5m": 300.0, "1h": 3600.0}

# What Anthropic documents for one image of the largest size that it does not scale down.
IMAGE_TOKENS = 1600
BYTES_PER_TOKEN = 4

DEFAULT_DELTAS = 6
SLOW_GAP_S = 0.2
# A marker is test input, not a way to keep a process busy for ever.
MAX_DELTAS = 1_000_000
MAX_MARKER_MS = 600_000

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}

MODELS = {
    "claude-opus-4-5-20251101": "Claude Opus 4.5",
    "claude-haiku-4-5-20251001": "Claude Haiku 4.5",
    "claude-sonnet-4-5-20250929": "Claude Sonnet 4.5",
}

Json = dict[str, Any]


class InvalidRequestError(Exception):
    """The request cannot be answered; the text is what the provider would say."""


# The prompt cache.


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What one request reads from the cache, what it will write, and what is left over.

    The four counts are disjoint and add up to the whole prompt.
    """

    input_tokens: int
    """Tokens neither read nor written."""
    cache_read_input_tokens: int
    ephemeral_5m_input_tokens: int
    """Tokens written with the five-minute time to live."""
    ephemeral_1h_input_tokens: int
    """Tokens written with the one-hour time to live."""
    writes: tuple[tuple[bytes, str], ...] = ()
    """Prefix and time to live of each entry that `PromptCache.commit` will make readable."""

    @property
    def cache_creation_input_tokens(self) -> int:
        """All tokens written, whatever their time to live."""
        return self.ephemeral_5m_input_tokens + self.ephemeral_1h_input_tokens


@dataclass(slots=True)
class _Entry:
    ttl_s: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Block:
    canonical: bytes
    tokens: int
    ttl: str | None
    cacheable: bool


class PromptCache:
    """Anthropic's prompt cache: prefixes of a prompt, kept for five minutes or an hour.

    One cache for all keys, because the demo and the tests have one organisation.
    Changes of `tool_choice` or `thinking`, which also invalidate real prefixes, are not modelled.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty.

        Args:
            clock: monotonic seconds.
        """
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}

    def look_up(self, model: str, body: Mapping[str, Any]) -> CacheUse:
        """Say what this request reads and what it writes; a read prolongs what it read.

        Args:
            model: the id the provider was asked for; caches of two models are apart.
            body: the decoded request.

        Raises:
            InvalidRequestError: as the provider does, for too many breakpoints, an unknown time
                to live, or an hour after five minutes.
        """
        blocks = list(_blocks(body))
        breakpoints = _breakpoints(blocks, body)
        now = self._clock()

        prefixes: list[bytes] = []
        sizes: list[int] = []
        state = hashlib.sha256(model.encode())
        total = 0
        for block in blocks:
            state.update(hashlib.sha256(block.canonical).digest())
            total += block.tokens
            prefixes.append(state.digest())
            sizes.append(total)

        read_at = -1
        for position, _ in breakpoints:
            for candidate in range(position, max(-1, position - LOOK_BACK_BLOCKS), -1):
                if self._live(prefixes[candidate], now) is not None:
                    read_at = max(read_at, candidate)
                    break
        read_tokens = sizes[read_at] if read_at >= 0 else 0
        for position in {read_at, *(at for at, _ in breakpoints if at < read_at)} - {-1}:
            entry = self._live(prefixes[position], now)
            if entry is not None:
                entry.expires_at = now + entry.ttl_s

        minimum = _minimum_prefix(model)
        writes = []
        written = {"1h": 0, "5m": 0}
        reached = read_tokens
        for position, ttl in breakpoints:
            # A prefix below the minimum is not kept, and the provider does not say so.
            if position <= read_at or sizes[position] < minimum:
                continue
            written[ttl] += sizes[position] - reached
            reached = sizes[position]
            writes.append((prefixes[position], ttl))
        return CacheUse(
            input_tokens=total - reached,
            cache_read_input_tokens=read_tokens,
            ephemeral_5m_input_tokens=written["5m"],
            ephemeral_1h_input_tokens=written["1h"],
            writes=tuple(writes),
        )

    def commit(self, use: CacheUse) -> None:
        """Make the entries of this request readable; call it when its response has begun."""
        now = self._clock()
        self._entries = {key: kept for key, kept in self._entries.items() if kept.expires_at > now}
        for prefix, ttl in use.writes:
            ttl_s = TTL_SECONDS[ttl]
            self._entries[prefix] = _Entry(ttl_s=ttl_s, expires_at=now + ttl_s)

    def clear(self) -> None:
        """Forget everything."""
        self._entries = {}

    def _live(self, prefix: bytes, now: float) -> _Entry | None:
        entry = self._entries.get(prefix)
        return entry if entry is not None and entry.expires_at > now else None


def _minimum_prefix(model: str) -> int:
    large = any(name in model for name in LARGE_PREFIX_MODELS)
    return MIN_PREFIX_TOKENS_LARGE if large else MIN_PREFIX_TOKENS


def _blocks(body: Mapping[str, Any]) -> Iterator[_Block]:
    """All blocks of a prompt in the provider's order: tools, system, messages."""
    for tool in body.get("tools") or ():
        yield _block("tools", tool)
    for item in _content(body.get("system") or ()):
        yield _block("system", item)
    for message in body.get("messages") or ():
        if not isinstance(message, dict):
            raise InvalidRequestError("messages: Input should be a valid dictionary")
        for item in _content(message.get("content") or ()):
            yield _block(f"messages/{message.get('role')}", item)


def _content(content: object) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list | tuple):
        return list(content)
    raise InvalidRequestError("content: Input should be a valid string or list")


def _block(section: str, item: object) -> _Block:
    if not isinstance(item, dict):
        raise InvalidRequestError(f"{section}: Input should be a valid dictionary")
    control = item.get("cache_control")
    bare = _without_cache_control(item)
    return _Block(
        canonical=f"{section}\0{_canonical(bare)}".encode(),
        tokens=_tokens(bare),
        ttl=None if control is None else _ttl(control),
        # Thinking cannot carry a breakpoint and empty text cannot be cached.
        cacheable=item.get("type") not in ("thinking", "redacted_thinking")
        and item.get("text") != "",
    )


def _without_cache_control(value: Any) -> Any:
    """The value without its markers: moving a breakpoint does not change a prefix."""
    if isinstance(value, dict):
        return {k: _without_cache_control(v) for k, v in value.items() if k != "cache_control"}
    if isinstance(value, list):
        return [_without_cache_control(item) for item in value]
    return value


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _tokens(item: Json) -> int:
    kind = item.get("type")
    if kind == "image":
        return IMAGE_TOKENS
    if kind == "text" and isinstance(item.get("text"), str):
        return _text_tokens(item["text"])
    return _text_tokens(_canonical(item))


def _text_tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def _ttl(control: object) -> str:
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise InvalidRequestError("cache_control.type: Input should be 'ephemeral'")
    ttl = control.get("ttl") or "5m"
    if ttl not in TTL_SECONDS:
        raise InvalidRequestError("cache_control.ephemeral.ttl: Input should be '5m' or '1h'")
    return str(ttl)


def _breakpoints(blocks: list[_Block], body: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Position and time to live of every breakpoint, in order, the automatic one included."""
    found = {at: block.ttl for at, block in enumerate(blocks) if block.ttl is not None}
    automatic = body.get("cache_control")
    if automatic is not None:
        ttl = _ttl(automatic)
        last = next((at for at in reversed(range(len(blocks))) if blocks[at].cacheable), None)
        if last is not None and found.setdefault(last, ttl) != ttl:
            raise InvalidRequestError("cache_control: the last block has another ttl")
    if len(found) > MAX_BREAKPOINTS:
        raise InvalidRequestError(
            "A maximum of 4 blocks with cache_control may be provided. "
            f"Found {len(found)}."  # the provider's own words
        )
    ordered = sorted(found.items())
    ttls = [ttl for _, ttl in ordered]
    if "5m" in ttls and "1h" in ttls[ttls.index("5m") :]:
        raise InvalidRequestError(
            "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block"
        )
    return ordered


# The books.


@dataclass(frozen=True, slots=True)
class BookEntry:
    """What the provider says is true for one response."""

    sequence: int
    """1 for the first response of these books."""
    model: str
    """The model id as the provider was asked."""
    key: str
    """SHA-256 (hex) of the key the provider was given; empty where it was given none."""
    streamed: bool
    input_tokens: int
    """Neither read nor written."""
    output_tokens: int
    """As last said to the client."""
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int
    completed: bool = False
    """The whole response was handed over."""
    closed_at: float | None = None
    """Monotonic seconds when the client left before the end; None when it did not."""


@dataclass(frozen=True, slots=True)
class BookTotals:
    """Sums over entries, under the names of the provider's own counts."""

    responses: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    ephemeral_5m_input_tokens: int = 0
    ephemeral_1h_input_tokens: int = 0


class Books:
    """All entries, in the order in which the responses began."""

    def __init__(self) -> None:
        self.entries: list[BookEntry] = []
        self.departures: list[float] = []
        """Monotonic seconds of clients that left before anything was said to them."""

    def record(
        self, *, model: str, key: str, streamed: bool, use: CacheUse, output_tokens: int
    ) -> BookEntry:
        """Enter a response whose first usage was just handed over."""
        entry = BookEntry(
            sequence=len(self.entries) + 1,
            model=model,
            key=key,
            streamed=streamed,
            input_tokens=use.input_tokens,
            output_tokens=output_tokens,
            cache_read_input_tokens=use.cache_read_input_tokens,
            cache_creation_input_tokens=use.cache_creation_input_tokens,
            ephemeral_5m_input_tokens=use.ephemeral_5m_input_tokens,
            ephemeral_1h_input_tokens=use.ephemeral_1h_input_tokens,
        )
        self.entries.append(entry)
        return entry

    def revise(
        self,
        sequence: int,
        *,
        output_tokens: int | None = None,
        completed: bool | None = None,
        closed_at: float | None = None,
    ) -> None:
        """Replace the given fields of one entry; None leaves a field as it was."""
        entry = self.entries[sequence - 1]
        self.entries[sequence - 1] = replace(
            entry,
            output_tokens=entry.output_tokens if output_tokens is None else output_tokens,
            completed=entry.completed if completed is None else completed,
            closed_at=entry.closed_at if closed_at is None else closed_at,
        )

    def totals(self, model: str | None = None, key: str | None = None) -> BookTotals:
        """Sum the entries of a model and of a key (SHA-256 hex); None takes all."""
        chosen = [
            entry
            for entry in self.entries
            if model in (None, entry.model) and key in (None, entry.key)
        ]
        sums = {
            field.name: sum(getattr(entry, field.name) for entry in chosen)
            for field in dataclass_fields(BookTotals)
            if field.name != "responses"
        }
        return BookTotals(responses=len(chosen), **sums)


# The wire.


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one cloud dresses the same answer."""

    message_id_prefix: str
    media_type: str
    """Content type of a stream."""
    encode: Callable[[str, Json], bytes]
    """One event, from its name and its data, to bytes."""
    headers: Callable[[Json], dict[str, str]]
    """Response headers, from the first usage of the answer."""
    stop_fields: Callable[[Json], Json]
    """Members that the last event of a stream has besides its type, from the final usage."""
    error: Callable[[int, str], Response]
    """An error answer, from its status and message."""


# Anthropic's edge pads some data lines with blanks so that their length says nothing about
# their text.
_PADDED_EVENTS = frozenset({"content_block_delta", "content_block_stop", "message_stop"})


def encode_sse(name: str, data: Json) -> bytes:
    """One server-sent event as Anthropic writes it, blanks before the last brace included."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    if name in _PADDED_EVENTS:
        text = text[:-1] + " " * (len(text) * 7 % 16) + "}"
    return f"event: {name}\ndata: {text}\n\n".encode()


def _anthropic_headers(_usage: Json) -> dict[str, str]:
    reset = (datetime.now(UTC) + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    limits = {"requests": 4000, "input-tokens": 2_000_000, "output-tokens": 400_000}
    headers = {
        "request-id": _new_id("req_011C", 20),
        "anthropic-organization-id": "5e1f0c2a-8a35-4d0e-9d40-6f0f5a7c0001",
        "strict-transport-security": "max-age=31536000; includeSubDomains; preload",
        "cf-cache-status": "DYNAMIC",
    }
    for name, limit in limits.items():
        headers[f"anthropic-ratelimit-{name}-limit"] = str(limit)
        headers[f"anthropic-ratelimit-{name}-remaining"] = str(limit)
        headers[f"anthropic-ratelimit-{name}-reset"] = reset
    return headers


def _anthropic_error(status: int, message: str) -> Response:
    request_id = _new_id("req_011C", 20)
    error = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
    headers = {"request-id": request_id, "x-should-retry": "true" if status >= 429 else "false"}
    body = {"type": "error", "error": error, "request_id": request_id}
    return JSONResponse(body, status_code=status, headers=headers)


def _no_stop_fields(_usage: Json) -> Json:
    return {}


ANTHROPIC = Dialect(
    message_id_prefix="msg_01",
    media_type="text/event-stream; charset=utf-8",
    encode=encode_sse,
    headers=_anthropic_headers,
    stop_fields=_no_stop_fields,
    error=_anthropic_error,
)

_ID_ALPHABET = string.ascii_letters + string.digits


def _new_id(prefix: str, length: int) -> str:
    return prefix + "".join(secrets.choice(_ID_ALPHABET) for _ in range(length))


@dataclass(frozen=True, slots=True)
class _Script:
    """What the markers of one request ask for."""

    cut_after_start: bool = False
    cut_mid_stream: bool = False
    error_mid_stream: bool = False
    hang_after_start: bool = False
    gap_s: float = 0.0
    delay_s: float = 0.0
    deltas: int = DEFAULT_DELTAS
    status: int | None = None


_MARKER = re.compile(r"\[\[([a-z][a-z-]*?)(?:[- ](\d{1,9}))?\]\]")


def _script(body: Mapping[str, Any]) -> _Script:
    script = _Script()
    for name, digits in _MARKER.findall(_last_user_text(body)):
        number = int(digits or 0)
        match name:
            case "cut-after-start":
                script = replace(script, cut_after_start=True)
            case "cut-mid-stream":
                script = replace(script, cut_mid_stream=True)
            case "error-mid-stream":
                script = replace(script, error_mid_stream=True)
            case "hang-after-start":
                script = replace(script, hang_after_start=True)
            case "slow":
                script = replace(script, gap_s=SLOW_GAP_S)
            case "event-gap-ms":
                script = replace(script, gap_s=min(number, MAX_MARKER_MS) / 1000)
            case "delay-ms":
                script = replace(script, delay_s=min(number, MAX_MARKER_MS) / 1000)
            case "many-events":
                script = replace(script, deltas=min(max(number, 1), MAX_DELTAS))
            case "status" if 400 <= number <= 599:
                script = replace(script, status=number)
            case _:
                # Anything else in brackets is prompt text, not ours to refuse.
                pass
    return script


def _last_user_text(body: Mapping[str, Any]) -> str:
    for message in reversed(body.get("messages") or []):
        if isinstance(message, dict) and message.get("role") == "user":
            items = _content(message.get("content") or ())
            return "\n".join(str(item.get("text", "")) for item in items if isinstance(item, dict))
    return ""


@dataclass(frozen=True, slots=True)
class _Order:
    """One request, understood: everything needed to answer it."""

    model: str
    key: str
    streamed: bool
    use: CacheUse
    script: _Script
    pieces: tuple[str, ...]
    """Text of the content deltas."""

    @property
    def output_tokens(self) -> int:
        return max(1, sum(_text_tokens(piece) for piece in self.pieces))

    def first_usage(self, output_tokens: int) -> Json:
        """The usage of a JSON answer or of `message_start`."""
        return {
            "input_tokens": self.use.input_tokens,
            "cache_creation_input_tokens": self.use.cache_creation_input_tokens,
            "cache_read_input_tokens": self.use.cache_read_input_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.use.ephemeral_5m_input_tokens,
                "ephemeral_1h_input_tokens": self.use.ephemeral_1h_input_tokens,
            },
            "output_tokens": output_tokens,
            "service_tier": "standard",
            "inference_geo": "not_available",
        }

    def final_usage(self) -> Json:
        """The cumulative usage of `message_delta`, which has no split of the write."""
        return {
            "input_tokens": self.use.input_tokens,
            "cache_creation_input_tokens": self.use.cache_creation_input_tokens,
            "cache_read_input_tokens": self.use.cache_read_input_tokens,
            "output_tokens": self.output_tokens,
        }


_WORDS = ("The prompt ", "was read ", "block by block", ", and what ", "was known ", "was cheap. ")


def _message(message_id: str, model: str, content: list[Json], usage: Json, stop: Any) -> Json:
    return {
        "model": model,
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": usage,
    }


def _response_model(model: str) -> str:
    """The name an answer carries: clouds spell the model their own way, answers do not."""
    name = model.rsplit("/", 1)[-1].replace("@", "-")
    found = re.search(r"claude-.*?(?=-v\d+(?::\d+)?$|$)", name)
    return found.group() if found else name


class MessagesEndpoint:
    """The ASGI application behind every route that generates a message.

    It is an application and not a function returning a `Response` because a broken answer must
    break: it returns in the middle of a body, on which uvicorn closes the connection.
    """

    def __init__(
        self,
        *,
        books: Books,
        cache: PromptCache,
        dialect: Dialect = ANTHROPIC,
        clock: Callable[[], float] = time.monotonic,
        authenticate: Callable[[Request], str | None] | None = None,
        model_of: Callable[[Request, Json], object] | None = None,
        streamed_of: Callable[[Request, Json], bool] | None = None,
    ) -> None:
        """Bind the shared state to one dialect.

        Args:
            books: where responses are entered.
            cache: shared by all routes of one provider.
            dialect: how this cloud writes its answers.
            clock: monotonic seconds, for `closed_at`.
            authenticate: the request's key hashed, empty for a cloud without keys, None to refuse.
            model_of: where this cloud names the model; the body's `model` by default.
            streamed_of: whether this cloud streams; the body's `stream` by default.
        """
        self._books = books
        self._cache = cache
        self._dialect = dialect
        self._clock = clock
        self._authenticate = authenticate or hashed_key
        self._model_of = model_of or _model_in_body
        self._streamed_of = streamed_of or _stream_in_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        try:
            outcome = await self._understand(request)
        except ClientDisconnect:
            return
        if isinstance(outcome, Response):
            await outcome(scope, receive, send)
            return
        client = _Client(receive, self._clock)
        try:
            if outcome.streamed:
                await self._stream(outcome, client, send)
            else:
                await self._answer(outcome, client, send)
        finally:
            client.close()

    async def _understand(self, request: Request) -> _Order | Response:
        key = self._authenticate(request)
        if key is None:
            return self._dialect.error(401, "x-api-key header is required")
        body = _decoded(await request.body())
        if body is None:
            return self._dialect.error(400, "The request body is not valid JSON")
        model = self._model_of(request, body)
        try:
            if not isinstance(model, str) or not model:
                raise InvalidRequestError("model: Field required")
            if not isinstance(body.get("messages"), list) or not body["messages"]:
                raise InvalidRequestError("messages: Field required")
            max_tokens = body.get("max_tokens")
            if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
                raise InvalidRequestError("max_tokens: Field required")
            script = _script(body)
            if script.status is not None:
                text = "Overloaded" if script.status == 529 else f"asked for {script.status}"
                return self._dialect.error(script.status, text)
            use = self._cache.look_up(model, body)
        except InvalidRequestError as fault:
            return self._dialect.error(400, str(fault))
        return _Order(
            model=model,
            key=key,
            streamed=self._streamed_of(request, body),
            use=use,
            script=script,
            pieces=tuple(_WORDS[at % len(_WORDS)] for at in range(script.deltas)),
        )

    async def _answer(self, order: _Order, client: _Client, send: Send) -> None:
        """A JSON answer. With a marker that breaks streams it is cut in the middle of its body."""
        script = order.script
        if await client.leaves_within(math.inf if script.hang_after_start else script.delay_s):
            self._books.departures.append(client.left_at or self._clock())
            return
        usage = order.first_usage(order.output_tokens)
        content = [{"type": "text", "text": "".join(order.pieces)}]
        message_id = _new_id(self._dialect.message_id_prefix, 22)
        message = _message(message_id, _response_model(order.model), content, usage, "end_turn")
        body = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        await _send_head(send, self._dialect.headers(usage) | headers)
        self._cache.commit(order.use)
        if script.cut_after_start or script.cut_mid_stream or script.error_mid_stream:
            await _send_body(send, body[: len(body) // 2], more=True)
            return
        entry = self._books.record(
            model=order.model,
            key=order.key,
            streamed=False,
            use=order.use,
            output_tokens=order.output_tokens,
        )
        # Entered before the last byte leaves, so that who has read the answer finds it in the
        # books.
        self._books.revise(entry.sequence, completed=client.left_at is None)
        await _send_body(send, body, more=False)

    async def _stream(self, order: _Order, client: _Client, send: Send) -> None:
        """A streamed answer, event by event, entered as far as it was handed over."""
        if await client.leaves_within(order.script.delay_s):
            self._books.departures.append(client.left_at or self._clock())
            return
        usage = order.first_usage(1)
        headers = {"content-type": self._dialect.media_type, "cache-control": "no-cache"}
        await _send_head(send, self._dialect.headers(usage) | headers)
        self._cache.commit(order.use)
        sequence = 0
        for name, data in self._events(order, usage):
            if sequence and await client.leaves_within(order.script.gap_s):
                self._books.revise(sequence, closed_at=client.left_at)
                return
            if name == "cut":
                return
            if name == "hang":
                await client.leaves_within(math.inf)
                self._books.revise(sequence, closed_at=client.left_at)
                return
            payload = self._dialect.encode(name, data)
            if name == "message_start":
                sequence = self._books.record(
                    model=order.model,
                    key=order.key,
                    streamed=True,
                    use=order.use,
                    output_tokens=usage["output_tokens"],
                ).sequence
            elif name == "message_delta":
                self._books.revise(sequence, output_tokens=order.output_tokens)
            elif name == "message_stop":
                self._books.revise(sequence, completed=True)
            await _send_body(send, payload, more=True)
        await _send_body(send, b"", more=False)

    def _events(self, order: _Order, usage: Json) -> Iterator[tuple[str, Json]]:
        """The events of one stream; `cut` and `hang` are stage directions, not events."""
        script = order.script
        message_id = _new_id(self._dialect.message_id_prefix, 22)
        message = _message(message_id, _response_model(order.model), [], usage, None)
        yield "message_start", {"type": "message_start", "message": message}
        if script.cut_after_start:
            yield "cut", {}
        if script.hang_after_start:
            yield "hang", {}
        block = {"type": "text", "text": ""}
        yield (
            "content_block_start",
            {"type": "content_block_start", "index": 0, "content_block": block},
        )
        yield "ping", {"type": "ping"}
        for at, piece in enumerate(order.pieces):
            if at == len(order.pieces) // 2:
                if script.cut_mid_stream:
                    yield "cut", {}
                if script.error_mid_stream:
                    error = {"type": "overloaded_error", "message": "Overloaded"}
                    yield "error", {"type": "error", "error": error}
                    return
            delta = {"type": "text_delta", "text": piece}
            yield (
                "content_block_delta",
                {"type": "content_block_delta", "index": 0, "delta": delta},
            )
        yield "content_block_stop", {"type": "content_block_stop", "index": 0}
        final = order.final_usage()
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        yield "message_delta", {"type": "message_delta", "delta": end, "usage": final}
        yield "message_stop", {"type": "message_stop", **self._dialect.stop_fields(final)}


class _Client:
    """Notices when the client leaves, while an answer waits or is written."""

    def __init__(self, receive: Receive, clock: Callable[[], float]) -> None:
        self.left_at: float | None = None
        self._receive = receive
        self._clock = clock
        self._watch = asyncio.ensure_future(self._watching())

    async def leaves_within(self, seconds: float) -> bool:
        """Wait so long, or until the client leaves; True when it has left."""
        if seconds > 0:
            timeout = None if math.isinf(seconds) else seconds
            await asyncio.wait({self._watch}, timeout=timeout)
        else:
            # The loop gets a turn even so, or a long stream would never see the client go.
            await asyncio.sleep(0)
        return self.left_at is not None

    def close(self) -> None:
        """Stop watching."""
        self._watch.cancel()

    async def _watching(self) -> None:
        # The body was read before, so nothing but the disconnect can come; what comes after the
        # end of a response is of no use and `close` does not wait for it.
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left_at = self._clock()


async def _send_head(send: Send, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def hashed_key(request: Request) -> str | None:
    """SHA-256 (hex) of the key a request carries, None when it carries none."""
    key = request.headers.get("x-api-key")
    if not key:
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        key = rest.strip() if scheme.lower() == "bearer" else ""
    return hashlib.sha256(key.encode()).hexdigest() if key else None


def _decoded(raw: bytes) -> Json | None:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _model_in_body(_request: Request, body: Json) -> object:
    return body.get("model")


def _stream_in_body(_request: Request, body: Json) -> bool:
    return body.get("stream") is True


# The application.


def create_provider(
    *,
    books: Books,
    cache: PromptCache,
    clock: Callable[[], float] = time.monotonic,
    routes: tuple[Route, ...] = (),
) -> Starlette:
    """The provider as an ASGI application.

    Args:
        books: where responses are entered; also served at `/books`.
        cache: the prompt cache to answer from.
        clock: monotonic seconds, for `BookEntry.closed_at`.
        routes: further routes, before the provider's own.
    """

    async def count_tokens(request: Request) -> Response:
        if hashed_key(request) is None:
            return _anthropic_error(401, "x-api-key header is required")
        body = _decoded(await request.body())
        if body is None:
            return _anthropic_error(400, "The request body is not valid JSON")
        try:
            tokens = sum(block.tokens for block in _blocks(body))
        except InvalidRequestError as fault:
            return _anthropic_error(400, str(fault))
        return JSONResponse({"input_tokens": tokens}, headers=_anthropic_headers({}))

    async def models(request: Request) -> Response:
        if hashed_key(request) is None:
            return _anthropic_error(401, "x-api-key header is required")
        data = [
            {
                "type": "model",
                "id": name,
                "display_name": title,
                "created_at": f"{name[-8:-4]}-{name[-4:-2]}-{name[-2:]}T00:00:00Z",
            }
            for name, title in MODELS.items()
        ]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return JSONResponse({"data": data, "has_more": False, **ends})

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_books(_request: Request) -> Response:
        names = [field.name for field in dataclass_fields(BookEntry)]
        rows = [{name: getattr(entry, name) for name in names} for entry in books.entries]
        return JSONResponse({"entries": rows})

    messages = MessagesEndpoint(books=books, cache=cache, clock=clock)
    return Starlette(
        routes=[
            *routes,
            Route("/v1/messages", messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/books", show_books, methods=["GET"]),
        ]
    )


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=4010, show_default=True, help="Port to listen on.")
def main(host: str, port: int) -> None:
    """Run the stand-in provider."""
    application = create_provider(books=Books(), cache=PromptCache())
    uvicorn.run(application, host=host, port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
