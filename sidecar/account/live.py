"""What the live page is told: documents about the counters of this process.

They say what `/metrics` says, summed up, and what of it fell into a window. Every field is a
part of an interface that others may read: `docs/api.md` is made from the classes below, and a
change of a name there is a new version of the path.

It knows the history of the counters and what it is handed. That there is a page, or a server,
it must not know.
"""

from __future__ import annotations

import platform
import secrets
import socket
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import msgspec

from sidecar import __version__
from sidecar.account.history import COLUMNS, MAX_ROWS, History, Sample, let_others
from sidecar.account.metrics import Metrics
from sidecar.exchange import InputClass, MissReason, Outcome

__all__ = ["DOCUMENTS", "WINDOWS", "Live"]

WINDOWS = {"15m": 900.0, "1h": 3600.0, "6h": 21_600.0, "start": float("inf")}
"""Names and seconds of the windows that can be asked for."""

_MAX_POINTS = 120
"""Points of a curve: more than a screen of this size tells apart."""
_SHORT_S = 2.0
"""A last step that is shorter is a part of the one before: it would say little."""
_MAX_LISTED = 500
"""Rows of the table, those with the most input."""
_SLICE = 50
"""Rows that are worked out between two chances for the loop to do other work."""
_FAULTS = (
    "upstream_failures",
    "refusals",
    "internal_errors",
    "label_overflows",
    "log_failures",
    "unpriced_responses",
    "client_disconnects",
)

_AT = {name: at for at, name in enumerate(COLUMNS)}


class Instance(msgspec.Struct, frozen=True):
    """One sidecar, between two starts."""

    id: str
    """Another one after each start: counts begin anew then."""
    started_at: float
    """When this process began to count, in Unix time."""
    pod: str
    """The name of the host, which in Kubernetes is the pod's."""
    version: str
    """The sidecar's."""
    python: str
    """The interpreter's."""
    port: int
    """Where clients connect, 0 as long as that is not known."""
    upstream: str
    """LiteLLM's address, as `SIDECAR_UPSTREAM` has it."""
    upstream_version: str | None
    """LiteLLM's, as its last answer said; null where none has said it."""


class Upstream(msgspec.Struct, frozen=True):
    """Whether it can serve."""

    state: str
    """`ready`, `starting`, `draining` or `unreachable`: what `/readyz` goes by."""
    reason: str | None
    """Why not, in words; null if ready."""


class Window(msgspec.Struct, frozen=True):
    """A stretch of time up to now."""

    name: str
    """`15m`, `1h`, `6h` or `start`."""
    since: float
    """Where it really begins, in Unix time: at the sample before, or at the start."""
    seconds: float
    """How long it is so far."""


class Tokens(msgspec.Struct, frozen=True):
    """Disjoint classes; all but `output` make up the prompts."""

    uncached: int
    """Of the prompts, neither read nor written."""
    read: int
    """Read from the cache."""
    write_5m: int
    """Written for 5 minutes."""
    write_1h: int
    """Written for 1 hour."""
    write_unknown: int
    """Written, the answer does not say for how long."""
    output: int
    """Generated."""


class Outcomes(msgspec.Struct, frozen=True):
    """Answers by what the prompt cache did, as in `litellm_sidecar_responses_total`."""

    hit: int
    """Answers that read from the cache."""
    write: int
    """That wrote and read nothing."""
    not_cached: int
    """That asked for caching and got none."""
    not_asked: int
    """That did not ask."""
    unreported: int
    """That say nothing of the cache."""
    unknown: int
    """Whose request could not be read."""


class HitRatio(msgspec.Struct, frozen=True):
    """Parts of 1."""

    by_tokens: float | None
    """Read tokens of all input tokens, 0 to 1; null where there are none."""
    by_requests: float | None
    """`hit` of `hit`, `write` and `not_cached`, 0 to 1; null where there are none."""


class Money(msgspec.Struct, frozen=True):
    """Sums in USD."""

    spent: float
    """What answers cost, in USD."""
    saved: float
    """What reads would have cost more as ordinary input, in USD."""
    write_premium: float
    """What writes cost more than ordinary input, in USD."""
    never_read: float | None
    """The part of that premium that was paid for writes which nobody has read, in USD; null where
    it is not counted."""


class Figures(msgspec.Struct, frozen=True):
    """What answers used, cost and saved."""

    answers: int
    """2xx answers on observed routes."""
    tokens: Tokens
    """By class."""
    outcomes: Outcomes
    """What the prompt cache did, by answers."""
    hit_ratio: HitRatio
    """The two ratios."""
    write_1h_share: float | None
    """Tokens written for 1 hour, of those written for 5 minutes or 1 hour, 0 to 1; null where there
    are none."""
    money: Money | None
    """Null where no source of prices is in use."""
    never_read_tokens: int | None
    """Tokens written whose time ran out unread; null where `SIDECAR_MISS_REASONS` is off."""
    misses: dict[str, int] | None
    """Answers that asked for caching and read nothing, by the reason; null where
    `SIDECAR_MISS_REASONS` is off."""


class Fault(msgspec.Struct, frozen=True):
    """Something that went wrong, or was turned away."""

    kind: str
    """The metric, without `litellm_sidecar_` and `_total`."""
    reason: str | None
    """Its reason; null where the metric has none."""
    count: int
    """In the window."""
    since_start: int
    """In all."""


class Requests(msgspec.Struct, frozen=True):
    """What is relayed, observed or not."""

    in_flight: int
    """Being relayed now, streams among them."""
    finished: int
    """Relayed to their end, on any route."""
    codes: dict[str, int]
    """Of these, by the status code sent."""
    observations: dict[str, int]
    """Exchanges on observed routes, by what could be read of the answer."""


class Summary(msgspec.Struct, frozen=True):
    """How it is, in numbers."""

    instance: Instance
    """Who says this."""
    at: float
    """When the counters were read, in Unix time."""
    window: Window
    """What the figures are of."""
    upstream: Upstream
    """Whether requests can be served."""
    figures: Figures
    """Of all models and teams."""
    requests: Requests
    """What is relayed."""
    faults: list[Fault]
    """All that have ever happened, the most of the window first."""
    conflict: bool
    """Whether LiteLLM exports the same names itself (`litellm_sidecar_compat_conflict`)."""


class Series(msgspec.Struct, frozen=True):
    """How it went, step by step."""

    instance: str
    """The `id` of who says this."""
    window: Window
    """Where the first step begins, and the end of the last."""
    at: list[float]
    """The end of each step, in Unix time. The last one is still growing."""
    tokens: dict[str, list[int]]
    """Tokens of each step, by class."""
    by_tokens: list[float | None]
    """The hit ratio by tokens of each step; null where there was no input."""
    by_requests: list[float | None]
    """The hit ratio by requests of each step; null where nothing asked for caching."""
    spent: list[float] | None
    """USD of each step; null where no source of prices is in use."""
    saved: list[float] | None
    """As `spent`."""
    never_read: list[float] | None
    """As `spent`; null too where `SIDECAR_MISS_REASONS` is off."""
    in_flight: list[int]
    """Requests being relayed at the end of each step."""
    faults: list[int]
    """Failures of LiteLLM and of the sidecar itself, and requests turned away, of each step."""


class Row(msgspec.Struct, frozen=True):
    """One model and team."""

    model: str
    """As the label says; empty where `SIDECAR_LABELS` has it not."""
    team_alias: str
    """Likewise."""
    figures: Figures
    """Of this model and team."""


class Models(msgspec.Struct, frozen=True):
    """The figures by model and team."""

    instance: str
    """The `id` of who says this."""
    window: Window
    """What the figures are of."""
    rows: list[Row]
    """Models and teams with an answer in the window, the most input first."""
    others: Figures | None
    """The sum of what is not listed: where there are too many rows, or where the window does not
    tell them apart; null where there is nothing."""


class Setting(msgspec.Struct, frozen=True):
    """One variable of the environment."""

    name: str
    """Of the environment variable."""
    value: str
    """In force; of a secret, whether there is one."""
    changed: bool
    """Whether that is not the default."""
    purpose: str
    """What it is for."""


class Settings(msgspec.Struct, frozen=True):
    """What is in force."""

    instance: Instance
    """Who says this."""
    settings: list[Setting]
    """All there are."""


DOCUMENTS: dict[str, type[msgspec.Struct]] = {
    "summary": Summary,
    "series": Series,
    "models": Models,
    "settings": Settings,
}
"""What can be asked for, by the last part of the path."""

_encode = msgspec.json.Encoder().encode


class Live:
    """Makes the documents.

    Args:
        ready: says why requests cannot be served; None if they can.
        settings: what is in force, secrets masked.
        upstream: LiteLLM's address.
        settle: brings up to date what is counted only when somebody asks.
    """

    def __init__(
        self,
        metrics: Metrics,
        history: History,
        *,
        ready: Callable[[], Awaitable[str | None]],
        settings: Sequence[Setting],
        upstream: str,
        settle: Callable[[], None],
    ) -> None:
        self._metrics = metrics
        self._history = history
        self._ready = ready
        self._settings = list(settings)
        self._upstream = upstream
        self._settle = settle
        self.port = 0
        """Of the data port; it is known when it is bound."""
        self._id = secrets.token_hex(8)
        self._pod = socket.gethostname()

    def documents(self) -> Mapping[str, Callable[[str], Awaitable[bytes]]]:
        """Return what makes each document, as JSON, from the name of a window."""
        return {
            "summary": self.summary,
            "series": self.series,
            "models": self.models,
            "settings": self.settings,
        }

    async def summary(self, window: str) -> bytes:
        """How it is, in numbers."""
        reason = await self._ready()
        now, before, said = await self._between(window)
        change = partial(self._change, now, before)
        faults = [
            Fault(kind, name.removeprefix(kind).removeprefix(".") or None, change(name), so_far)
            for name in self._history.places
            for kind in (name.partition(".")[0],)
            if kind in _FAULTS and (so_far := self._change(now, None, name))
        ]
        faults += [
            Fault(name.partition(".")[0], "failure", change(name), so_far)
            for name in ("price_refreshes.failure", "team_file_reloads.failure")
            if (so_far := self._change(now, None, name))
        ]
        codes = self._named(now, before, "http_requests.")
        document = Summary(
            instance=self._instance(),
            at=now.at,
            window=said,
            upstream=Upstream(_state(reason), reason),
            figures=self._figures(_between(now, before)),
            requests=Requests(
                in_flight=self._change(now, None, "http_requests_in_flight"),
                finished=sum(codes.values()),
                codes=codes,
                observations=self._named(now, before, "observations."),
            ),
            faults=sorted(faults, key=lambda fault: (-fault.count, -fault.since_start)),
            conflict=bool(self._change(now, None, "compat_conflict")),
        )
        return _encode(document)

    async def series(self, window: str) -> bytes:
        """How it went, step by step."""
        now, before, said = await self._between(window)
        kept = self._history.steps(before.at, _MAX_POINTS)
        samples = [
            before,
            *[sample for sample in kept if before.at < sample.at < now.at - _SHORT_S],
            now,
        ]
        steps = list(pairwise(samples))

        def increases(name: str) -> list[float]:
            place = _AT[name]
            return [_at(later, place) - _at(earlier, place) for earlier, later in steps]

        tokens = {kind: increases(f"tokens.{kind}") for kind in (*InputClass, "output")}
        outcomes = {kind: increases(f"outcomes.{kind}") for kind in Outcome}
        money = self._metrics.costs is not None
        failures = [
            self._history.places[name]
            for name in self._history.places
            if name.partition(".")[0] in ("upstream_failures", "refusals", "internal_errors")
        ]
        in_flight = self._history.places.get("http_requests_in_flight", -1)
        document = Series(
            instance=self._id,
            window=said,
            at=[later.at for _, later in steps],
            tokens={kind: [int(value) for value in values] for kind, values in tokens.items()},
            by_tokens=[
                _ratio(step[1], sum(step))
                for step in zip(*[tokens[kind] for kind in InputClass], strict=True)
            ],
            by_requests=[
                _ratio(hit, hit + write + not_cached)
                for hit, write, not_cached in zip(
                    outcomes[Outcome.HIT],
                    outcomes[Outcome.WRITE],
                    outcomes[Outcome.NOT_CACHED],
                    strict=True,
                )
            ],
            spent=increases("usd.spent") if money else None,
            saved=increases("usd.saved") if money else None,
            never_read=increases("usd.never_read")
            if money and self._metrics.misses is not None
            else None,
            in_flight=[int(_at(later, in_flight)) for _, later in steps],
            faults=[
                int(sum(_at(later, place) - _at(earlier, place) for place in failures))
                for earlier, later in steps
            ],
        )
        return _encode(document)

    async def models(self, window: str) -> bytes:
        """The same figures, by model and team."""
        now, before, said = await self._between(window)
        names = list(self._history.names.items())
        if window != "start" and before.at > self._history.started_at:
            names = names[:MAX_ROWS]
        width = len(COLUMNS)
        blank = array("d", bytes(8 * width))
        rest = _between(now, before)
        answered = []
        for at, (name, row) in enumerate(names):
            if at % _SLICE == 0:
                await let_others()
            values = now.rows[row * width : (row + 1) * width] or blank
            then = before.rows[row * width : (row + 1) * width] or blank
            change = [value - earlier for value, earlier in zip(values, then, strict=True)]
            if any(change):
                answered.append((name, change))
        answered.sort(key=lambda one: -sum(one[1][: len(InputClass)]))
        listed = []
        for at, ((model, team), change) in enumerate(answered[:_MAX_LISTED]):
            if at % _SLICE == 0:
                await let_others()
            listed.append(Row(model, team, self._figures(change)))
            rest = [left - part for left, part in zip(rest, change, strict=True)]
        tokens_and_answers = rest[: len(InputClass) + 1 + len(Outcome)]
        document = Models(
            instance=self._id,
            window=said,
            rows=listed,
            # Sums of money leave a rest of their own.
            others=self._figures(rest) if any(tokens_and_answers) else None,
        )
        return _encode(document)

    async def settings(self, _: str) -> bytes:
        """What is in force."""
        return _encode(Settings(self._instance(), self._settings))

    async def _between(self, window: str) -> tuple[Sample, Sample, Window]:
        """Read the counters, and find what they were when the window began."""
        self._settle()
        now = await self._history.read()
        before = self._history.before(WINDOWS[window])
        return now, before, Window(window, before.at, max(0.0, now.at - before.at))

    def _instance(self) -> Instance:
        versions = self._metrics.upstream_info.children
        return Instance(
            id=self._id,
            started_at=self._history.started_at,
            pod=self._pod,
            port=self.port,
            version=__version__,
            python=platform.python_version(),
            upstream=self._upstream,
            upstream_version=next(
                (values[0] for values, child in versions.items() if child.value), None
            ),
        )

    def _change(self, now: Sample, before: Sample | None, name: str) -> int:
        place = self._history.places.get(name, -1)
        return int(_at(now, place) - (_at(before, place) if before is not None else 0))

    def _named(self, now: Sample, before: Sample, prefix: str) -> dict[str, int]:
        found = {
            name.removeprefix(prefix): self._change(now, before, name)
            for name in sorted(self._history.places)
            if name.startswith(prefix)
        }
        return {name: count for name, count in found.items() if count}

    def _figures(self, change: Sequence[float]) -> Figures:
        """Put the columns of a row, or of all rows, into words."""
        tokens = {kind: int(change[_AT[f"tokens.{kind}"]]) for kind in (*InputClass, "output")}
        outcomes = {str(kind): int(change[_AT[f"outcomes.{kind}"]]) for kind in Outcome}
        misses = self._metrics.misses is not None
        # As the alert has it: that an answer stops saying for how long is no shorter time.
        told = tokens["write_5m"] + tokens["write_1h"]
        return Figures(
            answers=sum(outcomes.values()),
            tokens=Tokens(**{str(kind): count for kind, count in tokens.items()}),
            outcomes=Outcomes(**outcomes),
            hit_ratio=HitRatio(
                by_tokens=_ratio(tokens["read"], sum(tokens[kind] for kind in InputClass)),
                by_requests=_ratio(
                    outcomes["hit"],
                    outcomes["hit"] + outcomes["write"] + outcomes["not_cached"],
                ),
            ),
            write_1h_share=_ratio(tokens["write_1h"], told),
            money=Money(
                spent=change[_AT["usd.spent"]],
                saved=change[_AT["usd.saved"]],
                write_premium=change[_AT["usd.write_premium"]],
                never_read=change[_AT["usd.never_read"]] if misses else None,
            )
            if self._metrics.costs is not None
            else None,
            never_read_tokens=int(change[_AT["never_read_tokens"]]) if misses else None,
            misses={
                reason: count
                for reason in MissReason
                if (count := int(change[_AT[f"misses.{reason}"]]))
            }
            if misses
            else None,
        )


def _state(reason: str | None) -> str:
    if reason is None or reason in ("starting", "draining"):
        return reason or "ready"
    return "unreachable"


def _at(sample: Sample, place: int) -> float:
    return sample.sums[place] if 0 <= place < len(sample.sums) else 0.0


def _between(now: Sample, before: Sample) -> list[float]:
    """By how much each column has risen, over all rows."""
    return [_at(now, place) - _at(before, place) for place in range(len(COLUMNS))]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
