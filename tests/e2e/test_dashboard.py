"""The dashboard, asked of a real Prometheus over a real sidecar: no query is empty, and its numbers
are those of the provider's books.

One sidecar is played on and restarted as another, on the same ports and before a newer LiteLLM; the
same traffic, faults among it, comes in both lives. What is asked ends at a sample, so that nothing
is extrapolated: the increase over the restart is exact. The query that needs LiteLLM's spend is
asked where there is a LiteLLM, in `test_cookbook.py`.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidecar.account.identity import NO_TEAM
from sidecar.demo.provider import BookEntry, Books, PromptCache
from tests.support.calls import SONNET_USD, ask_now, body_for, post
from tests.support.clouds import create_clouds, serving
from tests.support.dashboard import (
    Query,
    interpolated,
    load,
    queries,
    variable_queries,
)
from tests.support.litellm import BLUE, DIRECT_MODEL, LONER, RED, STAR, Identity
from tests.support.process import free_port
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process

ROOT = Path(__file__).parents[2]
BOARD = load()
QUERIES = [query for query in queries(BOARD) if "litellm_spend_metric" not in query.expr]
PRICED, UNPRICED = DIRECT_MODEL, "model.of (nobody)"
LIVES = ("1.83.10", "1.100.5")
"""What LiteLLM says that it is, in the first life and in the second."""

_INPUT = SONNET_USD["input_tokens"]
_MILLION = 1_000_000


class Named:
    """An upstream that says a version of LiteLLM with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.version = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-litellm-version", self.version.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_named)


@dataclass
class Played:
    """What was played, and when."""

    prometheus: Prometheus
    books: Books
    began: float
    turned: float = 0.0
    """Between the lives."""
    ended: float = 0.0
    page: dict[str, Any] = field(default_factory=dict)
    """The figures of the live page, of the second life."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Those of each model and team."""
    entries: list[tuple[str, str, bool, BookEntry]] = field(default_factory=list)
    """Of each answer: team, model, whether it asked for caching, and what the books say."""
    earlier: int = 0
    """How many of them are of the first life."""
    requests: int = 0
    broken: int = 0

    def values(self, **chosen: str | Sequence[str]) -> dict[str, str | Sequence[str]]:
        """What Grafana would put for variables, over all that was played."""
        ms = round(1000 * (self.ended - self.began))
        everything = dict.fromkeys(
            ("namespace", "model", "team_alias", "provider", "instance"), ".*"
        )
        return {
            # Four scrapes, as Grafana has it.
            "__rate_interval": "4s",
            "__range": f"{ms}ms",
            "__interval": "1s",
            "__interval_ms": "1000",
            "__from": f"{1000 * self.began:.0f}",
            **everything,
            **chosen,
        }

    def ask(
        self, query: Query, values: dict[str, str | Sequence[str]]
    ) -> list[tuple[dict[str, str], list[float]]]:
        """Ask as Grafana does: at the end, or at every step."""
        expr = interpolated(query.expr, values)
        if query.instant:
            rows = self.prometheus.query(expr, at=self.ended)
            return [(labels, [value]) for labels, value in rows]
        series = self.prometheus.query_range(expr, begin=self.began, end=self.ended, step_s=1)
        return [(labels, [value for _, value in points]) for labels, points in series]

    def number(
        self, title: str, *, since: float | None = None, team: str | Sequence[str] = ".*"
    ) -> float:
        """The one number of a panel, over all that was played, or since some time."""
        (query,) = (query for query in QUERIES if query.where == title)
        values = self.values(team_alias=team)
        if since is not None:
            values["__range"] = f"{round(1000 * (self.ended - since))}ms"
        ((_, (value,)),) = self.ask(query, values)
        return value

    def true(
        self, *, team: str | None = None, model: str | None = None, since: int = 0
    ) -> dict[str, float | None]:
        """What the panels should say, by the books, of all or of one team, model and life."""
        entries = [
            (whose, asked, entry)
            for its, whose, asked, entry in self.entries[since:]
            if team in (None, its) and model in (None, whose)
        ]
        total: Counter[str] = Counter()
        paid: Counter[str] = Counter()
        for whose, asked, entry in entries:
            read, written = entry.cache_read_input_tokens, entry.cache_creation_input_tokens
            total["prompt"] += entry.input_tokens + read + written
            total["read"] += read
            total["hits"] += read > 0
            total["asked"] += read > 0 or written > 0 or asked
            if whose == PRICED:
                for name in SONNET_USD:
                    paid[name] += getattr(entry, name)
        saved = paid["cache_read_input_tokens"] * (_INPUT - SONNET_USD["cache_read_input_tokens"])
        premium = sum(
            paid[name] * (SONNET_USD[name] - _INPUT)
            for name in ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
        )
        return {
            "Hit ratio by tokens": total["read"] / total["prompt"],
            "Hit ratio by requests": total["hits"] / total["asked"] if total["asked"] else None,
            "Spent": sum(SONNET_USD[name] * paid[name] for name in SONNET_USD) / _MILLION,
            "Saved by reads": saved / _MILLION,
            "Net": (saved - premium) / _MILLION,
            "Lost to writes never read": 0.0,  # nothing ran out while it was played
            "Answers": len(entries),
            "Prompt tokens": total["prompt"],
        }


def live(week: Played, sidecar: SidecarProcess) -> None:
    """Play one life of a sidecar: reads, writes, misses, and what goes wrong."""

    def call(
        team: Identity,
        model: str,
        topic: str,
        *,
        question: str = "What is new?",
        ttl: str | None = "5m",
        stream: bool = False,
        leave: bool = False,
    ) -> None:
        body = body_for(model, topic, question=question, ttl=ttl, stream=stream)
        raw = post(body, team.key)
        before = len(week.books.entries)
        week.requests += 1
        if leave:
            with socket.create_connection(("127.0.0.1", sidecar.port), timeout=10) as client:
                client.sendall(raw)
                seen = b""
                while b"content_block_delta" not in seen:
                    seen += client.recv(65536)
            deadline = time.monotonic() + 10
            while week.books.entries[before].closed_at is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        else:
            week.broken += not ask_now(sidecar.url, raw).complete
        for entry in week.books.entries[before:]:
            week.entries.append((team.team_alias or NO_TEAM, model, ttl is not None, entry))

    for _ in range(3):
        call(RED, PRICED, "dashboard", stream=True)
        call(BLUE, PRICED, "dashboard, for an hour", ttl="1h")
    call(LONER, PRICED, "nothing asked", ttl=None)
    call(LONER, PRICED, "another prompt")
    call(LONER, PRICED, "and another")
    # There is room for three teams.
    call(STAR, PRICED, "no room")
    for _ in range(12):
        call(RED, UNPRICED, "no price", ttl=None)
    call(RED, PRICED, "cut", question="[[cut-mid-stream]]", stream=True)
    slow = "[[event-gap-ms 20]] [[many-events 200]]"
    call(BLUE, PRICED, "left", question=slow, stream=True, leave=True)
    assert ask_now(sidecar.url, b"GET /v1/models HTTP/1.1\r\n\r\n").status == 400


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Play two lives before one Prometheus, with the alerts that ship."""
    require(find_prometheus(), "Prometheus")
    directory = tmp_path_factory.mktemp("dashboard")
    teams = {key.key: key.team_alias or NO_TEAM for key in (RED, BLUE, LONER, STAR)}
    hashed = {sha256(key.encode()).hexdigest(): team for key, team in teams.items()}
    (directory / "teams.json").write_text(json.dumps(hashed))
    books = Books()
    app = Named(create_clouds(books=books, cache=PromptCache()))
    ports = free_port(), free_port()
    with serving(app) as upstream:
        settings = {
            "SIDECAR_UPSTREAM": upstream,
            "SIDECAR_TEAM_FILE": str(directory / "teams.json"),
            # Three, and the one of answers without.
            "SIDECAR_MAX_LABEL_VALUES": "4",
            # The second is not there: it is asked for, and fails.
            "SIDECAR_PRICE_SOURCES": "file,cost_map,package",
        }
        target = {"litellm-sidecar": f"127.0.0.1:{ports[1]}"}
        # As discovery in Kubernetes has it.
        namespace = {"target_label": "namespace", "replacement": "llm"}
        with Prometheus(
            target,
            directory,
            rule_files=[_hasty_alerts(directory)],
            scrape_options={"relabel_configs": [namespace]},
        ) as prometheus:
            # A process knows its own start to a second.
            week = Played(prometheus, books, time.time() - 3)
            for version in LIVES:
                app.version = version
                with sidecar_process(directory, settings, ports=ports) as sidecar:
                    prometheus.wait_for_scrapes(1)
                    live(week, sidecar)
                    prometheus.wait_for_scrapes(3)
                    if version == LIVES[-1]:
                        prometheus.wait_for('ALERTS{alertname="SidecarModelUnpriced"}')
                        prometheus.wait_for_scrapes(1)
                        expr = "timestamp(litellm_sidecar_build_info)"
                        ((_, week.ended),) = prometheus.query(expr)
                        with httpx.Client(base_url=sidecar.admin_url, trust_env=False) as page:
                            answer = page.get("/api/v1/summary?window=start")
                            week.page = answer.raise_for_status().json()["figures"]
                            answer = page.get("/api/v1/models?window=start")
                            week.rows = answer.raise_for_status().json()["rows"]
                week.turned = week.turned or time.time()
                week.earlier = week.earlier or len(week.entries)
            yield week


def _hasty_alerts(directory: Path) -> Path:
    """The alerts that ship, which here do not wait before they fire."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    for group in rules["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            rule.pop("for", None)
    path = directory / "alerts.yml"
    path.write_text(yaml.safe_dump(rules))
    return path


def test_no_query_is_empty(played: Played) -> None:
    """Every panel and annotation has something to show, with all chosen and with each by name."""
    several = {
        name: played.prometheus.label_values(metric, label)
        for name, (metric, label) in variable_queries(BOARD).items()
    }
    assert several["team_alias"] == ["None", "Team Blue", "Team Red", "other"]
    assert set(several["model"]) >= {PRICED, UNPRICED}
    assert all(several.values())

    for choice in ({}, several):
        values = played.values(**choice)
        empty = []
        for query in QUERIES:
            rows = played.ask(query, values)
            numbers = [value for _, points in rows for value in points]
            if not numbers or any(map(math.isnan, numbers)):
                empty.append((query.where, query.expr))
        assert empty == []


def test_another_namespace_is_left_out(played: Played) -> None:
    """What stands elsewhere is in no panel; alerts alone are shown of all."""
    values = played.values(namespace=["elsewhere"])

    assert {query.where for query in QUERIES if played.ask(query, values)} == {"Alerts"}


def test_numbers_at_a_glance_are_those_of_the_books(played: Played) -> None:
    """Over a restart, for all and for one team."""
    for team in (None, RED.team_alias):
        chosen = ".*" if team is None else [team]
        true = played.true(team=team)

        shown = {title: played.number(title, team=chosen) for title in true}

        assert shown == pytest.approx(true, rel=1e-9, abs=1e-12)


def test_page_and_panels_agree(played: Played) -> None:
    """The live page says of its sidecar what the panels say of the time since it began."""
    page = played.page
    money = page["money"]

    shown = {
        title: played.number(title, since=played.turned)
        for title in ("Answers", "Hit ratio by tokens", "Hit ratio by requests", "Spent", "Net")
    }

    assert shown == pytest.approx(
        {
            "Answers": page["answers"],
            "Hit ratio by tokens": page["hit_ratio"]["by_tokens"],
            "Hit ratio by requests": page["hit_ratio"]["by_requests"],
            "Spent": money["spent"],
            "Net": money["saved"] - money["write_premium"],
        }
    )
    assert shown["Answers"] > 0


def test_page_panel_rule_and_alert_say_what_the_books_say(played: Played) -> None:
    """Of each model and team: one number, read in five places."""
    ms = round(1000 * (played.ended - played.turned))
    window = f"{ms}ms"
    expressions = {
        rule.get("record") or rule["alert"]: re.sub(r"\[\d+\w\]", f"[{window}]", rule["expr"])
        for name in ("rules.yml", "alerts.yml")
        for group in yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())["groups"]
        for rule in group["rules"]
    }

    def ask(expr: str, *labels: str) -> dict[tuple[str, ...], float]:
        rows = played.prometheus.query(expr, at=played.ended)
        return {tuple(row[label] for label in labels): value for row, value in rows}

    pair = ("model", "team_alias")
    table = [query.expr for query in QUERIES if query.where == "By model and team"]
    spent, _, by_tokens, by_requests, answers, *_ = (
        ask(interpolated(expr, played.values(__range=window)), *pair) for expr in table
    )
    stem = "model_team_alias:litellm_sidecar_"
    tokens_rule = f"{stem}cache_read_per_input_token:ratio_rate30m"
    assert tokens_rule in expressions["PromptCacheHitRatioFell"]
    paces = ask(expressions[f"{stem}cost_usd:rate5m"], *pair)
    prometheus = {
        "by_tokens": (by_tokens, ask(expressions[tokens_rule], *pair)),
        "by_requests": (
            by_requests,
            ask(expressions[f"{stem}cache_hits_per_response:ratio_rate5m"], *pair),
        ),
        "spent": (spent, {which: pace * ms / 1000 for which, pace in paces.items()}),
        "answers": (answers,),
    }
    page = {
        (row["model"], row["team_alias"]): {
            **row["figures"]["hit_ratio"],
            "spent": row["figures"]["money"]["spent"],
            "answers": row["figures"]["answers"],
        }
        for row in played.rows
    }

    # The one for whom there was no room is `other`.
    teams = {STAR.team_alias: "other"}
    pairs = {(its[1], its[0]) for its in played.entries[played.earlier :]}
    assert len(pairs) == len(page) > 3
    for model, team in pairs:
        which = model, str(teams.get(team, team))
        true = played.true(team=team, model=model, since=played.earlier)
        expected = {
            "by_tokens": true["Hit ratio by tokens"],
            "by_requests": true["Hit ratio by requests"],
            "spent": true["Spent"],
            "answers": true["Answers"],
        }
        assert page[which] == pytest.approx(expected)
        for name, places in prometheus.items():
            for rows in places:
                assert rows.get(which) == pytest.approx(expected[name], abs=1e-12), (name, which)

    # What the alert says of answers without a price, with no floor.
    expr = expressions["SidecarModelUnpriced"].replace(">= 10", "> 0")
    unpriced = sum(model == UNPRICED for _, model, _, _ in played.entries[played.earlier :])
    ((row, value),) = played.prometheus.query(expr, at=played.ended)
    assert row["model"] == UNPRICED
    assert value == pytest.approx(unpriced)


def test_panels_and_alert_agree_on_what_has_no_price(played: Played) -> None:
    """The bar is the number of such answers in the books, and the alert is about that model."""
    (query,) = (query for query in QUERIES if query.where == "Unpriced answers")
    true = sum(model == UNPRICED for _, model, _, _ in played.entries)

    ((labels, (shown,)),) = played.ask(query, played.values())

    assert labels["model"] == UNPRICED
    assert shown == pytest.approx(true)
    (notes,) = (query for query in QUERIES if query.where == "Alerts")
    firing = {labels["alertname"]: labels for labels, _ in played.ask(notes, played.values())}
    assert firing["SidecarModelUnpriced"]["model"] == UNPRICED


def test_faults_are_shown_as_they_happened(played: Played) -> None:
    """What LiteLLM broke off, of all requests, is what clients saw."""
    # Besides the calls, one was refused in each life, and is no request that was relayed.
    shown = played.number("Failed upstream")

    assert played.broken == len(LIVES)
    assert shown == pytest.approx(played.broken / played.requests, rel=0.1)
    # Teams without room are in the totals.
    assert played.number("Counted under other") == pytest.approx(len(LIVES))


def test_annotations_mark_the_restart_and_the_versions(played: Played) -> None:
    """Two starts, within the range and at the time of the start; each LiteLLM once; one sidecar."""
    marks = {
        query.where: played.ask(query, played.values())
        for query in QUERIES
        if query.where in ("Sidecar started", "LiteLLM version", "Sidecar version")
    }

    starts = {value / 1000 for _, points in marks["Sidecar started"] for value in points}
    assert len(starts) == len(LIVES)
    assert all(played.began < start < played.ended for start in starts)
    for title, number in (("LiteLLM version", len(LIVES)), ("Sidecar version", 1)):
        assert [len(points) for _, points in marks[title]] == [1] * number
    versions = {labels["version"] for labels, _ in marks["LiteLLM version"]}
    assert versions == set(LIVES)
