"""The stand-in provider as three clouds: Anthropic itself, Bedrock and Vertex.

Knows how the two clouds wrap the same answer: paths, framing, ids, errors. Prompt cache and books
are those of `sidecar.demo.provider`, one of each for all three, so that a test reads one truth.

Contract: a cloud takes any credential, because who may ask what is not what these tests are about.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sidecar.demo.provider import (
    ANTHROPIC,
    Books,
    Dialect,
    MessagesEndpoint,
    PromptCache,
    create_provider,
    encode_sse,
)
from tests.support.dialects import dialect_routes

__all__ = ["Clouds", "create_clouds", "encode_frame", "run_clouds", "serving"]

Json = dict[str, Any]

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0

# Type number of a string header in the AWS event-stream encoding.
_STRING_HEADER = 7
_PRELUDE_BYTES = 12
_CRC_BYTES = 4


def _frame(headers: dict[str, str], payload: bytes) -> bytes:
    """One AWS event-stream message: lengths, CRC of the lengths, headers, payload, CRC of all."""
    packed = b"".join(
        struct.pack("!B", len(name))
        + name.encode()
        + struct.pack("!BH", _STRING_HEADER, len(value))
        + value.encode()
        for name, value in headers.items()
    )
    total = _PRELUDE_BYTES + len(packed) + len(payload) + _CRC_BYTES
    lengths = struct.pack("!II", total, len(packed))
    body = lengths + struct.pack("!I", zlib.crc32(lengths)) + packed + payload
    return body + struct.pack("!I", zlib.crc32(body))


def encode_message(name: str, data: Json) -> bytes:
    """One event of `converse-stream`."""
    headers = {
        ":event-type": name,
        ":content-type": "application/json",
        ":message-type": "event",
    }
    return _frame(headers, json.dumps(data, separators=(",", ":")).encode())


def encode_frame(name: str, data: Json) -> bytes:
    """One event of `invoke-with-response-stream`, an error as the exception message it is there."""
    if name == "error":
        headers = {
            ":exception-type": "modelStreamErrorException",
            ":content-type": "application/json",
            ":message-type": "exception",
        }
        return _frame(headers, json.dumps({"message": data["error"]["message"]}).encode())
    event = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    # Bedrock pads its frames with `p` so that their length says nothing about their text.
    padding = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"[
        : len(event) * 7 % 62
    ]
    payload = {"bytes": base64.b64encode(event).decode(), "p": padding}
    headers = {
        ":event-type": "chunk",
        ":content-type": "application/json",
        ":message-type": "event",
    }
    return _frame(headers, json.dumps(payload, separators=(",", ":")).encode())


def _bedrock_headers(usage: Json) -> dict[str, str]:
    return {
        "x-amzn-requestid": "1b0f6d5e-3a51-4c7c-8a6e-0f2f6c1d0001",
        "x-amzn-bedrock-invocation-latency": "812",
        "x-amzn-bedrock-input-token-count": str(usage["input_tokens"]),
        "x-amzn-bedrock-output-token-count": str(usage["output_tokens"]),
        "x-amzn-bedrock-cache-read-input-token-count": str(usage["cache_read_input_tokens"]),
        "x-amzn-bedrock-cache-write-input-token-count": str(usage["cache_creation_input_tokens"]),
    }


def _bedrock_stop_fields(usage: Json) -> Json:
    return {
        "amazon-bedrock-invocationMetrics": {
            "inputTokenCount": usage["input_tokens"],
            "outputTokenCount": usage["output_tokens"],
            "invocationLatency": 812,
            "firstByteLatency": 304,
            "cacheReadInputTokenCount": usage["cache_read_input_tokens"],
            "cacheWriteInputTokenCount": usage["cache_creation_input_tokens"],
        }
    }


_BEDROCK_ERRORS = {
    400: "ValidationException",
    401: "UnrecognizedClientException",
    403: "AccessDeniedException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
}


def _bedrock_error(status: int, message: str) -> Response:
    kind = _BEDROCK_ERRORS.get(status, "InternalServerException")
    return JSONResponse({"message": message}, status, headers={"x-amzn-errortype": kind})


def _vertex_headers(_usage: Json) -> dict[str, str]:
    return {"request-id": "req_vrtx_011CTestTestTestTest", "x-vertex-ai-internal": "stand-in"}


def _vertex_error(status: int, message: str) -> Response:
    error = {"code": status, "message": message, "status": "UNAVAILABLE"}
    return JSONResponse({"error": error}, status)


BEDROCK = Dialect(
    message_id_prefix="msg_bdrk_01",
    media_type="application/vnd.amazon.eventstream",
    encode=encode_frame,
    headers=_bedrock_headers,
    stop_fields=_bedrock_stop_fields,
    error=_bedrock_error,
)

VERTEX = Dialect(
    message_id_prefix="msg_vrtx_01",
    media_type="text/event-stream; charset=utf-8",
    encode=encode_sse,
    headers=_vertex_headers,
    stop_fields=ANTHROPIC.stop_fields,
    error=_vertex_error,
)


def _any_credential(request: Request) -> str | None:
    """Clouds have credentials and no keys, so the books say none; a request must carry one."""
    return "" if "authorization" in request.headers else None


def _model_in_path(request: Request, _body: Json) -> object:
    return request.path_params["model"]


def _always(_request: Request, _body: Json) -> bool:
    return True


def _never(_request: Request, _body: Json) -> bool:
    return False


async def _oauth_token(_request: Request) -> Response:
    """Google's token endpoint: any assertion is worth a token."""
    return JSONResponse(
        {"access_token": "stand-in-token", "expires_in": 3599, "token_type": "Bearer"}
    )


def create_clouds(
    *, books: Books, cache: PromptCache, clock: Callable[[], float] = time.monotonic
) -> Starlette:
    """The provider with the routes of the two clouds besides its own."""

    def bedrock(streamed: Callable[[Request, Json], bool]) -> MessagesEndpoint:
        return MessagesEndpoint(
            books=books,
            cache=cache,
            dialect=BEDROCK,
            clock=clock,
            authenticate=_any_credential,
            model_of=_model_in_path,
            streamed_of=streamed,
        )

    # Vertex streams when the body says so, whatever the method: LiteLLM 1.83 posts JSON and
    # streams alike to the bare path of the model.
    vertex = MessagesEndpoint(
        books=books,
        cache=cache,
        dialect=VERTEX,
        clock=clock,
        authenticate=_any_credential,
        model_of=_model_in_path,
    )
    models = "/v1/projects/{project}/locations/{location}/publishers/anthropic/models"
    routes = (
        # The id of a Bedrock model may be an ARN, whose slashes arrive decoded.
        Route("/model/{model:path}/invoke", bedrock(_never), methods=["POST"]),
        Route(
            "/model/{model:path}/invoke-with-response-stream", bedrock(_always), methods=["POST"]
        ),
        Route(models + "/{model}:rawPredict", vertex, methods=["POST"]),
        Route(models + "/{model}:streamRawPredict", vertex, methods=["POST"]),
        Route(models + "/{model}", vertex, methods=["POST"]),
        Route("/token", _oauth_token, methods=["POST"]),
        *dialect_routes(books, cache, encode_message),
    )
    return create_provider(books=books, cache=cache, clock=clock, routes=routes)


@contextmanager
def serving(app: ASGIApp, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve an application from a thread of this process; gives its URL.

    A thread, so that tests on any event loop, and none, can use it and read its state directly.
    """
    with socket.create_server((host, 0)) as listener:
        config = uvicorn.Config(
            app,
            # Logging is the process's: what is set here would hold for the edge under test as well.
            log_config=None,
            access_log=False,
            lifespan="off",
            # A stream that hangs by request ends with the test, not with the last client.
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="provider", daemon=True
        )
        thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the stand-in provider did not start")
            time.sleep(0.005)
        try:
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_STOP_TIMEOUT_S)
            if thread.is_alive():
                raise RuntimeError("the stand-in provider did not stop")


@dataclass(frozen=True, slots=True)
class Clouds:
    """A running provider and its state, which a test may read and clear."""

    url: str
    books: Books
    cache: PromptCache


@contextmanager
def run_clouds(clock: Callable[[], float] = time.monotonic) -> Iterator[Clouds]:
    """Run all three clouds on one free loopback port.

    Args:
        clock: monotonic seconds, for the prompt cache's time to live.
    """
    books = Books()
    cache = PromptCache(clock)
    with serving(create_clouds(books=books, cache=cache)) as url:
        yield Clouds(url=url, books=books, cache=cache)
