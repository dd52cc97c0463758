"""The newer LiteLLM's own count of the provider's prompt cache, beside the sidecar's of the same
traffic under the same names, as a real Prometheus has both.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.calls import ask_now, body_for, post, request, samples
from tests.support.litellm import (
    BEDROCK_MODEL,
    BLUE,
    DIRECT_MODEL,
    LONER,
    RED,
    VERTEX_MODEL,
    LiteLLM,
)
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text()
READS = (
    "litellm_input_cached_tokens_metric_total",
    "litellm_provider_cache_read_input_tokens_metric_total",
)
WRITES = (
    "litellm_input_cache_creation_tokens_metric_total",
    "litellm_provider_cache_creation_input_tokens_metric_total",
)
# What the client asks for, and what LiteLLM asks the provider for.
MODELS = {
    "claude-direct": DIRECT_MODEL,
    "claude-vertex": VERTEX_MODEL,
    "claude-bedrock": BEDROCK_MODEL,
}
TEAMS = {"Team Red": RED, "Team Blue": BLUE, "None": LONER}

Counts = Counter[tuple[str, ...]]

newer = pytest.mark.parametrize("litellm", ["1.100.5"], indirect=True, ids=["litellm-1.100.5"])


@dataclass(frozen=True, slots=True)
class Scraped:
    """A sidecar that has the newer names, and a Prometheus that scrapes it and LiteLLM."""

    sidecar: SidecarProcess
    prometheus: Prometheus

    def counts(self, job: str, *labels: str) -> Counts:
        """What the four names count by these labels."""
        names = "|".join((*READS, *WRITES))
        by = ", ".join(("__name__", *labels))
        # What was scraped last: LiteLLM may not answer each scrape in time.
        series = f'last_over_time({{__name__=~"{names}", job="{job}"}}[1m])'
        found = self.prometheus.query(f"sum by ({by}) ({series})")
        counts: Counts = Counter()
        for row, value in found:
            counts[row["__name__"], *(row.get(label, "") for label in labels)] += round(value)
        return counts


@pytest.fixture
def scraped(litellm: LiteLLM, tmp_path: Path) -> Iterator[Scraped]:
    require(find_prometheus(), "Prometheus")
    settings = {"SIDECAR_UPSTREAM": litellm.url, "SIDECAR_COMPAT": "v1.83,v1.100"}
    with sidecar_process(tmp_path, settings) as sidecar:
        targets = {
            "litellm-sidecar": sidecar.admin_url.removeprefix("http://"),
            "litellm": f"{litellm.url.removeprefix('http://')}/metrics/",
        }
        (tmp_path / "prometheus").mkdir()
        with Prometheus(targets, tmp_path / "prometheus") as prometheus:
            prometheus.wait_for_scrapes(1)
            yield Scraped(sidecar, prometheus)


@newer
def test_values_are_those_of_litellm_itself(litellm: LiteLLM, scraped: Scraped) -> None:
    """By requested model and team, and by team alone where LiteLLM has no requested model, all
    four grow by what LiteLLM's own grow by; LiteLLM's `model` is the deployment's."""
    by_request = ("requested_model", "team_alias")
    by_model = ("model", "team_alias")
    before = scraped.counts("litellm", *by_request), scraped.counts("litellm", *by_model)
    calls = itertools.product(MODELS, TEAMS, (False, True))
    for number, (model, team, stream) in enumerate(calls):
        # No two prompts have the same size: a count in the wrong place is then a wrong count.
        topic = f"newer names {model} {team} {stream}"
        ttl = ("5m", "1h", None)[number % 3]
        body = body_for(model, topic, tokens=1200 + 37 * number, stream=stream, ttl=ttl)
        for _ in range(2):
            answer = ask_now(scraped.sidecar.url, post(body, TEAMS[team].key))
            assert (answer.status, answer.complete) == (200, True), answer.body
    # A series is shown at zero once before its value. LiteLLM counts after it has answered.
    scraped.prometheus.wait_for_scrapes(3)

    ours = scraped.counts("litellm-sidecar", *by_request)
    theirs = scraped.counts("litellm", *by_request)
    theirs.subtract(before[0])
    for name in (READS[0], WRITES[0]):
        mine = {key: n for key, n in ours.items() if key[0] == name and n}
        assert len(mine) >= 6
        assert mine == {key: n for key, n in theirs.items() if key[0] == name and n}

    ours = scraped.counts("litellm-sidecar", *by_model)
    theirs = scraped.counts("litellm", *by_model)
    theirs.subtract(before[1])
    for name in (*READS, *WRITES):
        mine = {key: n for key, n in ours.items() if key[0] == name and n}
        renamed: Counts = Counter()
        for (_, model, team), n in mine.items():
            renamed[name, MODELS[model], team] += n
        assert renamed == {key: n for key, n in theirs.items() if key[0] == name and n}


@newer
def test_conflict_is_told(litellm: LiteLLM, scraped: Scraped) -> None:
    """LiteLLM has these names itself: a metric says so, and the log, once."""

    def gauge(name: str) -> dict[str, float]:
        text = ask_now(scraped.sidecar.admin_url, request("GET", "/metrics")).body.decode()
        found = [(labels, value) for key, labels, value in samples(text) if key == name]
        return {next(iter(labels.values())): value for labels, value in found}

    assert gauge("litellm_sidecar_compat_conflict") == {"v1.100": 0}
    for _ in range(2):
        ask_now(scraped.sidecar.url, post(body_for("claude-direct", "conflict"), RED.key))
    assert gauge("litellm_sidecar_upstream_info") == {litellm.version: 1}
    assert gauge("litellm_sidecar_compat_conflict") == {"v1.100": 1}
    lines = map(json.loads, scraped.sidecar.process.log.read_text().splitlines())
    told = [line for line in lines if line["event"] == "compat_conflict"]
    assert [(line["level"], line["upstream"]) for line in told] == [("warning", litellm.version)]


@newer
def test_page_keeps_one_of_the_two(litellm: LiteLLM, scraped: Scraped, tmp_path: Path) -> None:
    """The page's relabelling drops these series of LiteLLM's and no others; its query takes the
    sidecar's where both are, and LiteLLM's where the sidecar has none."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    queries = re.findall(r" *```promql\n(.*?)```", PAGE, flags=re.DOTALL)
    (union,) = [query for query in queries if 'job="litellm"' in query]
    for query in queries:
        scraped.prometheus.query(query)  # each is one
    body = body_for("claude-direct", "the page", tokens=1234)
    for _ in range(2):
        ask_now(scraped.sidecar.url, post(body, BLUE.key))
    dropping = tmp_path / "dropping"
    dropping.mkdir()
    target = {"litellm": f"{litellm.url.removeprefix('http://')}/metrics/"}
    with Prometheus(target, dropping, scrape_options=yaml.safe_load(text)) as prometheus:
        prometheus.wait_for_scrapes(2)
        names = {row["__name__"] for row, _ in prometheus.query('{__name__=~"litellm_.+"}')}
    assert "litellm_input_tokens_metric_total" in names
    assert "litellm_output_tokens_metric_total" in names
    assert [name for name in names if "cache" in name] == []

    # Both have series now; the query has one row for each model and team.
    scraped.prometheus.wait_for_scrapes(2)
    rows = scraped.prometheus.query(union.replace("rate(", "last_over_time("))
    mine = scraped.counts("litellm-sidecar", "requested_model", "team_alias")
    # Some of LiteLLM's series have no requested model.
    found = {
        (row.get("requested_model", ""), row.get("team_alias", "")): round(value)
        for row, value in rows
    }
    assert len(found) == len(rows)
    assert found["claude-direct", "Team Blue"] == mine[READS[0], "claude-direct", "Team Blue"]
    theirs = scraped.counts("litellm", "requested_model", "team_alias")
    for name, model, team in set(theirs) - set(mine):
        assert name != READS[0] or found[model, team] == theirs[name, model, team]


def test_version_is_known_from_answers(litellm: LiteLLM, tmp_path: Path) -> None:
    """Either version names itself; 1.83 has none of the newer names."""
    settings = {"SIDECAR_UPSTREAM": litellm.url, "SIDECAR_COMPAT": "v1.100"}
    with sidecar_process(tmp_path, settings) as sidecar:
        ask_now(sidecar.url, post(body_for("claude-direct", "older"), RED.key))
        text = ask_now(sidecar.admin_url, request("GET", "/metrics")).body.decode()
    found = {(name, *labels.values()): value for name, labels, value in samples(text)}
    assert found["litellm_sidecar_upstream_info", litellm.version] == 1
    conflict = found["litellm_sidecar_compat_conflict", "v1.100"]
    assert conflict == (litellm.version != "1.83.10")
