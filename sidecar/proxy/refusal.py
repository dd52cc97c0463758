"""Answers in the sidecar's own name, where none comes from the upstream.

They are told apart from LiteLLM's by the header `x-sidecar-error`, and name neither a host nor
an exception.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sidecar.exchange import RefusalReason, UpstreamFault
from sidecar.proxy.routes import ErrorShape

__all__ = ["REFUSALS", "Refusal", "refusal_of"]

_TIMEOUTS = frozenset(
    {
        UpstreamFault.CONNECT_TIMEOUT,
        UpstreamFault.SEND_TIMEOUT,
        UpstreamFault.FIRST_BYTE_TIMEOUT,
    }
)
_MESSAGES = {
    UpstreamFault.NO_FILE_DESCRIPTORS: "The sidecar has too many connections.",
    UpstreamFault.CONNECT_FAILED: "LiteLLM could not be reached.",
    UpstreamFault.CONNECT_TIMEOUT: "LiteLLM could not be reached in time.",
    UpstreamFault.STALE_CONNECTION: "LiteLLM closed the connection before it answered.",
    UpstreamFault.CONNECTION_LOST: "The connection to LiteLLM broke before it answered.",
    UpstreamFault.SEND_TIMEOUT: "LiteLLM stopped taking the request.",
    UpstreamFault.MALFORMED_REQUEST: "The request cannot be passed on as it is.",
    UpstreamFault.MALFORMED_RESPONSE: "LiteLLM's answer was not valid HTTP.",
    UpstreamFault.FIRST_BYTE_TIMEOUT: "LiteLLM did not answer in time.",
}
# The types that each API's clients map to exceptions of their own:
# docs.anthropic.com/en/api/errors, platform.openai.com/docs/guides/error-codes, Bedrock's
# InvokeModel (docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_InvokeModel.html).
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_OPENAI_TYPES = {400: "invalid_request_error", 413: "invalid_request_error"}
_BEDROCK_TYPES = {
    400: "ValidationException",
    413: "ValidationException",
    503: "ServiceUnavailableException",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told instead of an answer."""

    status_code: int
    reason: str
    """Value of `x-sidecar-error`."""
    message: str
    """For a person; names no host."""

    def body(self, shape: ErrorShape = ErrorShape.OPENAI) -> bytes:
        """Write the error in the envelope that clients of the route expect."""
        error: dict[str, Any]
        if shape is ErrorShape.ANTHROPIC:
            kind = _ANTHROPIC_TYPES.get(self.status_code, "api_error")
            error = {"type": "error", "error": {"type": kind, "message": self.message}}
        elif shape is ErrorShape.BEDROCK:
            kind = _BEDROCK_TYPES.get(self.status_code, "InternalServerException")
            error = {"__type": kind, "message": self.message}
        else:
            kind = _OPENAI_TYPES.get(self.status_code, "api_error")
            error = {
                "error": {
                    "message": self.message,
                    "type": kind,
                    "param": None,
                    "code": self.reason,
                }
            }
        return json.dumps(error).encode()

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Make the headers that go with the body."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-sidecar-error", self.reason.encode()),
        ]
        if self.status_code == 503:
            headers.append((b"retry-after", b"1"))
        return headers


def refusal_of(fault: UpstreamFault) -> Refusal:
    """Say that the upstream gave no response."""
    if fault is UpstreamFault.MALFORMED_REQUEST:
        status_code = 400
    elif fault is UpstreamFault.NO_FILE_DESCRIPTORS:
        status_code = 503
    else:
        status_code = 504 if fault in _TIMEOUTS else 502
    message = _MESSAGES.get(fault, "LiteLLM's answer broke off.")
    return Refusal(status_code, fault.value, message)


REFUSALS = {
    reason: Refusal(status_code, reason.value, message)
    for status_code, reason, message in (
        (400, RefusalReason.BAD_REQUEST, "The request is not valid HTTP."),
        (400, RefusalReason.BAD_HOST, "The request needs exactly one Host header."),
        (400, RefusalReason.BAD_TARGET, "The request target is neither a path nor a URL."),
        (400, RefusalReason.BAD_BODY, "The request's body is not framed as its head says."),
        (400, RefusalReason.BAD_TRANSFER_ENCODING, "HTTP/1.0 has no transfer codings."),
        (501, RefusalReason.UNKNOWN_TRANSFER_ENCODING, "The only transfer coding is chunked."),
        (501, RefusalReason.CONNECT, "This is not a forward proxy."),
        (505, RefusalReason.HTTP_VERSION, "Only HTTP/1.1 and HTTP/1.0 are understood."),
        (431, RefusalReason.HEAD_TOO_LARGE, "The request's head is too large."),
        (408, RefusalReason.SLOW_HEAD, "The request's head did not come in time."),
        (408, RefusalReason.SLOW_BODY, "The request's body stopped coming."),
        (503, RefusalReason.TOO_MANY_CONNECTIONS, "The sidecar has too many connections."),
        (503, RefusalReason.TOO_MANY_REQUESTS, "The sidecar has too many requests under way."),
        (
            503,
            RefusalReason.DRAINING,
            "The sidecar stops, and could not wait for LiteLLM's answer.",
        ),
        (413, RefusalReason.REQUEST_TOO_LARGE, "The request is larger than the sidecar's limit."),
    )
}
"""What a client is told at its own end of the wire, before anything is relayed."""
