"""What was counted, what is true, and where the two differ.

The counts are read from the text that `/metrics` serves, as any scraper reads it; the truth
comes from the provider's books and from what the clients saw. Each has its own arithmetic, and
neither uses the sidecar's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from sidecar.demo.provider import BookEntry
from sidecar.demo.traffic import Ask, Ending, Key

__all__ = [
    "BY_MODEL",
    "BY_ROUTE",
    "BY_TEAM",
    "Difference",
    "Played",
    "Sums",
    "Tally",
    "counted",
    "differences",
    "truth",
]

Row = tuple[str, ...]
Sums = dict[Row, Counter[str]]

BY_TEAM = (
    "answers",
    "uncached",
    "read",
    "write_5m",
    "write_1h",
    "output",
    "hits",
    "misses",
    "not_asked",
)
"""What is shown for each model and team; what is compared is every column there is."""
BY_MODEL = ("complete", "partial", "error")
BY_ROUTE = ("requests", "client_left", "broke_off", "internal_errors", "label_overflows")

_ROUTE = "/v1/messages"
"""The route of the whole traffic, for the series that have no such label."""
_OUTCOMES = {"hit": "hits", "write": "misses", "not_cached": "misses"}
_LITELLM = {
    "litellm_cached_tokens_metric_total": "litellm_cached_tokens",
    "litellm_cache_hits_metric_total": "litellm_hits",
    "litellm_cache_misses_metric_total": "litellm_misses",
}


@dataclass(frozen=True, slots=True)
class Played:
    """One call that was made."""

    ask: Ask
    ending: Ending
    sequence: int | None
    """Where it stands in the provider's books; None where they do not have it."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums from one side."""

    by_team: Sums = field(default_factory=lambda: defaultdict(Counter))
    """Tokens and outcomes, by model and team."""
    by_model: Sums = field(default_factory=lambda: defaultdict(Counter))
    """How far answers could be read, by model."""
    by_route: Sums = field(default_factory=lambda: defaultdict(Counter))
    """How exchanges ended, by route."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One number on which the two sides do not agree."""

    row: Row
    column: str
    counted: int
    true: int

    def __str__(self) -> str:
        where = ", ".join(self.row)
        return f"{where}: {self.column} counted {self.counted}, true {self.true}"


def counted(exposition: str) -> Tally:
    """Read the sidecar's counts from what `/metrics` says.

    Raises:
        ValueError: the text is no exposition, or a count is not a whole number.
    """
    tally = Tally()
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            for sums, column in _places(tally, sample.name, sample.labels):
                if not float(sample.value).is_integer():
                    raise ValueError(f"{sample.name} is not a whole number: {sample.value}")
                sums[column] += int(sample.value)
    return tally


def _places(
    tally: Tally, name: str, labels: Mapping[str, str]
) -> Iterator[tuple[Counter[str], str]]:
    """Say where a sample is added; nowhere, if it is not one that is compared."""
    by_team = tally.by_team, (labels.get("model", ""), labels.get("team_alias", ""))
    by_model = tally.by_model, (labels.get("model", ""),)
    by_route = tally.by_route, (labels.get("route", _ROUTE),)
    places: list[tuple[tuple[Sums, Row], str]]
    match name.removeprefix("litellm_sidecar_"):
        case "input_tokens_total":
            places = [(by_team, labels["cache"])]
        case "output_tokens_total":
            places = [(by_team, "output")]
        case "responses_total":
            outcome = labels["outcome"]
            places = [(by_team, "answers"), (by_team, _OUTCOMES.get(outcome, outcome))]
        case "observations_total":
            places = [(by_model, labels["status"])]
        case "http_requests_total":
            places = [(by_route, "requests")]
        case "client_disconnects_total":
            places = [(by_route, "client_left")]
        case "upstream_failures_total":
            places = [(by_route, "broke_off")]
        case "internal_errors_total" | "label_overflows_total" as trouble:
            places = [(by_route, trouble.removesuffix("_total"))]
        case litellm if litellm in _LITELLM:
            places = [(by_team, _LITELLM[litellm])]
        case _:
            places = []
    for (sums, row), column in places:
        yield sums[row], column


def truth(entries: Sequence[BookEntry], played: Sequence[Played], keys: Sequence[Key]) -> Tally:
    """Say what the counts must be.

    Args:
        entries: the provider's books.
        played: every call that was made.
        keys: who is who; a key that is not among them has the team `unknown`.
    """
    teams = {key.hashed: key.team for key in keys}
    asked = {one.sequence for one in played if one.ask.ttl is not None}
    tally = Tally()
    for entry in entries:
        sums = tally.by_team[entry.model, teams.get(entry.key, "unknown")]
        split = entry.ephemeral_5m_input_tokens + entry.ephemeral_1h_input_tokens
        hit = entry.cache_read_input_tokens > 0
        miss = not hit and (entry.cache_creation_input_tokens > 0 or entry.sequence in asked)
        sums["answers"] += 1
        sums["uncached"] += entry.input_tokens
        sums["read"] += entry.cache_read_input_tokens
        sums["write_5m"] += entry.ephemeral_5m_input_tokens
        sums["write_1h"] += entry.ephemeral_1h_input_tokens
        sums["write_unknown"] += entry.cache_creation_input_tokens - split
        sums["output"] += entry.output_tokens
        sums["hits"] += hit
        sums["misses"] += miss
        sums["not_asked"] += not hit and not miss
        sums["litellm_cached_tokens"] += entry.cache_read_input_tokens
        sums["litellm_hits"] += hit
        sums["litellm_misses"] += miss
        tally.by_model[(entry.model,)]["complete" if entry.completed else "partial"] += 1
        tally.by_route[(_ROUTE,)]["client_left"] += entry.closed_at is not None
    for one in played:
        tally.by_model[(one.ask.model,)]["error"] += one.ending is Ending.REFUSED
        tally.by_route[(_ROUTE,)]["requests"] += 1
        tally.by_route[(_ROUTE,)]["broke_off"] += one.ending is Ending.BROKEN
    return tally


def differences(count: Tally, true: Tally) -> list[Difference]:
    """Find every number on which the two do not agree; what one does not have is 0."""
    found = []
    for left, right in (
        (count.by_team, true.by_team),
        (count.by_model, true.by_model),
        (count.by_route, true.by_route),
    ):
        for row in sorted(left.keys() | right.keys()):
            ours, theirs = left.get(row, Counter()), right.get(row, Counter())
            found += [
                Difference(row, column, ours[column], theirs[column])
                for column in sorted(ours.keys() | theirs.keys())
                if ours[column] != theirs[column]
            ]
    return found
