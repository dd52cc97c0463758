"""The rules, the alerts and the cookbook, asked of a real Prometheus that runs the configuration
that ships, over a sidecar and a LiteLLM.

Two hours of traffic are played within seconds: one in which all is well, and the bad one. What is
true stands in the providers' books. The lengths of time in what is asked are those of the play:
`[1h]` is the bad hour, `[1h] offset 1w` the good one, `[1d]` both. They begin and end at samples
of the sidecar's, so that nothing of it is extrapolated.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.demo.provider import BookEntry
from tests.support.calls import SONNET_USD, ask_now, body_for, post, request, samples
from tests.support.clouds import Clouds
from tests.support.dashboard import interpolated, load, queries
from tests.support.litellm import (
    BLUE,
    DIRECT_MODEL,
    LONER,
    MASTER_KEY,
    RED,
    Identity,
    LiteLLM,
)
from tests.support.prometheus import Prometheus, Sample, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"
QUERIES = re.findall(
    r"(?m)^## Question (\d+): |```promql\n(.*?)```",
    (ROOT / "docs" / "cookbook.md").read_text(),
    re.DOTALL,
)

pytestmark = pytest.mark.parametrize("litellm", ["1.83.10"], indirect=True, ids=["litellm-1.83.10"])

_REGIONAL = 1.1
"""Bedrock's `us.` costs a tenth more."""


def cookbook() -> dict[str, str]:
    """The queries of the page, by number of question and place in it: `1a`, `1b`."""
    found: dict[str, str] = {}
    question, place = "", 0
    for number, query in QUERIES:
        if number:
            question, place = number, 0
        else:
            found[f"{question}{chr(ord('a') + place)}"] = query
            place += 1
    return found


COOKBOOK = cookbook()


@dataclass
class Played:
    """What was played, and when."""

    prometheus: Prometheus
    sidecar: SidecarProcess
    litellm: LiteLLM
    clouds: Clouds
    began: float = 0.0
    turned: float = 0.0
    ended: float = 0.0
    calls: list[tuple[str, str, str, BookEntry]] = field(default_factory=list)
    """Of each: which hour, team, model, and what the books say."""
    counted: float = 0.0
    """How many answers LiteLLM counts when it has counted all of them."""

    def call(
        self,
        hour: str,
        team: Identity,
        client: str,
        model: str,
        topic: str,
        *,
        times: int = 1,
        past: bool = False,
        **options: Any,
    ) -> None:
        """Make calls through the sidecar, or past it."""
        body = body_for(model, f"cookbook {hour} {topic}", **options)
        for _ in range(times):
            before = len(self.clouds.books.entries)
            raw = post(body, team.key, **{"User-Agent": client})
            answer = ask_now(self.litellm.url if past else self.sidecar.url, raw)
            assert (answer.status, answer.complete) == (200, True), answer.body
            self.counted += 1
            (entry,) = self.clouds.books.entries[before:]
            if not past:
                self.calls.append((hour, team.team_alias or "None", model, entry))

    def pass_through(self, hour: str) -> None:
        """Make a call that LiteLLM passes through; its team is not known."""
        body = body_for(DIRECT_MODEL, f"passed through in a {hour} hour")
        before = len(self.clouds.books.entries)
        raw = request("POST", "/anthropic/v1/messages", {"x-api-key": RED.key}, body)
        assert ask_now(self.sidecar.url, raw).status == 200
        self.counted += 1
        (entry,) = self.clouds.books.entries[before:]
        self.calls.append((hour, "unknown", DIRECT_MODEL, entry))

    def now(self) -> float:
        """When the last sample of the sidecar was taken, with all that was counted before."""
        # LiteLLM counts after it has answered.
        deadline = time.monotonic() + 30
        while answered(self.litellm) < self.counted:
            assert time.monotonic() < deadline, "LiteLLM has not counted all calls"
            time.sleep(0.05)
        self.prometheus.wait_for_scrapes(3)
        ((_, stamp),) = self.prometheus.query("timestamp(litellm_sidecar_build_info)")
        # LiteLLM is scraped at other moments: what follows must not be in its first sample.
        self.prometheus.wait_for_scrapes(1)
        return stamp

    def ask(self, text: str) -> list[Sample]:
        """Ask a query of the page, with the times of the play."""

        def ms(seconds: float) -> str:
            return f"{round(1000 * seconds)}ms"

        good, bad = self.turned - self.began, self.ended - self.turned
        text = text.replace("[1h] offset 1w", f"[{ms(good)}] offset {ms(bad)}")
        text = text.replace("[1h]", f"[{ms(bad)}]").replace("[1d]", f"[{ms(good + bad)}]")
        assert "1w" not in text
        return self.prometheus.query(text, at=self.ended)

    def true(self, hour: str | None, **chosen: str) -> Counter[str]:
        """Add up the books: of one hour or both, of a team, a model."""
        total: Counter[str] = Counter()
        for its, team, model, entry in self.calls:
            if its not in ((hour,) if hour else ("good", "bad")):
                continue
            if chosen.get("team", team) != team or chosen.get("model", model) != model:
                continue
            for name in SONNET_USD:
                total[name] += getattr(entry, name)
            written = entry.cache_creation_input_tokens
            total["prompt"] += entry.input_tokens + entry.cache_read_input_tokens + written
            total["written"] += written
            total["calls"] += 1
            total["hits"] += entry.cache_read_input_tokens > 0
        return total


@pytest.fixture(scope="module")
def played(
    clouds: Clouds, litellm: LiteLLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Played]:
    """Play the good hour and the bad one."""
    require(find_prometheus(), "Prometheus")
    directory = tmp_path_factory.mktemp("cookbook")
    settings = {
        "SIDECAR_UPSTREAM": litellm.url,
        "SIDECAR_LABELS": "model,team_alias,provider,model_id,client,api_key_alias,hashed_api_key",
        "SIDECAR_PRICE_SOURCES": "file,model_info,cost_map,package",
        "SIDECAR_LITELLM_KEY": MASTER_KEY,
    }
    with sidecar_process(directory, settings) as sidecar:
        targets = {
            "litellm-sidecar": sidecar.admin_url.removeprefix("http://"),
            "litellm": litellm.url.removeprefix("http://"),
        }
        config = shipped(directory)
        with Prometheus(targets, directory, config=config) as prometheus:
            for source in ("model_info", "cost_map"):
                name = "litellm_sidecar_price_refreshes_total"
                prometheus.wait_for(f'{name}{{source="{source}",result="success"}} > 0')
            week = Played(prometheus, sidecar, litellm, clouds, counted=answered(litellm))
            play(week)
            yield week


def answered(litellm: LiteLLM) -> float:
    """How many answers LiteLLM has counted."""
    name = "litellm_proxy_total_requests_metric_total"
    rows = samples(litellm.metrics())
    return sum(value for found, its, value in rows if found == name and its["status_code"] == "200")


def shipped(directory: Path) -> dict[str, Any]:
    """The configuration and rules that ship, at the speed of the play."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    speed = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["global"] = speed | {"scrape_timeout": "500ms"}
    for name in config["rule_files"]:
        rules = yaml.safe_load((DEPLOY / name).read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
        (directory / name).write_text(yaml.safe_dump(rules))
    return config


def play(week: Played) -> None:
    """Red's client gets a release that spoils its prompts, the loner's stops asking, Blue writes
    for an hour and reads as before; and somebody finds LiteLLM's own port."""
    sides = [
        (RED, "red-app/1.4", "claude-direct"),
        (BLUE, "blue-app/3.0", "claude-bedrock"),
        (BLUE, "blue-app/3.0", "claude-vertex"),
        (LONER, "lone-app/1.0", "claude-direct"),
    ]
    # All series are there before they are looked at; LiteLLM's begin with their first value.
    for team, client, model in sides:
        week.call("before", team, client, model, f"{model}", ttl=None, tokens=100)
    week.call("before", RED, "red-app/2.0", "claude-direct", "x", ttl=None, tokens=100, past=True)
    week.pass_through("before")
    week.began = week.now()

    week.call("good", RED, "red-app/1.4", "claude-direct", "red", tokens=2000, times=5)
    week.call("good", BLUE, "blue-app/3.0", "claude-bedrock", "blue", tokens=3000, times=4)
    week.call("good", BLUE, "blue-app/3.0", "claude-vertex", "v", tokens=1500, times=2, ttl="1h")
    week.call("good", LONER, "lone-app/1.0", "claude-direct", "lone", tokens=1700, times=3)
    week.pass_through("good")
    week.turned = week.now()

    for number in range(5):
        topic = f"red at {number} o'clock"
        week.call("bad", RED, "red-app/2.0", "claude-direct", topic, tokens=2100)
    week.call("bad", BLUE, "blue-app/3.0", "claude-bedrock", "b", tokens=3100, times=4, ttl="1h")
    week.call("bad", BLUE, "blue-app/3.0", "claude-vertex", "v", tokens=1500, times=2, ttl="1h")
    week.call("bad", LONER, "lone-app/1.0", "claude-direct", "l", tokens=1700, times=3, ttl=None)
    week.pass_through("bad")
    for number in range(7):
        week.call("bad", RED, "red-app/2.0", "claude-direct", f"past {number}", past=True)
    week.prometheus.wait_for_scrapes(7)
    week.ended = week.now()


def usd(tokens: Counter[str], factor: float = 1.0) -> float:
    """What tokens cost at list prices."""
    return factor * sum(rate * tokens[name] for name, rate in SONNET_USD.items()) / 1e6


def by(rows: list[Sample], *labels: str) -> dict[Any, float]:
    """Rows by the values of some labels; there are no others."""
    assert all(set(row) - {"__name__"} <= set(labels) for row, _ in rows), rows
    found = {tuple(row.get(label, "") for label in labels): value for row, value in rows}
    assert len(found) == len(rows)
    return {key[0] if len(key) == 1 else key: value for key, value in found.items()}


def read_ratio(tokens: Counter[str]) -> float:
    """The part of the prompt that was read."""
    return tokens["cache_read_input_tokens"] / tokens["prompt"]


# The cookbook


@pytest.mark.parametrize("place", COOKBOOK)
def test_query_has_an_answer(played: Played, place: str) -> None:
    """Prometheus takes it, and there is something to be read."""
    rows = played.ask(COOKBOOK[place])

    assert rows
    assert [row for row, value in rows if value != value] == [], "a ratio of nothing"


def test_ratio_fell_by_what_the_books_say(played: Played) -> None:
    """1: by tokens and by requests."""
    good, bad = played.true("good"), played.true("bad")

    ((_, by_tokens),) = played.ask(COOKBOOK["1a"])
    assert by_tokens == pytest.approx(read_ratio(bad) - read_ratio(good), abs=1e-3)
    ((_, by_requests),) = played.ask(COOKBOOK["1b"])
    asked = bad["calls"] - played.true("bad", team="None")["calls"]
    expected = bad["hits"] / asked - good["hits"] / good["calls"]
    assert by_requests == pytest.approx(expected, abs=1e-3)


def test_red_lost_most(played: Played) -> None:
    """2: by tokens and by money."""
    good = played.true("good", team="Team Red", model="claude-direct")
    bad = played.true("bad", team="Team Red", model="claude-direct")

    lost = by(played.ask(COOKBOOK["2a"]), "model", "team_alias")
    assert max(lost, key=lost.__getitem__) == ("claude-direct", "Team Red")
    expected = (read_ratio(good) - read_ratio(bad)) * bad["prompt"]
    assert lost["claude-direct", "Team Red"] == pytest.approx(expected, rel=0.05)

    worth = by(played.ask(COOKBOOK["2b"]), "model", "team_alias")
    saved = 2.7 * good["cache_read_input_tokens"] - 0.75 * good["written"]
    expected = (-0.75 * bad["written"] - saved) / 1e6
    assert worth["claude-direct", "Team Red"] == pytest.approx(expected, rel=0.05)
    assert min(worth, key=worth.__getitem__) == ("claude-direct", "Team Red")


def test_no_provider_but_anthropic(played: Played) -> None:
    """3: Bedrock and Vertex AI read what they read before."""
    fell = by(played.ask(COOKBOOK["3a"]), "provider")

    assert fell["anthropic"] < -0.4
    for model, provider in (("claude-bedrock", "bedrock"), ("claude-vertex", "vertex_ai")):
        now, then = (read_ratio(played.true(hour, model=model)) for hour in ("bad", "good"))
        assert fell[provider] == pytest.approx(now - then, abs=1e-3)


def test_one_asks_in_vain_and_one_no_longer(played: Played) -> None:
    """4: what hits lost went to writes with Red, and to not asking with the loner."""
    moved = by(played.ask(COOKBOOK["4a"]), "team_alias", "outcome")

    assert moved["Team Red", "write"] == pytest.approx(0.8, abs=1e-3)
    assert moved["None", "not_asked"] == pytest.approx(1, abs=1e-3)
    assert moved["Team Blue", "hit"] == pytest.approx(0, abs=1e-3)


def test_what_writes_pay_back(played: Played) -> None:
    """6: savings for each USD of premium, and reads for each token written for an hour."""
    paid = by(played.ask(COOKBOOK["6a"]), "model", "team_alias")
    both = played.true(None, model="claude-bedrock")
    premium = 0.75 * both["ephemeral_5m_input_tokens"] + 3 * both["ephemeral_1h_input_tokens"]
    expected = 2.7 * both["cache_read_input_tokens"] / premium
    assert paid["claude-bedrock", "Team Blue"] == pytest.approx(expected, rel=1e-3)

    reads = by(played.ask(COOKBOOK["6c"]), "model", "team_alias")
    expected = both["cache_read_input_tokens"] / both["ephemeral_1h_input_tokens"]
    assert reads["claude-bedrock", "Team Blue"] == pytest.approx(expected, rel=1e-3)


def test_what_the_bill_is_made_of(played: Played) -> None:
    """7: the price of each kind is that of the list, volume and output are the books'."""
    prices = by(played.ask(COOKBOOK["7d"]), "model", "kind")
    assert prices["claude-bedrock", "read"] == pytest.approx(0.3 * _REGIONAL, rel=1e-6)
    assert prices["claude-bedrock", "write_1h"] == pytest.approx(6 * _REGIONAL, rel=1e-6)

    then, now = (played.true(hour, model="claude-bedrock") for hour in ("good", "bad"))
    volume = by(played.ask(COOKBOOK["7b"]), "model")
    assert volume["claude-bedrock"] == pytest.approx(now["prompt"] / then["prompt"], rel=1e-3)
    output = by(played.ask(COOKBOOK["7c"]), "model")
    expected = now["output_tokens"] / then["output_tokens"]
    assert output["claude-bedrock"] == pytest.approx(expected, rel=1e-3)


def test_litellm_billed_too_little(played: Played) -> None:
    """8: 1.83.10 bills nothing for what Blue wrote for an hour; Vertex AI's has no price here."""
    drift = by(played.ask(COOKBOOK["8a"]), "team_alias")
    assert drift["Team Blue"] < -0.3
    unpriced = by(played.ask(COOKBOOK["8b"]), "model", "reason")
    assert unpriced["claude-vertex", "no_write_1h_rate"] == pytest.approx(1, abs=1e-3)


def test_the_dashboard_shows_the_same_drift(played: Played) -> None:
    """The one query of the dashboard that asks for LiteLLM's spend; the others have a test of their
    own."""
    (query,) = (query for query in queries(load()) if "litellm_spend_metric" in query.expr)
    bad_hour = f"{round(1000 * (played.ended - played.turned))}ms"
    expr = interpolated(query.expr, {"__range": bad_hour, "namespace": ".*", "team_alias": ".*"})

    shown = by(played.prometheus.query(expr, at=played.ended), "team_alias")

    assert shown == by(played.ask(COOKBOOK["8a"]), "team_alias")
    assert shown["Team Blue"] < -0.3


def test_somebody_found_the_other_port(played: Played) -> None:
    """9: 14 of 21 calls came through, all of those could be read, one team is not known."""
    seen = by(played.ask(COOKBOOK["9a"]), "route")
    # LiteLLM is not scraped at the same moment: its count is extrapolated, by a fifth at most.
    assert 14 / 21 / 1.2 <= seen["/v1/messages"] <= 14 / 21 + 1e-3
    assert by(played.ask(COOKBOOK["9b"]), "status")["complete"] == pytest.approx(1, abs=1e-3)
    unknown, bad = played.true("bad", team="unknown"), played.true("bad")
    share = by(played.ask(COOKBOOK["9c"]), "team_alias")["unknown"]
    assert share == pytest.approx(unknown["prompt"] / bad["prompt"], rel=0.05)


def test_the_release_that_began_it(played: Played) -> None:
    """10: the new one, its key, and that it reads nothing."""
    assert by(played.ask(COOKBOOK["10a"]), "client")["red-app/2"] == 0
    assert set(by(played.ask(COOKBOOK["10b"]), "client")) == {"red-app/2"}
    writes = by(played.ask(COOKBOOK["10c"]), "api_key_alias", "client")
    assert max(writes, key=writes.__getitem__) == ("red-laptop", "red-app/2")


# Rules and alerts


def test_every_rule_is_evaluated(played: Played) -> None:
    """Prometheus has nothing to say against any of them, and what has data has a value; only the
    medians want hours of it."""
    rules = played.prometheus.rules()
    names = {
        rule.get("record") or rule["alert"]
        for name in ("rules.yml", "alerts.yml")
        for group in yaml.safe_load((DEPLOY / name).read_text())["groups"]
        for rule in group["rules"]
    }

    assert {rule["name"] for rule in rules} == names
    assert [(r["name"], r["lastError"]) for r in rules if r["health"] != "ok"] == []
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    empty = {name for name in recorded if not played.prometheus.query(f'{{__name__="{name}"}}')}
    assert all(name.endswith("_median7d") for name in empty)
    assert len(empty) == 2


def test_recorded_series_are_the_books(played: Played) -> None:
    """Ratios, what the cache is worth, and drift, of a team whose series were all born at once."""

    def recorded(name: str, **labels: str) -> float:
        chosen = ",".join(f'{label}="{value}"' for label, value in labels.items())
        ((_, value),) = played.prometheus.query(f"{name}{{{chosen}}}")
        return value

    true = played.true(None, model="claude-bedrock")
    true.update(played.true("before", model="claude-bedrock"))
    blue = {"model": "claude-bedrock", "team_alias": "Team Blue"}
    for name in (
        "model_team_alias:litellm_sidecar_cache_read_per_input_token:ratio_rate5m",
        "model_team_alias:litellm_sidecar_cache_read_per_input_token:ratio_rate30m",
    ):
        assert recorded(name, **blue) == pytest.approx(read_ratio(true), rel=1e-6)
    name = "model_team_alias:litellm_sidecar_cache_hits_per_response:ratio_rate5m"
    assert recorded(name, **blue) == pytest.approx(6 / 8, rel=1e-6)
    name = "model_team_alias:litellm_sidecar_cache_write_1h_per_written_token:ratio_rate1h"
    expected = true["ephemeral_1h_input_tokens"] / true["written"]
    assert recorded(name, **blue) == pytest.approx(expected, rel=1e-6)

    cost = recorded("model_team_alias:litellm_sidecar_cost_usd:rate5m", **blue)
    net = recorded("model_team_alias:litellm_sidecar_cache_net_savings_usd:rate5m", **blue)
    premium = 0.75 * true["ephemeral_5m_input_tokens"] + 3 * true["ephemeral_1h_input_tokens"]
    worth = (2.7 * true["cache_read_input_tokens"] - premium) * _REGIONAL / 1e6
    assert 300 * cost == pytest.approx(usd(true, _REGIONAL), rel=0.2)
    assert net / cost == pytest.approx(worth / usd(true, _REGIONAL), rel=1e-6)

    # 1.83.10 bills nothing for a 1-hour write; its first call is in no increase.
    unbilled = Counter({"ephemeral_1h_input_tokens": true["ephemeral_1h_input_tokens"]})
    billed = usd(true - unbilled, _REGIONAL)
    drift = recorded("provider:litellm_spend_per_sidecar_cost_usd:drift1h", provider="bedrock")
    assert drift == pytest.approx(billed / usd(true, _REGIONAL) - 1, abs=0.1)


def test_alerts_are_silent_on_little_traffic(played: Played) -> None:
    """It is a bad hour, and of a few calls: nobody is woken."""
    assert played.prometheus.query("ALERTS") == []


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("PromptCacheWritesWithoutReads", {"model": "claude-bedrock", "team_alias": "Team Blue"}),
        ("SidecarModelUnpriced", {"model": "claude-vertex", "reason": "no_write_1h_rate"}),
        ("SidecarBypassed", {"route": "/v1/messages"}),
    ],
)
def test_alert_speaks_of_what_the_books_say(
    played: Played, name: str, labels: dict[str, str]
) -> None:
    """Asked of the bad hour, with no floor and a limit that everything is beyond, its value is
    the books'."""
    rules = {rule["name"]: rule["query"] for rule in played.prometheus.rules()}
    expression = rules[name]
    for recorded, query in rules.items():
        expression = expression.replace(recorded, f"({query})")
    expression = re.sub(r"\[(?:1h|30m)\]", "[1h]", expression)
    expression = re.sub(r">=? [\d.]+", "> 0", expression).replace("< 0.1", "< 100")
    ((row, value),) = [
        (row, value) for row, value in played.ask(expression) if labels.items() <= row.items()
    ]
    blue = played.true("bad", model="claude-bedrock")
    expected = {
        "PromptCacheWritesWithoutReads": blue["cache_read_input_tokens"] / blue["written"],
        "SidecarModelUnpriced": 1,
        "SidecarBypassed": 7 / 21,
    }[name]
    assert row == labels
    if name == "SidecarBypassed":  # extrapolated, as above
        assert expected - 1e-3 <= value <= 1 - (1 - expected) / 1.2
    else:
        assert value == pytest.approx(expected, rel=1e-3)
