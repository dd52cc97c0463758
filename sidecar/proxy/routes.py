"""Which route a request belongs to: a closed classification of method and path.

The paths are LiteLLM's own (1.83.10 and 1.100.5). A path that is not among them is relayed like
any other, under the label `other`. Where a path names the model, and the body need not, the model
is taken from there, as LiteLLM does.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from sidecar.exchange import Dialect, Route

__all__ = ["ErrorShape", "RouteInfo", "classify"]


class ErrorShape(Enum):
    """In which envelope the clients of a route expect errors."""

    ANTHROPIC = "anthropic"
    OPENAI = "openai"
    BEDROCK = "bedrock"


class RouteInfo(NamedTuple):
    """What the relay needs to know about a request before it reads any of it."""

    route: Route
    dialect: Dialect | None
    """How its answers spell usage; None where they are not observed."""
    errors: ErrorShape = ErrorShape.OPENAI
    model: str | None = None
    """The model that the path names."""


_PATHS: dict[str, Route] = {
    "/v1/messages": Route.MESSAGES,
    "/v1/messages/count_tokens": Route.COUNT_TOKENS,
    "/anthropic/v1/messages": Route.ANTHROPIC_MESSAGES,
    "/v1/chat/completions": Route.CHAT_COMPLETIONS,
    "/chat/completions": Route.CHAT_COMPLETIONS,
    "/v1/completions": Route.COMPLETIONS,
    "/completions": Route.COMPLETIONS,
    "/v1/responses": Route.RESPONSES,
    "/responses": Route.RESPONSES,
    "/openai/v1/responses": Route.RESPONSES,
    "/v1/realtime": Route.REALTIME,
    "/realtime": Route.REALTIME,
    "/openai/v1/realtime": Route.REALTIME,
    "/v1/embeddings": Route.EMBEDDINGS,
    "/embeddings": Route.EMBEDDINGS,
    "/v1/models": Route.MODELS,
    "/models": Route.MODELS,
}
_DIALECTS: dict[Route, Dialect] = {
    Route.MESSAGES: Dialect.ANTHROPIC,
    Route.ANTHROPIC_MESSAGES: Dialect.ANTHROPIC,
    Route.CHAT_COMPLETIONS: Dialect.OPENAI_CHAT,
    Route.COMPLETIONS: Dialect.OPENAI_CHAT,
    Route.RESPONSES: Dialect.OPENAI_RESPONSES,
}
_ANTHROPIC_ERRORS = frozenset({Route.MESSAGES, Route.COUNT_TOKENS, Route.ANTHROPIC_MESSAGES})

_CHAT = r"(?:chat/)?completions"
_ENDPOINTS = {"completions": Dialect.OPENAI_CHAT, "responses": Dialect.OPENAI_RESPONSES}
"""What OpenAI's endpoints speak, by the last part of their paths."""

_ENGINES_CHAT = re.compile(r"/engines/(?P<model>.+)/chat/(?P<what>completions)")
_ENGINES = re.compile(r"/engines/(?P<model>.+)/(?P<what>completions)")
_DEPLOYMENTS_CHAT = re.compile(r"/openai/deployments/(?P<model>.+)/chat/(?P<what>completions)")
_DEPLOYMENTS = re.compile(r"/openai/deployments/(?P<model>.+)/(?P<what>completions)")
_OPENAI = re.compile(rf"/openai(?:_passthrough)?/(?:v1/)?(?P<what>{_CHAT}|responses)")
_AZURE = re.compile(
    r"/azure/(?:openai/)?(?:deployments/(?P<model>[^/]+)/|v1/)?"
    rf"(?P<what>{_CHAT}|responses)"
)
_AZURE_AI = re.compile(
    r"/azure_ai/(?:anthropic/v1/(?P<messages>messages)"
    rf"|(?:models/|openai/|v1/)*(?P<what>{_CHAT}|responses))"
)
# The id of a model may be an ARN, whose slashes arrive decoded.
_BEDROCK = re.compile(
    r"/bedrock/(?:v\d+/)?model/(?P<model>.+)/"
    r"(?P<what>invoke|invoke-with-response-stream|converse|converse-stream)"
)
# Counting tokens has the path of a model's prediction.
_VERTEX = re.compile(
    r"/vertex[-_]ai/(?:.+/)?publishers/(?P<publisher>[^/]+)/models/(?!count-tokens:)(?P<model>[^/:]+)"
    r":(?:rawPredict|streamRawPredict)"
)


def _info(route: Route, *, observed: bool) -> RouteInfo:
    dialect = _DIALECTS.get(route) if observed else None
    errors = ErrorShape.ANTHROPIC if route in _ANTHROPIC_ERRORS else ErrorShape.OPENAI
    return RouteInfo(route, dialect, errors)


_POSTED = {path: _info(route, observed=True) for path, route in _PATHS.items()}
_OTHERWISE = {path: _info(route, observed=False) for path, route in _PATHS.items()}
_OTHER = _info(Route.OTHER, observed=False)


def _openai(route: Route, match: re.Match[str]) -> RouteInfo:
    dialect = _ENDPOINTS[match["what"].rpartition("/")[2]]
    return RouteInfo(route, dialect, model=match.groupdict().get("model"))


def _azure_ai(route: Route, match: re.Match[str]) -> RouteInfo:
    if match["messages"]:
        return RouteInfo(route, Dialect.ANTHROPIC, ErrorShape.ANTHROPIC)
    return _openai(route, match)


def _bedrock(route: Route, match: re.Match[str]) -> RouteInfo:
    converse = match["what"].startswith("converse")
    dialect = Dialect.BEDROCK_CONVERSE if converse else Dialect.BEDROCK_INVOKE
    return RouteInfo(route, dialect, ErrorShape.BEDROCK, match["model"])


def _vertex(route: Route, match: re.Match[str]) -> RouteInfo:
    if match["publisher"] == "anthropic":
        return RouteInfo(route, Dialect.ANTHROPIC, ErrorShape.ANTHROPIC, match["model"])
    # What else has raw predictions (Mistral, AI21) speaks OpenAI's dialect.
    return RouteInfo(route, Dialect.OPENAI_CHAT, model=match["model"])


_PATTERNS = {
    "engines": [
        (_ENGINES_CHAT, Route.ENGINES_CHAT, _openai),
        (_ENGINES, Route.ENGINES_COMPLETIONS, _openai),
    ],
    "openai": [
        (_DEPLOYMENTS_CHAT, Route.DEPLOYMENTS_CHAT, _openai),
        (_DEPLOYMENTS, Route.DEPLOYMENTS_COMPLETIONS, _openai),
        (_OPENAI, Route.OPENAI_ENDPOINT, _openai),
    ],
    "openai_passthrough": [(_OPENAI, Route.OPENAI_ENDPOINT, _openai)],
    "azure": [(_AZURE, Route.AZURE_ENDPOINT, _openai)],
    "azure_ai": [(_AZURE_AI, Route.AZURE_AI_ENDPOINT, _azure_ai)],
    "bedrock": [(_BEDROCK, Route.BEDROCK_ENDPOINT, _bedrock)],
    "vertex_ai": [(_VERTEX, Route.VERTEX_ENDPOINT, _vertex)],
    "vertex-ai": [(_VERTEX, Route.VERTEX_ENDPOINT, _vertex)],
}
"""What else is observed, by the first part of the path."""


def classify(method: str, path: str) -> RouteInfo:
    """Classify a request.

    Args:
        path: percent-decoded and without the query, as LiteLLM's own router sees it.
    """
    if method != "POST":
        return _OTHERWISE.get(path, _OTHER)
    found = _POSTED.get(path)
    if found is not None:
        return found
    for pattern, route, info in _PATTERNS.get(path[1 : path.find("/", 1)], ()):
        match = pattern.fullmatch(path)
        if match is not None:
            return info(route, match)
    return _OTHER
