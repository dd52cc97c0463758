"""Counting what answers say of themselves beside their tokens.

Each of these is a closed set of words on the wire; what is not among them is counted as `other`,
so that no provider can make series. None of them is mixed into the classes of tokens.
"""

from __future__ import annotations

from sidecar.account.store import Store, Value
from sidecar.exchange import NO_REMARKS, NO_TERMS, Observation

__all__ = ["RemarkCounts"]

_OTHER = "other"

_CACHE_MISS_REASONS = (
    *("model_changed", "system_changed", "tools_changed", "messages_changed"),
    *("previous_message_not_found", "unavailable", _OTHER),
)
_STOP_REASONS = (
    # Anthropic's, and Bedrock's beside them.
    *("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal"),
    *("model_context_window_exceeded", "compaction"),
    *("guardrail_intervened", "content_filtered", "malformed_model_output", "malformed_tool_use"),
    # OpenAI's.
    *("stop", "length", "tool_calls", "content_filter", "function_call", _OTHER),
)
_SERVICE_TIERS = ("standard", "priority", "batch", "default", "flex", "scale", _OTHER)
_SERVER_TOOLS = ("web_search", "web_fetch")
_ITERATIONS = ("message", "compaction", "advisor_message", "fallback_message", _OTHER)


class RemarkCounts:
    """The series, all of which exist from the start.

    Args:
        prefix: of their names.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        def counter(name: str, text: str, label: str, words: tuple[str, ...]) -> dict[str, Value]:
            family = store.counter(f"{prefix}{name}", text, (label,))
            return {word: family.child(word) for word in words}

        self._miss_reasons = counter(
            "provider_cache_miss_reasons",
            "2xx answers by why nothing was read from the prompt cache, where the client asked "
            "for the provider's diagnosis.",
            "reason",
            _CACHE_MISS_REASONS,
        )
        self._stop_reasons = counter(
            "stop_reasons",
            "2xx answers by why the model stopped, as its provider calls it.",
            "reason",
            _STOP_REASONS,
        )
        self._tiers = counter(
            "service_tiers",
            "2xx answers by the service tier that they say they were processed in.",
            "tier",
            _SERVICE_TIERS,
        )
        self._tools = counter(
            "server_tool_uses",
            "Uses of tools that the provider itself runs.",
            "tool",
            _SERVER_TOOLS,
        )
        self._iterations = counter(
            "iterations",
            "Steps that answers say they were made in, by type; their tokens are not counted: "
            "those of compaction and advisors are not in the usage of the answer.",
            "type",
            _ITERATIONS,
        )

    def add(self, observation: Observation) -> None:
        """Count what an answer said."""
        terms, remarks = observation.terms, observation.remarks
        if terms is not NO_TERMS:
            _count(self._tiers, terms.service_tier)
            self._tools["web_search"].value += terms.web_search_requests or 0
        if remarks is not NO_REMARKS:
            _count(self._stop_reasons, remarks.stop_reason)
            _count(self._miss_reasons, remarks.cache_miss_reason)
            self._tools["web_fetch"].value += remarks.web_fetch_requests or 0
            for kind in remarks.iterations:
                _count(self._iterations, kind)


def _count(series: dict[str, Value], word: str | None) -> None:
    if word is not None:
        (series.get(word) or series[_OTHER]).value += 1
