"""What calls cost, before real LiteLLMs: the sidecar's figures, LiteLLM's, and what is true."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from bench.costs import SETTINGS, Figure, figures, table
from tests.support.calls import ask_now, body_for, post
from tests.support.clouds import Clouds
from tests.support.litellm import BLUE, RED, LiteLLM
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process

PAGE = Path(__file__).parents[2] / "docs" / "prices.md"
ONE_NANO = Decimal("1e-9")


@pytest.fixture(scope="module")
def pricing_front(
    litellm: LiteLLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SidecarProcess]:
    """Run a sidecar that asks LiteLLM for its prices."""
    settings = SETTINGS | {
        "SIDECAR_UPSTREAM": litellm.url,
        "SIDECAR_LABELS": "model,team_alias,provider,model_id",
    }
    with sidecar_process(tmp_path_factory.mktemp("pricing"), settings) as running:
        yield running


@pytest.fixture(scope="module")
def measured(litellm: LiteLLM, clouds: Clouds, pricing_front: SidecarProcess) -> list[Figure]:
    """Make all calls of the page's table."""
    return list(figures(litellm, clouds, pricing_front))


def test_the_page_says_what_is_measured(measured: list[Figure], litellm: LiteLLM) -> None:
    """Each row of the table in docs/prices.md comes out again, to the last digit."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| 1.")]
    own = [row for row in rows if row.startswith(f"| {litellm.version} ")]
    assert len(own) == 18
    assert table(measured).splitlines()[2:] == own


def test_the_sidecar_is_right_where_a_source_is(measured: list[Figure], litellm: LiteLLM) -> None:
    """Of both versions, for reads and both writes, JSON and SSE; 1.83.10's prices have no uplift
    for Vertex AI, and there an hour has no price rather than a wrong one."""
    for row in measured:
        if litellm.version == "1.83.10" and row.model == "claude-vertex":
            expected = None if row.kind == "1h write" else row.true / Decimal("1.1")
        else:
            expected = row.true
        if expected is None or row.sidecar is None:
            assert row.sidecar is expected, row
        else:
            assert abs(row.sidecar - expected) <= ONE_NANO, row


def test_one_line_mends_vertex(litellm: LiteLLM, clouds: Clouds, tmp_path: Path) -> None:
    """With the uplift in the price file, all of it is true with both versions."""
    prices = tmp_path / "prices.yaml"
    prices.write_text("claude-sonnet-4-5: {regional: 1.1}\n")
    settings = SETTINGS | {"SIDECAR_UPSTREAM": litellm.url, "SIDECAR_PRICE_FILE": str(prices)}
    with sidecar_process(tmp_path, settings) as front:
        for row in figures(litellm, clouds, front, ["claude-vertex"]):
            assert row.sidecar is not None
            assert abs(row.sidecar - row.true) <= ONE_NANO, row


def test_the_queries_of_the_page(litellm: LiteLLM, tmp_path: Path) -> None:
    """Asked of a real Prometheus: no price has grown old; and one team, which writes for five
    minutes, shows no drift, while the other writes for an hour, which 1.83.10 does not bill."""
    require(find_prometheus(), "Prometheus")
    stale, query = re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    topics = itertools.count()

    def play(url: str, ttls: dict[str, str]) -> None:
        for key, ttl in ttls.items():
            body = body_for("claude-direct", f"drift {litellm.version} {next(topics)}", ttl=ttl)
            for _ in range(2):
                assert ask_now(url, post(body, key)).status == 200

    # LiteLLM's series have no zero to begin with: they have to be there before the first scrape.
    play(litellm.url, {RED.key: "5m", BLUE.key: "5m"})
    for team in ("Team Red", "Team Blue"):
        litellm.wait_for_metric(f'team_alias="{team}"')
    settings = SETTINGS | {"SIDECAR_UPSTREAM": litellm.url}
    with sidecar_process(tmp_path, settings) as front:
        targets = {
            "sidecar": front.admin_url.removeprefix("http://"),
            "litellm": f"{litellm.url.removeprefix('http://')}/metrics/",
        }
        # `increase` extrapolates by about a scrape: of fifty, that is little. In less than this
        # LiteLLM does not always answer one.
        with Prometheus(targets, tmp_path, scrape_interval="250ms") as prometheus:
            prometheus.wait_for_scrapes(3)
            for _ in range(3):
                play(front.url, {RED.key: "5m", BLUE.key: "1h"})
            prometheus.wait_for_scrapes(50)
            drift = {labels["team_alias"]: value for labels, value in prometheus.query(query)}
            assert prometheus.query(stale) == []
            ages = prometheus.query(stale.replace("> 3 * 21600", ">= 0"))
    assert {labels["source"] for labels, _ in ages} == {"model_info", "cost_map"}
    assert drift["Team Red"] == pytest.approx(0, abs=0.05)
    if litellm.version == "1.83.10":
        assert drift["Team Blue"] < -0.5
    else:
        assert drift["Team Blue"] == pytest.approx(0, abs=0.05)
