"""What is remembered of the counters, and how much of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from sidecar.account import history
from sidecar.account.history import COLUMNS, MAX_BYTES, MAX_ROWS, History, Sample
from sidecar.account.metrics import Metrics

pytestmark = pytest.mark.anyio

LABELS = ("model", "team_alias", "provider")


class Kept:
    """Metrics, their history, and a clock that a test sets."""

    def __init__(self, labels: Sequence[str] = LABELS) -> None:
        self.now = 1_000_000.0
        self.metrics = Metrics(labels, compat=(), costs=True, misses=True, clock=lambda: self.now)
        self.history = History(self.metrics, lambda: self.now)

    def count(self, tokens: float, model: str = "m", team: str = "t") -> None:
        self.metrics.input_tokens.child(model, team, "p", "read").add(tokens)

    async def pass_time(self, seconds: float, step_s: float = 10.0) -> None:
        """Let time go by, looking at the counters as often as that."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + step_s)
            await self.history.look_after()

    def sum_of(self, sample: Sample, name: str) -> float:
        place = self.history.places[name]
        return sample.sums[place] if place < len(sample.sums) else 0.0


async def test_newest_sample_is_what_the_counters_say() -> None:
    """Every family that is kept, by model and team and in all."""
    kept = Kept()
    metrics = kept.metrics
    kept.count(5)
    kept.count(7, team="u")
    metrics.input_tokens.child("m", "t", "q", "write_1h").add(3)
    metrics.output_tokens.child("m", "t", "p").add(11)
    metrics.responses.child("m", "t", "p", "hit").add(2)
    assert metrics.costs is not None
    assert metrics.misses is not None
    assert metrics.misses.never_read_premium is not None
    metrics.costs.cost.child("m", "t", "p", "read").add(0.25)
    metrics.costs.cost.child("m", "t", "p", "output").add(0.5)
    metrics.costs.savings.child("m", "t", "p").add(1.5)
    metrics.costs.premium.child("m", "t", "p", "5m").add(0.125)
    metrics.misses.reasons.child("m", "t", "p", "expired").add(4)
    metrics.misses.never_read.child("m", "t", "p", "1h").add(30)
    metrics.misses.never_read_premium.child("m", "t", "p", "1h").add(0.75)
    metrics.http_requests.child("/v1/messages", "POST", "200").add(6)
    metrics.http_requests.child("other", "GET", "200").add(1)
    metrics.upstream_failures.child("body_cut").add(8)
    metrics.costs.unpriced.child("m", "no_price").add(1)
    metrics.costs.unpriced.child("n", "no_price").add(1)

    sample = await kept.history.read()

    expected = {
        "tokens.read": 12,
        "tokens.write_1h": 3,
        "tokens.output": 11,
        "outcomes.hit": 2,
        "usd.spent": 0.75,
        "usd.saved": 1.5,
        "usd.write_premium": 0.125,
        "usd.never_read": 0.75,
        "never_read_tokens": 30,
        "misses.expired": 4,
        "http_requests.200": 7,
        "upstream_failures.body_cut": 8,
        "unpriced_responses.no_price": 2,
    }
    found = {name: kept.sum_of(sample, name) for name in kept.history.places}
    assert {name: value for name, value in found.items() if value} == expected
    rows = {
        name: dict(zip(COLUMNS, sample.rows[row * len(COLUMNS) :], strict=False))
        for name, row in kept.history.names.items()
    }
    assert rows["m", "t"]["tokens.read"] == 5
    assert rows["m", "t"]["tokens.write_1h"] == 3
    assert rows["m", "u"]["tokens.read"] == 7


async def test_reading_is_shared_for_a_moment() -> None:
    """However many look at the page, the series are gone through once a second."""
    kept = Kept()
    first = await kept.history.read()
    kept.count(1)
    assert await kept.history.read() is first
    kept.now += 1.5
    assert kept.sum_of(await kept.history.read(), "tokens.read") == 1


@pytest.mark.parametrize(
    ("window_s", "late_s"), [(900, 60), (3600, 60), (3900, 300), (21_600, 300)]
)
async def test_window_begins_at_a_sample_shortly_before(window_s: float, late_s: float) -> None:
    """Up to a minute in the last hour, else up to five; and its counts are those of then."""
    kept = Kept()
    for _ in range(7 * 60 + 1):
        kept.count(1)
        await kept.pass_time(60, 30)
    before = kept.history.before(window_s)
    assert window_s <= kept.now - before.at < window_s + late_s
    assert kept.sum_of(before, "tokens.read") == (before.at - 1_000_000) / 60
    assert before.rows[1] == kept.sum_of(before, "tokens.read")


async def test_window_that_is_longer_than_the_process_lives_begins_with_it() -> None:
    """At nothing, at the time of the start."""
    kept = Kept()
    kept.count(5)
    await kept.pass_time(120)
    for window_s in (121, 3600, float("inf")):
        before = kept.history.before(window_s)
        assert (before.at, list(before.sums), list(before.rows)) == (1_000_000, [], [])


async def test_steps_are_no_more_than_asked_for_and_reach_the_newest() -> None:
    """Ten seconds apart where that is little, and thinned out where it is much."""
    kept = Kept()
    await kept.pass_time(300)
    steps = kept.history.steps(kept.history.started_at, 120)
    assert [step.at - 1_000_000 for step in steps] == [10.0 * at for at in range(31)]
    await kept.pass_time(3600 * 7)
    for since_s in (900, 3600, 6 * 3600):
        steps = kept.history.steps(kept.now - since_s, 120)
        assert len(steps) in range(60, 121)
        assert steps[-1].at >= kept.now - 60
        assert steps[0].at - (kept.now - since_s) < since_s / 30
        assert all(not step.rows for step in steps)


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more models than are kept apart, and for longer than is kept; with every sum there
    may be."""
    monkeypatch.setattr(history, "_MAX_SUMS", 40)
    kept = Kept()
    for at in range(MAX_ROWS + 20):
        kept.count(1, model=f"m{at}")
    for code in range(100, 200):
        kept.metrics.http_requests.child("other", "GET", str(code)).add(1)
    await kept.pass_time(7 * 3600, 60)
    grown = kept.history.held_bytes()
    await kept.pass_time(3600, 60)
    assert kept.history.held_bytes() == grown
    assert 0.5 * MAX_BYTES < grown <= MAX_BYTES < 10_000_000
    assert len(kept.history.places) == len(COLUMNS) + 40
    # What is counted since the start is known of every one.
    assert len((await kept.history.read(0)).rows) == (MAX_ROWS + 20) * len(COLUMNS)


async def test_loop_turns_while_series_are_read() -> None:
    """Nobody waits for more than a slice of them."""
    kept = Kept()
    for at in range(2000):
        for kind in ("read", "uncached", "write_5m", "write_1h", "write_unknown"):
            kept.metrics.input_tokens.child(f"m{at}", "t", "p", kind)
    turns = 0
    reading = asyncio.create_task(kept.history.read())
    while not reading.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10_000 / history._SLICE * (history._TURNS - 1)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (("model", "team_alias"), ("m", "t")),
        (("model", "provider"), ("m", "")),
        (("team_alias", "provider"), ("", "m")),
        (("provider", "client"), ("", "")),
    ],
)
async def test_labels_may_be_others(labels: Sequence[str], name: tuple[str, str]) -> None:
    """A row is named by what there is of model and team."""
    kept = Kept(labels)
    kept.metrics.input_tokens.child("m", "t", "read").add(3)
    sample = await kept.history.read()
    assert list(kept.history.names) == [name]
    assert kept.sum_of(sample, "tokens.read") == 3
