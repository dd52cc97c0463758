"""The stand-in provider in other tongues: OpenAI's chat completions and responses, and Converse.

Knows how OpenAI counts (the whole prompt, and how much of that was read from the cache, which is
automatic) and how its answers look on the wire, and how Bedrock's `Converse` wraps the cache of
the other clouds. It must not know that a sidecar or LiteLLM exists.

Contract: what is true stands in the same books as that of the other clouds, in disjoint counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sidecar.demo.provider import Books, CacheUse, PromptCache

__all__ = ["OPENAI_MODEL", "dialect_routes"]

Json = dict[str, Any]
Frames = Iterable[bytes]

OPENAI_MODEL = "gpt-4o-2024-08-06"
_TEXT = ("What was ", "known was ", "cheap.")
_OUTPUT_TOKENS = 16
_UNIT = 128
"""OpenAI caches whole units of so many tokens."""


def dialect_routes(books: Books, cache: PromptCache, encode_frame: Any) -> tuple[Route, ...]:
    """Make the routes.

    Args:
        encode_frame: writes one message of an AWS event stream, of its name and its data.
    """
    openai = _OpenAI(books)
    converse = _Converse(books, cache, encode_frame)
    return (
        Route("/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/responses", openai.respond, methods=["POST"]),
        Route("/v1/responses", openai.respond, methods=["POST"]),
        Route("/model/{model:path}/converse", converse.whole, methods=["POST"]),
        Route("/model/{model:path}/converse-stream", converse.streamed, methods=["POST"]),
    )


def _event_stream(frames: Frames) -> Response:
    return StreamingResponse(iter(frames), media_type="text/event-stream")


class _OpenAI:
    def __init__(self, books: Books) -> None:
        self._books = books
        self._seen: set[bytes] = set()

    def _enter(self, model: str, prompt: object, *, streamed: bool) -> tuple[int, int]:
        """Enter a response in the books; returns the tokens of its prompt and those read."""
        text = json.dumps(prompt, sort_keys=True)
        tokens = len(text) // 4
        digest = hashlib.sha256(text.encode()).digest()
        read = tokens // _UNIT * _UNIT if digest in self._seen else 0
        self._seen.add(digest)
        use = CacheUse(tokens - read, read, 0, 0)
        entry = self._books.record(
            model=model, key="", streamed=streamed, use=use, output_tokens=_OUTPUT_TOKENS
        )
        self._books.revise(entry.sequence, completed=True)
        return tokens, read

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion."""
        body = await request.json()
        streamed = body.get("stream") is True
        tokens, read = self._enter(body["model"], body["messages"], streamed=streamed)
        usage = {
            "prompt_tokens": tokens,
            "completion_tokens": _OUTPUT_TOKENS,
            "total_tokens": tokens + _OUTPUT_TOKENS,
            "prompt_tokens_details": {"cached_tokens": read, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
        head = {"id": "chatcmpl-StandIn1", "created": 1790000000, "model": OPENAI_MODEL}
        if not streamed:
            message = {"role": "assistant", "content": "".join(_TEXT), "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            return JSONResponse({**whole, "service_tier": "default"})
        asked = (body.get("stream_options") or {}).get("include_usage") is True
        return _event_stream(self._chunks(head, usage if asked else None))

    def _chunks(self, head: Json, usage: Json | None) -> Iterator[bytes]:
        nothing: Json = {} if usage is None else {"usage": None}
        deltas: list[Json] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": piece} for piece in _TEXT]
        chunks = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **nothing}
            for delta in deltas
        ]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **nothing})
        if usage is not None:
            chunks.append({"choices": [], "usage": usage})
        for chunk in chunks:
            whole = {**head, "object": "chat.completion.chunk", **chunk}
            yield f"data: {json.dumps(whole, separators=(',', ':'))}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def respond(self, request: Request) -> Response:
        """Answer with a response."""
        body = await request.json()
        streamed = body.get("stream") is True
        prompt = [body.get("instructions"), body["input"]]
        tokens, read = self._enter(body["model"], prompt, streamed=streamed)
        usage = {
            "input_tokens": tokens,
            "input_tokens_details": {"cached_tokens": read},
            "output_tokens": _OUTPUT_TOKENS,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens + _OUTPUT_TOKENS,
        }
        if not streamed:
            return JSONResponse(_response("completed", usage))
        return _event_stream(_response_events(usage))


def _response(status: str, usage: Json | None) -> Json:
    part = {"type": "output_text", "text": "".join(_TEXT), "annotations": []}
    item = {
        "type": "message",
        "id": "msg_StandIn1",
        "status": "completed",
        "role": "assistant",
        "content": [part],
    }
    return {
        "id": "resp_StandIn1",
        "object": "response",
        "created_at": 1790000000,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": OPENAI_MODEL,
        "output": [item] if usage is not None else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "service_tier": "default",
        "usage": usage,
    }


def _response_events(usage: Json) -> Iterator[bytes]:
    place = {"item_id": "msg_StandIn1", "output_index": 0}
    text = place | {"content_index": 0}
    whole = _response("completed", usage)
    item = whole["output"][0]
    events: list[tuple[str, Json]] = [
        ("created", {"response": _response("in_progress", None)}),
        ("in_progress", {"response": _response("in_progress", None)}),
        ("output_item.added", {"output_index": 0, "item": item | {"content": []}}),
        ("content_part.added", text | {"part": item["content"][0] | {"text": ""}}),
        *(("output_text.delta", text | {"delta": piece}) for piece in _TEXT),
        ("output_text.done", text | {"text": "".join(_TEXT)}),
        ("content_part.done", text | {"part": item["content"][0]}),
        ("output_item.done", {"output_index": 0, "item": item}),
        ("completed", {"response": whole}),
    ]
    for number, (name, data) in enumerate(events):
        full = {"type": f"response.{name}", "sequence_number": number, **data}
        yield f"event: response.{name}\ndata: {json.dumps(full)}\n\n".encode()


class _Converse:
    def __init__(self, books: Books, cache: PromptCache, encode_frame: Any) -> None:
        self._books = books
        self._cache = cache
        self._encode = encode_frame

    async def whole(self, request: Request) -> Response:
        """Answer with JSON."""
        usage = await self._use(request, streamed=False)
        message = {"role": "assistant", "content": [{"text": "".join(_TEXT)}]}
        body = {"output": {"message": message}, "stopReason": "end_turn", "usage": usage}
        return JSONResponse(body | {"metrics": {"latencyMs": 812}})

    async def streamed(self, request: Request) -> Response:
        """Answer with an AWS event stream."""
        usage = await self._use(request, streamed=True)
        events: list[tuple[str, Json]] = [
            ("messageStart", {"role": "assistant"}),
            *(
                ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": piece}})
                for piece in _TEXT
            ),
            ("contentBlockStop", {"contentBlockIndex": 0}),
            ("messageStop", {"stopReason": "end_turn"}),
            ("metadata", {"usage": usage, "metrics": {"latencyMs": 812}}),
        ]
        frames = [self._encode(name, data) for name, data in events]
        return StreamingResponse(iter(frames), media_type="application/vnd.amazon.eventstream")

    async def _use(self, request: Request, *, streamed: bool) -> Json:
        """Look the prompt up in the cache, enter it in the books, and write its usage."""
        body = await request.json()
        use = self._cache.look_up(request.path_params["model"], _as_messages(body))
        self._cache.commit(use)
        entry = self._books.record(
            model=request.path_params["model"],
            key="",
            streamed=streamed,
            use=use,
            output_tokens=_OUTPUT_TOKENS,
        )
        self._books.revise(entry.sequence, completed=True)
        usage: Json = {
            "inputTokens": use.input_tokens,
            "outputTokens": _OUTPUT_TOKENS,
            "cacheReadInputTokens": use.cache_read_input_tokens,
            "cacheWriteInputTokens": use.cache_creation_input_tokens,
        }
        usage["totalTokens"] = sum(usage.values())
        if use.cache_creation_input_tokens:
            ttls = {"5m": use.ephemeral_5m_input_tokens, "1h": use.ephemeral_1h_input_tokens}
            usage["cacheDetails"] = [
                {"ttl": ttl, "inputTokens": tokens} for ttl, tokens in ttls.items() if tokens
            ]
        return usage


def _as_messages(body: Json) -> Json:
    """Write a body of `Converse` as one of the Messages API: there a cache point is a member."""

    def blocks(content: list[Json]) -> list[Json]:
        made: list[Json] = []
        for block in content:
            if "cachePoint" in block:
                ttl = block["cachePoint"].get("ttl", "5m")
                made[-1]["cache_control"] = {"type": "ephemeral", "ttl": ttl}
            else:
                made.append({"type": "text", "text": block["text"]})
        return made

    messages = [
        {"role": message["role"], "content": blocks(message["content"])}
        for message in body["messages"]
    ]
    return {"system": blocks(body.get("system", [])), "messages": messages}
