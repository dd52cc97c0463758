"""Metric names of LiteLLM's own, counting the provider's prompt cache.

They let a dashboard that was made for LiteLLM show what the provider's cache did. The three of
`v1.83` are what LiteLLM calls its response cache's; the four of `v1.100` are what LiteLLM has
itself from 1.87 on, and are given here with the values that it gives them.

This knows names and versions. Whose an answer is, and whether it is counted, it must not know.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass

from sidecar.account.store import Family, Store, Value
from sidecar.exchange import Outcome, RawHeaders, Usage, header

__all__ = ["LABELS", "Compat", "CompatSeries", "UpstreamVersion"]

logger = logging.getLogger("sidecar.account")

LABELS = ("model", "requested_model", "team_alias")

_EMITTED_FROM = (1, 87)
"""LiteLLM 1.87.0 has the first two of the four, 1.89.0 has all; 1.86.0 has none."""
_VERSION = re.compile(rb"(\d{1,9})\.(\d{1,9})[\w.+-]{0,32}")
_ADVICE = {
    "detail": "LiteLLM exports the names of v1.100 (SIDECAR_COMPAT) itself",
    "remedy": "take v1.100 out of SIDECAR_COMPAT, or drop one of the two; see docs/migration.md",
}
_MAX_VERSIONS = 20
"""Versions that are kept apart in one life of the process."""


@dataclass(frozen=True, slots=True)
class CompatSeries:
    """The series of one model and team."""

    response_cache: tuple[Value, Value, Value] | None
    """Cached tokens, hits, misses; None where they are off."""
    reads: tuple[Value, ...]
    """Those that count tokens read; none where they are off."""
    writes: tuple[Value, ...]
    """Those that count tokens written, of either TTL."""

    def add(self, usage: Usage, outcome: Outcome) -> None:
        """Count an answer."""
        if self.response_cache is not None:
            cached_tokens, hits, misses = self.response_cache
            cached_tokens.value += usage.read_tokens
            if outcome is Outcome.HIT:
                hits.value += 1
            elif outcome in (Outcome.WRITE, Outcome.NOT_CACHED):
                misses.value += 1
        for read in self.reads:
            read.value += usage.read_tokens
        for write in self.writes:
            write.value += usage.write_tokens


class Compat:
    """The families that are switched on.

    Args:
        choices: of SIDECAR_COMPAT: `v1.83`, `v1.100`, both, or none.
    """

    def __init__(self, store: Store, choices: Collection[str]) -> None:
        self._response_cache: tuple[Family[Value], ...] = ()
        self._reads: tuple[Family[Value], ...] = ()
        self._writes: tuple[Family[Value], ...] = ()
        if "v1.83" in choices:
            self._response_cache = (
                store.counter(
                    "litellm_cached_tokens_metric",
                    "Prompt tokens read from the provider prompt cache, counted by the sidecar.",
                    LABELS,
                ),
                store.counter(
                    "litellm_cache_hits_metric",
                    "Answers that read from the provider prompt cache, counted by the sidecar.",
                    LABELS,
                ),
                store.counter(
                    "litellm_cache_misses_metric",
                    "Answers that asked for the provider prompt cache, or wrote to it, and "
                    "read nothing, counted by the sidecar.",
                    LABELS,
                ),
            )
        if "v1.100" in choices:
            read = "Prompt tokens read from the provider prompt cache, counted by the sidecar."
            written = "Prompt tokens written to the provider prompt cache, counted by the sidecar."
            self._reads = (
                store.counter("litellm_provider_cache_read_input_tokens_metric", read, LABELS),
                store.counter("litellm_input_cached_tokens_metric", read, LABELS),
            )
            self._writes = (
                store.counter(
                    "litellm_provider_cache_creation_input_tokens_metric", written, LABELS
                ),
                store.counter("litellm_input_cache_creation_tokens_metric", written, LABELS),
            )
        self.families = (*self._response_cache, *self._reads, *self._writes)

    def series(self, model: str, team: str) -> CompatSeries | None:
        """Make the series of a model and a team; None where all are off."""
        if not self.families:
            return None
        names = (model, model, team)
        response_cache = None
        if self._response_cache:
            cached_tokens, hits, misses = self._response_cache
            response_cache = cached_tokens.child(*names), hits.child(*names), misses.child(*names)
        return CompatSeries(
            response_cache,
            tuple(family.child(*names) for family in self._reads),
            tuple(family.child(*names) for family in self._writes),
        )


class UpstreamVersion:
    """Knows which version of LiteLLM answers, and whether it exports the same names.

    Args:
        info: 1 for the version last seen, by `version`.
        conflict: set to whether that version has the names of `v1.100` itself; None where the
            sidecar does not export them.
    """

    def __init__(self, info: Family[Value], conflict: Value | None) -> None:
        self._info = info
        self._conflict = conflict
        self._seen: dict[bytes, Value] = {}
        self._last = b""
        self.due = True
        """Whether to look at the next answer: not at every one."""

    def note(self, headers: RawHeaders) -> None:
        """Take the version from an answer's headers, if it is there."""
        version = header(headers, b"x-litellm-version")
        if version is None:
            return
        self.due = False
        match = _VERSION.fullmatch(version)
        if version == self._last or match is None:
            return
        known = self._seen.get(version)
        new = known is None
        if known is None:
            if len(self._seen) >= _MAX_VERSIONS:
                return
            known = self._seen[version] = self._info.child(version.decode())
        for other in self._seen.values():
            other.value = 0
        known.value = 1
        self._last = version
        if self._conflict is not None:
            emitted = (int(match[1]), int(match[2])) >= _EMITTED_FROM
            self._conflict.value = int(emitted)
            if emitted and new:
                logger.warning("compat_conflict", extra=_ADVICE | {"upstream": version.decode()})
