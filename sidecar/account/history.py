"""The last hours of the counters, in memory: what the live page draws and compares with.

A sample holds the counters as they were at one time. Between two of them lie the increases of
a window, so that nothing is counted twice and the newest sample is what `/metrics` says. Money
and tokens are kept by model and team, everything else in sums.

Reading tens of thousands of series takes tens of milliseconds, as a scrape does: it is done in
slices, between which the loop runs. Nothing here is on the path of a request.

What it takes is bounded, whatever is counted and however long: see `MAX_BYTES`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Protocol, cast

from sidecar.account.metrics import PREFIX, Metrics
from sidecar.account.store import Value
from sidecar.exchange import InputClass, MissReason, Outcome

__all__ = ["COLUMNS", "MAX_BYTES", "MAX_ROWS", "History", "Sample", "let_others"]

COLUMNS = (
    *(f"tokens.{kind}" for kind in InputClass),
    "tokens.output",
    *(f"outcomes.{outcome}" for outcome in Outcome),
    "usd.spent",
    "usd.saved",
    "usd.write_premium",
    "usd.never_read",
    "never_read_tokens",
    *(f"misses.{reason}" for reason in MissReason),
)
"""What is kept of each model and team."""

MAX_ROWS = 256
"""Pairs of model and team that windows tell apart, the first that came; of the rest windows know
the sum. What is counted since the start is known of each."""
_MAX_SUMS = 256
"""Sums kept beside those of the columns: closed sets, and status codes."""

_HOUR_S = 3600.0
SPAN_S = 6 * _HOUR_S
"""How far back windows reach."""


def _held(step_s: float, span_s: float) -> int:
    """How many samples a ring holds: one more than steps, and the one that goes next."""
    return round(span_s / step_s) + 2


_SUMS = ((10.0, _HOUR_S), (60.0, SPAN_S))
"""Steps and spans of the samples that curves are drawn from."""
_ROWS = ((60.0, _HOUR_S), (300.0, SPAN_S))
"""Of those that windows begin with, which have rows."""
MAX_BYTES = 8 * (
    (len(COLUMNS) + _MAX_SUMS) * sum(_held(*ring) for ring in (*_SUMS, *_ROWS))
    + len(COLUMNS) * MAX_ROWS * sum(_held(*ring) for ring in _ROWS)
)
"""What all samples together may take: 9 MB with every row and every sum there can be. With ten
pairs of model and team it is 1 MB."""

_SLICE = 500
"""Series read between two chances for the loop to do other work: well under 1 ms."""
_TURNS = 5


class _Counted(Protocol):
    """A family of counters or gauges."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def children(self) -> Mapping[tuple[str, ...], Value]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at one time."""

    at: float
    """Unix time in seconds."""
    sums: array[float]
    """By the place that `History.places` gives each name; a place past its end was 0."""
    rows: array[float]
    """Row after row, each with a value for every column; a row past its end was 0."""


class _Ring:
    """Samples at a distance, the oldest of which makes room."""

    def __init__(self, step_s: float, span_s: float) -> None:
        self._step_s = step_s
        self.samples: deque[Sample] = deque(maxlen=_held(step_s, span_s))

    def offer(self, sample: Sample) -> None:
        """Take a sample if it is due."""
        if self.due(sample.at):
            self.samples.append(sample)

    def due(self, at: float) -> bool:
        """Half a second early is as good: what wakes us is not exact."""
        return not self.samples or at - self.samples[-1].at >= self._step_s - 0.5

    def reaches(self, at: float) -> bool:
        """Whether it knows what was then."""
        return bool(self.samples) and self.samples[0].at <= at


@dataclass(frozen=True, slots=True)
class _Source:
    """A family whose children are counted by model and team."""

    family: _Counted
    name_of: Callable[[tuple[str, ...]], tuple[str, str]]
    column: int
    columns: Mapping[str, int] | None
    """Columns by the value of the family's last label; None where `column` is the only one."""


class History:
    """Samples of the counters.

    Args:
        clock: Unix time in seconds, never set back.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._clock = clock
        families = {
            family.name.removeprefix(PREFIX): cast("_Counted", family)
            for family in metrics.store.families
            if family.kind != "histogram"
        }
        self._sources = list(_sources(families, metrics.labels))
        self._grouped = list(_grouped(families))
        self.families = families
        """By name, without prefix and suffix."""
        self.places: dict[str, int] = {name: at for at, name in enumerate(COLUMNS)}
        """Where a sum stands in a sample."""
        self.names: dict[tuple[str, str], int] = {}
        """The row of each model and team, in the order in which they came."""
        self._sums = [_Ring(*ring) for ring in _SUMS]
        self._rows = [_Ring(*ring) for ring in _ROWS]
        self._reading = asyncio.Lock()
        self._latest: Sample | None = None
        self.started_at = clock()
        self._keep(Sample(self.started_at, array("d"), array("d")))

    async def read(self, max_age_s: float = 1.0) -> Sample:
        """Read the counters as they are now, or were a moment ago, with every row."""
        async with self._reading:
            latest = self._latest
            if latest is None or self._clock() - latest.at > max_age_s:
                latest = self._latest = await self._pass()
        return latest

    async def look_after(self) -> None:
        """Take a sample if one is due."""
        if self._sums[0].due(self._clock()):
            self._keep(await self.read(0))

    def before(self, window_s: float) -> Sample:
        """Return what the counters were at the beginning of a window that ends now, or shortly
        before: up to a minute in the last hour, else up to five."""
        since = self._clock() - window_s
        if since <= self.started_at:
            return Sample(self.started_at, array("d"), array("d"))
        ring = next((ring for ring in self._rows if ring.reaches(since)), self._rows[-1])
        found = ring.samples[0]
        for sample in ring.samples:
            if sample.at > since:
                break
            found = sample
        return found

    def steps(self, since: float, at_most: int) -> list[Sample]:
        """Return what was kept from a time on, in about equal steps; their rows are left out."""
        ring = next((ring for ring in self._sums if ring.reaches(since)), self._sums[-1])
        samples = [sample for sample in ring.samples if sample.at >= since]
        every = -(-len(samples) // at_most) or 1
        # Counted from the end, so that the newest is there.
        return samples[::-1][::every][::-1]

    def held_bytes(self) -> int:
        """How much the samples take."""
        arrays = {
            id(part): part
            for ring in (*self._sums, *self._rows)
            for sample in ring.samples
            for part in (sample.sums, sample.rows)
        }
        return sum(part.itemsize * len(part) for part in arrays.values())

    def _keep(self, sample: Sample) -> None:
        bare = Sample(sample.at, sample.sums, array("d"))
        for ring in self._sums:
            ring.offer(bare)
        kept = Sample(sample.at, sample.sums, sample.rows[: MAX_ROWS * len(COLUMNS)])
        for ring in self._rows:
            ring.offer(kept)

    async def _pass(self) -> Sample:
        """Go through all series that are kept."""
        at = self._clock()
        width = len(COLUMNS)
        blank = bytes(8 * width)
        rows = array("d", blank * len(self.names))
        for source in self._sources:
            for children in _sliced(source.family):
                for child in children:
                    column = source.column
                    if source.columns is not None:
                        found = source.columns.get(child.values[-1])
                        if found is None:
                            continue
                        column = found
                    name = source.name_of(child.values)
                    row = self.names.get(name)
                    if row is None:
                        row = self.names[name] = len(self.names)
                        rows.frombytes(blank)
                    rows[row * width + column] += child.value
                await let_others()
        sums = array("d", [sum(rows[column::width]) for column in range(width)])
        sums.frombytes(bytes(8 * (len(self.places) - width)))
        for family, group in self._grouped:
            for children in _sliced(family):
                for child in children:
                    name_of_sum = group(child.values)
                    place = self.places.get(name_of_sum)
                    if place is None:
                        if len(self.places) >= width + _MAX_SUMS:
                            continue
                        place = self.places[name_of_sum] = len(self.places)
                        sums.append(0.0)
                    sums[place] += child.value
                await let_others()
        return Sample(at, sums, rows)


def _sliced(family: _Counted) -> Iterator[list[Value]]:
    children = iter(list(family.children.values()))
    while piece := list(islice(children, _SLICE)):
        yield piece


async def let_others() -> None:
    """Give the loop a few turns: a chunk of a stream takes some on its way through."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def _sources(families: Mapping[str, _Counted], labels: Sequence[str]) -> Iterator[_Source]:
    """Say which families are counted by model and team, and in which columns."""
    name_of = _name_of(labels)

    def columns(prefix: str) -> dict[str, int]:
        return {
            name.removeprefix(prefix): at
            for at, name in enumerate(COLUMNS)
            if name.startswith(prefix)
        }

    for name, found in (
        ("input_tokens", columns("tokens.")),
        ("output_tokens", "tokens.output"),
        ("responses", columns("outcomes.")),
        ("cost_usd", "usd.spent"),
        ("cache_read_savings_usd", "usd.saved"),
        ("cache_write_premium_usd", "usd.write_premium"),
        ("cache_write_premium_never_read_usd", "usd.never_read"),
        ("cache_write_tokens_never_read", "never_read_tokens"),
        ("cache_misses", columns("misses.")),
    ):
        if (family := families.get(name)) is None:
            continue
        if isinstance(found, str):
            yield _Source(family, name_of, COLUMNS.index(found), None)
        else:
            yield _Source(family, name_of, 0, found)


def _name_of(labels: Sequence[str]) -> Callable[[tuple[str, ...]], tuple[str, str]]:
    """Make what takes model and team from the values of a child; empty where they are no label."""
    places = [labels.index(label) for label in ("model", "team_alias") if label in labels]
    if len(places) == 2:
        return itemgetter(*places)
    if labels and "model" in labels:
        return lambda values: (values[places[0]], "")
    if "team_alias" in labels:
        return lambda values: ("", values[places[0]])
    return lambda _: ("", "")


def _grouped(
    families: Mapping[str, _Counted],
) -> Iterator[tuple[_Counted, Callable[[tuple[str, ...]], str]]]:
    """Say which families are summed up, and by which of their labels."""
    for name, label in (
        ("http_requests", "code"),
        ("http_requests_in_flight", None),
        ("observations", "status"),
        ("upstream_failures", "reason"),
        ("client_disconnects", None),
        ("refusals", "reason"),
        ("internal_errors", "room"),
        ("label_overflows", "label"),
        ("log_failures", "reason"),
        ("unpriced_responses", "reason"),
        ("price_refreshes", "result"),
        ("team_file_reloads", "result"),
        ("compat_conflict", None),
    ):
        if (family := families.get(name)) is not None:
            yield family, partial(_sum_of, name, family.labels.index(label) if label else None)


def _sum_of(name: str, place: int | None, values: tuple[str, ...]) -> str:
    return name if place is None else f"{name}.{values[place]}"
