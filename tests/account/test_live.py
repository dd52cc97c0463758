"""The documents that the page shows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.account import live
from sidecar.account.history import MAX_ROWS, History
from sidecar.account.live import DOCUMENTS, WINDOWS, Live, Setting
from sidecar.account.metrics import Metrics
from sidecar.admin import app as admin

pytestmark = pytest.mark.anyio


class Told:
    """Documents about metrics that a test counts in, by a clock that it sets."""

    def __init__(self, *, costs: bool = True, misses: bool = True) -> None:
        self.now = 1_000_000.0
        self.reason: str | None = None
        labels = ("model", "team_alias", "provider")
        self.metrics = Metrics(
            labels, compat=(), costs=costs, misses=misses, clock=lambda: self.now
        )
        self.history = History(self.metrics, lambda: self.now)
        self.live = Live(
            self.metrics,
            self.history,
            ready=self._ready,
            settings=[Setting("SIDECAR_PORT", "4001", False, "Port for clients.")],
            upstream="http://litellm:4000",
            settle=lambda: None,
        )

    async def _ready(self) -> str | None:
        return self.reason

    def answer(self, read: int = 0, written: int = 0, team: str = "t", model: str = "m") -> None:
        """Count an answer."""
        outcome = "hit" if read else "write" if written else "not_asked"
        names = model, team, "p"
        self.metrics.responses.child(*names, outcome).add(1)
        self.metrics.input_tokens.child(*names, "read").add(read)
        self.metrics.input_tokens.child(*names, "write_1h").add(written)
        self.metrics.input_tokens.child(*names, "uncached").add(10)
        if self.metrics.costs is not None:
            self.metrics.costs.cost.child(*names, "read").add(0.5)

    async def ask(self, name: str, window: str = "start") -> dict[str, Any]:
        self.now += 2
        document: dict[str, Any] = json.loads(await self.live.documents()[name](window))
        return document


async def test_documents_and_windows_are_those_that_are_served() -> None:
    """The admin port offers what is made, and what docs/api.md is written from."""
    told = Told()
    assert list(told.live.documents()) == list(DOCUMENTS)
    assert tuple(WINDOWS) == admin.WINDOWS
    for name in DOCUMENTS:
        for window in WINDOWS:
            assert await told.ask(name, window)


async def test_without_data_nothing_is_zero_percent() -> None:
    """A ratio without a denominator is null."""
    told = Told()
    figures = (await told.ask("summary"))["figures"]
    assert figures["hit_ratio"] == {"by_tokens": None, "by_requests": None}
    assert figures["write_1h_share"] is None
    assert (await told.ask("models"))["rows"] == []
    told.answer()
    figures = (await told.ask("summary"))["figures"]
    assert figures["hit_ratio"] == {"by_tokens": 0.0, "by_requests": None}


async def test_share_of_hours_is_of_what_has_a_time() -> None:
    """As the recording rule has it, on which the alert stands."""
    told = Told()
    told.answer(written=300)
    for cache, tokens in (("write_5m", 100), ("write_unknown", 1000)):
        told.metrics.input_tokens.child("m", "t", "p", cache).add(tokens)

    assert (await told.ask("summary"))["figures"]["write_1h_share"] == 0.75


async def test_what_is_off_is_null() -> None:
    """Money without prices, misses without SIDECAR_MISS_REASONS."""
    told = Told(costs=False, misses=False)
    told.answer(read=5)
    figures = (await told.ask("summary"))["figures"]
    assert (figures["money"], figures["misses"], figures["never_read_tokens"]) == (None,) * 3
    series = await told.ask("series")
    assert (series["spent"], series["saved"], series["never_read"]) == (None,) * 3
    told = Told(misses=False)
    money = (await told.ask("summary"))["figures"]["money"]
    assert money == {"spent": 0.0, "saved": 0.0, "write_premium": 0.0, "never_read": None}


async def test_window_has_what_came_in_it() -> None:
    """Of every document the same; what came before is since the start alone."""
    told = Told()
    told.answer(written=100)
    told.metrics.upstream_failures.child("body_cut").add(2)
    for _ in range(20):
        told.now += 60
        await told.history.look_after()
    told.answer(read=100, team="u")
    told.metrics.upstream_failures.child("body_cut").add(1)

    summary = await told.ask("summary", "15m")
    assert summary["window"]["since"] == told.now - summary["window"]["seconds"]
    assert 900 <= summary["window"]["seconds"] <= 962
    assert summary["figures"]["answers"] == 1
    assert summary["figures"]["hit_ratio"] == {"by_tokens": 100 / 110, "by_requests": 1.0}
    assert summary["faults"] == [
        {"kind": "upstream_failures", "reason": "body_cut", "count": 1, "since_start": 3}
    ]
    rows = (await told.ask("models", "15m"))["rows"]
    assert [row["team_alias"] for row in rows] == ["u"]
    assert rows[0]["figures"]["money"]["spent"] == 0.5
    series = await told.ask("series", "15m")
    assert sum(series["tokens"]["read"]) == 100
    assert (sum(series["spent"]), sum(series["faults"])) == (0.5, 1)
    assert series["by_tokens"][-1] == 100 / 110
    assert set(series["by_tokens"][:-1]) == {None}

    summary = await told.ask("summary", "start")
    assert summary["figures"]["tokens"]["write_1h"] == 100
    assert summary["figures"]["hit_ratio"]["by_requests"] == 0.5
    assert len((await told.ask("models"))["rows"]) == 2


async def test_rows_that_are_not_listed_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost: the rows and the rest make up the whole."""
    told = Told()
    for at in range(MAX_ROWS + 10):
        told.answer(read=at, team=f"t{at}")
    for _ in range(2):
        told.now += 1000
        await told.history.look_after()
    for at in range(MAX_ROWS + 10):
        told.answer(read=at, team=f"t{at}")

    windowed = await told.ask("models", "15m")
    assert windowed["others"]["answers"] == 10
    everything = await told.ask("models", "start")
    assert everything["others"] is None
    assert everything["rows"][0]["team_alias"] == f"t{MAX_ROWS + 9}"
    monkeypatch.setattr(live, "_MAX_LISTED", 100)
    for window in ("15m", "start"):
        models = await told.ask("models", window)
        figures = [row["figures"] for row in models["rows"]] + [models["others"]]
        assert len(figures) == 101
        whole = (await told.ask("summary", window))["figures"]
        assert sum(part["answers"] for part in figures) == whole["answers"]
        assert sum(part["tokens"]["read"] for part in figures) == whole["tokens"]["read"]


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (None, "ready"),
        ("starting", "starting"),
        ("draining", "draining"),
        ("LiteLLM at http://litellm:4000 (SIDECAR_UPSTREAM): connect_failed", "unreachable"),
    ],
)
async def test_state_is_that_of_readyz(reason: str | None, state: str) -> None:
    """With the reason in words."""
    told = Told()
    told.reason = reason
    assert (await told.ask("summary"))["upstream"] == {"state": state, "reason": reason}


async def test_each_start_has_an_id_of_its_own() -> None:
    """A page tells by it that counts began anew."""
    one, other = Told(), Told()
    ids = {(await told.ask("summary"))["instance"]["id"] for told in (one, one, other)}
    assert len(ids) == 2


async def test_versions_are_told() -> None:
    """LiteLLM's is that of its last answer."""
    told = Told()
    instance = (await told.ask("settings"))["instance"]
    assert instance["upstream_version"] is None
    told.metrics.upstream_info.child("1.83.10").value = 0
    told.metrics.upstream_info.child("1.100.5").value = 1
    told.metrics.compat_conflict.child("v1.100").value = 1
    summary = await told.ask("summary")
    assert summary["instance"]["upstream_version"] == "1.100.5"
    assert summary["conflict"] is True


async def test_requests_are_told_by_code() -> None:
    """And those in flight, and what could be read of answers."""
    told = Told()
    told.metrics.http_requests.child("/v1/messages", "POST", "200").add(2)
    told.metrics.http_requests.child("other", "GET", "404").add(1)
    told.metrics.http_in_flight.child("/v1/messages").value = 3
    told.metrics.observations.child("/v1/messages", "m", "complete").add(2)
    told.metrics.observations.child("/v1/messages", "m", "partial").add(0)
    assert (await told.ask("summary"))["requests"] == {
        "in_flight": 3,
        "finished": 3,
        "codes": {"200": 2, "404": 1},
        "observations": {"complete": 2},
    }
