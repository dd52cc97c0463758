"""Which requests are observed, in which dialect, and for which model."""

from __future__ import annotations

import json

import pytest

from sidecar.exchange import Dialect, Route
from sidecar.proxy.refusal import Refusal
from sidecar.proxy.routes import ErrorShape, RouteInfo, classify

CHAT, RESPONSES = Dialect.OPENAI_CHAT, Dialect.OPENAI_RESPONSES
INVOKE, CONVERSE = Dialect.BEDROCK_INVOKE, Dialect.BEDROCK_CONVERSE
ARN = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-v1:0"
VERTEX = "/v1/projects/p/locations/us-east5/publishers"


@pytest.mark.parametrize(
    ("path", "route", "dialect", "model"),
    [
        ("/v1/messages", Route.MESSAGES, Dialect.ANTHROPIC, None),
        ("/anthropic/v1/messages", Route.ANTHROPIC_MESSAGES, Dialect.ANTHROPIC, None),
        ("/v1/chat/completions", Route.CHAT_COMPLETIONS, CHAT, None),
        ("/chat/completions", Route.CHAT_COMPLETIONS, CHAT, None),
        ("/v1/completions", Route.COMPLETIONS, CHAT, None),
        ("/v1/responses", Route.RESPONSES, RESPONSES, None),
        ("/responses", Route.RESPONSES, RESPONSES, None),
        ("/openai/v1/responses", Route.RESPONSES, RESPONSES, None),
        ("/engines/gpt-4o/chat/completions", Route.ENGINES_CHAT, CHAT, "gpt-4o"),
        ("/engines/a/b/completions", Route.ENGINES_COMPLETIONS, CHAT, "a/b"),
        (
            "/openai/deployments/gpt-4o/chat/completions",
            Route.DEPLOYMENTS_CHAT,
            CHAT,
            "gpt-4o",
        ),
        (
            "/openai/deployments/gpt-4o/completions",
            Route.DEPLOYMENTS_COMPLETIONS,
            CHAT,
            "gpt-4o",
        ),
        ("/openai/v1/chat/completions", Route.OPENAI_ENDPOINT, CHAT, None),
        ("/openai_passthrough/v1/responses", Route.OPENAI_ENDPOINT, RESPONSES, None),
        (
            "/azure/openai/deployments/gpt-4o/chat/completions",
            Route.AZURE_ENDPOINT,
            CHAT,
            "gpt-4o",
        ),
        ("/azure/openai/v1/chat/completions", Route.AZURE_ENDPOINT, CHAT, None),
        ("/azure/openai/responses", Route.AZURE_ENDPOINT, RESPONSES, None),
        ("/azure/openai/v1/responses", Route.AZURE_ENDPOINT, RESPONSES, None),
        ("/azure_ai/anthropic/v1/messages", Route.AZURE_AI_ENDPOINT, Dialect.ANTHROPIC, None),
        ("/azure_ai/models/chat/completions", Route.AZURE_AI_ENDPOINT, CHAT, None),
        ("/azure_ai/openai/v1/responses", Route.AZURE_AI_ENDPOINT, RESPONSES, None),
        ("/bedrock/model/anthropic.v1:0/invoke", Route.BEDROCK_ENDPOINT, INVOKE, "anthropic.v1:0"),
        (
            f"/bedrock/model/{ARN}/invoke-with-response-stream",
            Route.BEDROCK_ENDPOINT,
            INVOKE,
            ARN,
        ),
        ("/bedrock/model/nova/converse", Route.BEDROCK_ENDPOINT, CONVERSE, "nova"),
        ("/bedrock/v2/model/nova/converse-stream", Route.BEDROCK_ENDPOINT, CONVERSE, "nova"),
        (
            f"/vertex_ai{VERTEX}/anthropic/models/claude@20250929:rawPredict",
            Route.VERTEX_ENDPOINT,
            Dialect.ANTHROPIC,
            "claude@20250929",
        ),
        (
            "/vertex-ai/publishers/anthropic/models/claude:streamRawPredict",
            Route.VERTEX_ENDPOINT,
            Dialect.ANTHROPIC,
            "claude",
        ),
        (
            f"/vertex_ai{VERTEX}/mistralai/models/mistral-large:rawPredict",
            Route.VERTEX_ENDPOINT,
            CHAT,
            "mistral-large",
        ),
    ],
)
def test_posts_that_are_observed(
    path: str, route: Route, dialect: Dialect, model: str | None
) -> None:
    """Each has LiteLLM's path for its label; read with GET it is not observed."""
    info = classify("POST", path)
    assert (info.route, info.dialect, info.model) == (route, dialect, model)
    assert classify("GET", path).dialect is None


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "openai",
        "/key/generate",
        "/v1/messages/",
        "/v1/messages/batches",
        "/v1/responses/resp_1/cancel",
        "/anthropic/v1/messages/count_tokens",
        "/engines/gpt-4o/embeddings",
        "/openai/deployments/gpt-4o/embeddings",
        "/openai/v1/files",
        "/azure/openai/deployments/gpt-4o/images/generations",
        "/bedrock/model/anthropic.v1:0/count-tokens",
        "/bedrock/knowledgebases/k/retrieve",
        "/bedrock/model/nova/converse\n",
        f"/vertex_ai{VERTEX}/google/models/gemini:generateContent",
        f"/vertex_ai{VERTEX}/anthropic/models/count-tokens",
        f"/vertex_ai{VERTEX}/anthropic/models/count-tokens:rawPredict",
    ],
)
def test_what_is_not_observed(path: str) -> None:
    """What counts nothing, or counts elsewhere, passes under one label."""
    assert classify("POST", path) == RouteInfo(Route.OTHER, None)


def test_counting_tokens_is_not_observed() -> None:
    """Its answer has no usage."""
    info = classify("POST", "/v1/messages/count_tokens")
    assert info == RouteInfo(Route.COUNT_TOKENS, None, ErrorShape.ANTHROPIC)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "/v1/messages",
            {"type": "error", "error": {"type": "api_error", "message": "It is gone."}},
        ),
        (
            f"/vertex_ai{VERTEX}/anthropic/models/claude:rawPredict",
            {"type": "error", "error": {"type": "api_error", "message": "It is gone."}},
        ),
        (
            "/v1/chat/completions",
            {
                "error": {
                    "message": "It is gone.",
                    "type": "api_error",
                    "param": None,
                    "code": "connect_failed",
                }
            },
        ),
        (
            "/bedrock/model/nova/converse",
            {"__type": "InternalServerException", "message": "It is gone."},
        ),
    ],
)
def test_errors_come_in_the_dialect_of_the_route(path: str, expected: object) -> None:
    """What the sidecar itself answers is read by the route's own clients."""
    refusal = Refusal(502, "connect_failed", "It is gone.")
    assert json.loads(refusal.body(classify("POST", path).errors)) == expected
