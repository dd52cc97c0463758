"""Which route a request belongs to: a closed classification of method and path.

The paths are LiteLLM's own (1.83.10 and 1.100.5). A path that is not in the table is relayed
like any other, under the label `other`.
"""

from __future__ import annotations

from typing import NamedTuple

from sidecar.exchange import Dialect, Route

__all__ = ["RouteInfo", "classify"]


class RouteInfo(NamedTuple):
    """What the relay needs to know about a request before it reads any of it."""

    route: Route
    dialect: Dialect | None
    """How its answers spell usage; None where they are not observed."""
    anthropic_errors: bool
    """Whether its clients expect errors in Anthropic's envelope."""


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
}
_ANTHROPIC_ERRORS = frozenset({Route.MESSAGES, Route.COUNT_TOKENS, Route.ANTHROPIC_MESSAGES})


def _info(route: Route, *, observed: bool) -> RouteInfo:
    dialect = _DIALECTS.get(route) if observed else None
    return RouteInfo(route, dialect, route in _ANTHROPIC_ERRORS)


_POSTED = {path: _info(route, observed=True) for path, route in _PATHS.items()}
_OTHERWISE = {path: _info(route, observed=False) for path, route in _PATHS.items()}
_OTHER = _info(Route.OTHER, observed=False)


def classify(method: str, path: str) -> RouteInfo:
    """Classify a request.

    Args:
        path: percent-decoded and without the query, as LiteLLM's own router sees it.
    """
    return (_POSTED if method == "POST" else _OTHERWISE).get(path, _OTHER)
