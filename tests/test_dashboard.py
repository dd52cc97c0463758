"""The dashboard is what its source writes, and Grafana and the sidecar know what it names."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from scripts import dashboard as source
from sidecar.account.metrics import Metrics
from sidecar.config import Settings
from tests.support.dashboard import (
    BUILT_IN,
    load,
    panels,
    queries,
    used,
    variable_queries,
    variables,
)

ROOT = Path(__file__).resolve().parents[1]
GRAFANA = ROOT / "deploy" / "grafana"
BOARD = load()
PANELS = list(panels(BOARD))

OTHERS: dict[str, set[str]] = {
    # Prometheus's own, and what its client tells of a process.
    "up": set(),
    "ALERTS": {"alertname", "alertstate"},
    "process_start_time_seconds": set(),
    "process_cpu_seconds_total": set(),
    "process_resident_memory_bytes": set(),
    "process_open_fds": set(),
    "process_max_fds": set(),
    # LiteLLM's.
    "litellm_spend_metric_total": {"team_alias"},
}
SCRAPED = {"job", "instance", "namespace"}
WORDS = {"by", "on", "and", "unless", "group_left"}


def exported() -> dict[str, set[str]]:
    """Labels of each series that the default settings export."""
    labels = Settings.model_fields["labels"].default
    store = Metrics(labels, compat=(), costs=True, misses=True, clock=lambda: 0.0).store
    found: dict[str, set[str]] = {}
    for family in store.families:
        own = set(family.labels)
        if family.kind == "histogram":
            found |= {f"{family.name}_bucket": own | {"le"}}
            found |= {f"{family.name}_{suffix}": own for suffix in ("sum", "count")}
        else:
            found[family.name + ("_total" if family.kind == "counter" else "")] = own
    return found


def test_it_is_what_its_source_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` shows what was changed by hand, without it the file is mended, and twice gives the
    same."""
    assert source.main(["--check"]) == 0
    page = tmp_path / "page.json"
    page.write_text(source.PAGE.read_text().replace('"title": "Net"', '"title": "Gross"'))
    monkeypatch.setattr(source, "PAGE", page)

    assert source.main(["--check"]) == 1
    assert '+      "title": "Net",' in capsys.readouterr().out.splitlines()
    assert source.main([]) == 0
    assert page.read_text() == source.rendered()


def test_the_sdk_reads_it_back() -> None:
    """Every field is of the type that Grafana's schema has for it."""
    read = Dashboard.from_json(BOARD)

    assert read.uid == source.UID
    assert len(read.panels or ()) == len(BOARD["panels"])
    assert BOARD["schemaVersion"] >= 39


def test_panels_have_their_place() -> None:
    """Numbers and titles are unique, nothing leaves the grid or lies on something else."""
    everything = BOARD["panels"]
    for key in ("id", "title"):
        values = [panel[key] for panel in everything]
        assert len(values) == len(set(values))
    seen: dict[tuple[int, int], str] = {}
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in seen, (panel["title"], seen[cell])
            seen[cell] = panel["title"]
    # Without a hole: what lies below would be drawn elsewhere than it says.
    assert {y for _, y in seen} == set(range(max(y for _, y in seen) + 1))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    """It has a description, a unit, words for no data, and targets that ask the chosen source."""
    defaults = panel["fieldConfig"]["defaults"]

    assert panel["description"].endswith((".", ":", "?"))
    assert defaults["unit"]
    assert defaults["noValue"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == chosen
    references = [target["refId"] for target in panel["targets"]]
    assert references == [chr(ord("A") + at) for at in range(len(references))]
    for target in panel["targets"]:
        assert target["datasource"] == chosen
        assert target["instant"] is not target["range"]


def test_every_variable_exists_and_is_used() -> None:
    """No query names what Grafana would leave as it is; every choice chooses something."""
    own = set(variables(BOARD))
    asked = set().union(*(used(query.expr) for query in queries(BOARD)))

    assert asked <= own | BUILT_IN
    assert own - asked == {"datasource"}
    for name, variable in variables(BOARD).items():
        if name != "datasource":
            assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (
                True,
                True,
                ".*",
            )


def test_every_metric_and_label_is_exported() -> None:
    """A query names nothing that the sidecar, Prometheus or LiteLLM does not have."""
    known = exported() | OTHERS
    for query in queries(BOARD):
        expr = re.sub(r"\[[^\]]*\]|offset \$\w+|\$\w+", "", query.expr)
        labels_anywhere: set[str] = set(SCRAPED)
        bare = re.sub(r'"[^"]*"', '""', expr)
        for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", bare):
            assert name in known, (query.where, name)
            asked = set(re.findall(r"(\w+)=", matchers))
            assert asked <= known[name] | SCRAPED, (query.where, name)
        bare = re.sub(r"\{[^}]*\}", "", bare)
        groups = re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", bare)
        bare = re.sub(r"\b(?:by|on|group_left) \([^)]*\)", "", bare)
        # What is left and no call of a function is a metric.
        metrics = set(re.findall(r"\b([a-zA-Z_]\w*)\b(?!\s*\()", bare)) - WORDS
        assert metrics, query.where
        assert metrics <= set(known), (query.where, metrics)
        for metric in metrics:
            labels_anywhere |= known[metric]
        for group in groups:
            wanted = {label.strip() for label in group.split(",")}
            assert wanted <= labels_anywhere, (query.where, wanted)
        legend = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert legend <= labels_anywhere, (query.where, legend)
    for metric, label in variable_queries(BOARD).values():
        assert label in known[metric] | SCRAPED


def test_every_alert_that_ships_is_an_annotation() -> None:
    """The names of alerts fit what the dashboard asks for."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]

    assert names
    assert [name for name in names if not re.fullmatch(source.ALERT_NAMES, name)] == []


# Panels that show what an alert is about, with no floor of traffic, and the panel's own limit.
SHOWN_AND_ALERTED = {
    "Not read": ("SidecarUsageNotRead", 0.05),
    "Failed upstream": ("SidecarUpstreamFailures", 0.05),
}


@pytest.mark.parametrize("title", SHOWN_AND_ALERTED)
def test_a_panel_turns_red_where_its_alert_fires(title: str) -> None:
    """The same parts of the same whole, and the same limit."""
    name, limit = SHOWN_AND_ALERTED[title]
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    (alert,) = (
        rule["expr"]
        for group in rules["groups"]
        for rule in group["rules"]
        if rule.get("alert") == name
    )
    (panel,) = (panel for panel in PANELS if panel["title"] == title)

    def increases(expr: str) -> list[str]:
        """Of what, in order: without the choices at the top, and the window."""
        bare = re.sub(r'(?:namespace|instance|model)=~"\$\w+",?|\s', "", expr)
        return [
            f"{name}{{{chosen}}}"
            for name, chosen in re.findall(r"increase\((\w+)(?:\{([^}]*)\})?\[", bare)
        ]

    shown, alerted = increases(panel["targets"][0]["expr"]), increases(alert)

    assert shown == alerted[:2]
    assert f"> {limit}" in alert
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] == limit


def test_every_page_that_is_named_exists() -> None:
    """What descriptions send the reader to is there: page and heading or question."""
    for panel in PANELS:
        for name, rest in re.findall(r"(docs/[\w-]+\.md),? ?([^.:]*)", panel["description"]):
            text = (ROOT / name).read_text()
            headings = re.findall(r"(?m)^#+ (.+)$", text)
            numbers = re.findall(r"(?<=question )\d+|(?<=questions )\d+|(?<=and )\d+$", rest)
            if numbers:
                for number in numbers:
                    assert any(head.startswith(f"Question {number}: ") for head in headings), (
                        name,
                        rest,
                    )
            elif rest:
                assert rest in headings, (panel["title"], name, rest)


def test_provisioning_names_what_is_there() -> None:
    """The source that Grafana is given is the one that the dashboard takes, and its folder is the
    one that the dashboard lies in."""
    (given,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load(
        (GRAFANA / f"provisioning/dashboards/{source.UID}.yaml").read_text()
    )["providers"]
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())

    assert (given["type"], given["uid"]) == ("prometheus", "prometheus")
    assert given["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert source.PAGE.parent == GRAFANA / "dashboards"
