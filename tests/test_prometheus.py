"""What ships for Prometheus: promtool takes it, relabelling keeps what it should, each rule does
what it says, and each alert tells the one who is called what to do.

`tests/e2e/test_cookbook.py` asks the same of a real Prometheus, over a sidecar and a LiteLLM.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.config import Settings
from tests.support.process import checked
from tests.support.requirements import require

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "deploy" / "prometheus"
KUBERNETES = ROOT / "deploy" / "kubernetes"
CONFIGS = ("prometheus.yml", "prometheus-pods.yml")
RULES = ("rules.yml", "alerts.yml")

Json = dict[str, Any]


def load(name: str) -> Json:
    """Read one of the files."""
    read: Json = yaml.safe_load((DIRECTORY / name).read_text())
    return read


def promtool(*arguments: str, directory: Path = DIRECTORY) -> str:
    """Run promtool; its words are the assertion's message, or what is returned."""
    program = require(shutil.which("promtool"), "promtool")
    return checked(program, *arguments, directory=directory)


ALERTS: list[Json] = [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]
NAMES = [alert["alert"] for alert in ALERTS]


def by_name(alert: Json) -> str:
    """Name an alert in a test's id."""
    return str(alert["alert"])


# Files


def test_every_file_is_one_that_is_tested_here() -> None:
    """Nothing is added to the folder that nobody looks at."""
    found = {path.name for path in DIRECTORY.iterdir()}

    assert found == {*CONFIGS, *RULES, "rules_test.yml", "alerts_test.yml"}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_valid(name: str) -> None:
    """promtool finds nothing to say about them."""
    promtool("check", "rules", "--lint=all", "--lint-fatal", name)


@pytest.mark.parametrize("name", RULES)
def test_rules_do_what_they_say(name: str) -> None:
    """The unit tests beside them pass."""
    promtool("test", "rules", name.replace(".yml", "_test.yml"))


# Scraping


@pytest.fixture
def by_file(tmp_path: Path) -> Path:
    """Put a copy of the configuration for pods beside its rules whose pods come from a file.

    Not every build of promtool has discovery in Kubernetes; what comes out of it are these labels.
    """
    config = load("prometheus-pods.yml")
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["file_sd_configs"] = [{"files": ["pods.json"]}]
    ports = {
        "10.0.0.1:4000": ("litellm-1", "litellm", "Running"),
        "10.0.0.1:4001": ("litellm-1", "sidecar", "Running"),
        "10.0.0.1:4002": ("litellm-1", "sidecar-metrics", "Running"),
        "10.0.0.2:4002": ("litellm-0", "sidecar-metrics", "Succeeded"),
        "10.0.0.3:8080": ("other", "http", "Running"),
    }
    pods = [
        {
            "targets": [address],
            "labels": {
                "__meta_kubernetes_namespace": "llm",
                "__meta_kubernetes_pod_name": pod,
                "__meta_kubernetes_pod_container_port_name": port,
                "__meta_kubernetes_pod_phase": phase,
            },
        }
        for address, (pod, port, phase) in ports.items()
    ]
    (tmp_path / "pods.json").write_text(json.dumps(pods))
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    for name in RULES:
        shutil.copy(DIRECTORY / name, tmp_path)
    return tmp_path


def test_configurations_are_valid(by_file: Path) -> None:
    """promtool accepts them and the rules that they name."""
    promtool("check", "config", "prometheus.yml")
    promtool("check", "config", "config.yml", directory=by_file)


@pytest.mark.parametrize(
    ("job", "port", "path"), [("litellm-sidecar", 4002, "/metrics"), ("litellm", 4000, "/metrics/")]
)
def test_pods_are_scraped_at_the_port_of_the_job(
    by_file: Path, job: str, port: int, path: str
) -> None:
    """Of the ports of all pods one is kept, of pods that have not ended."""
    told = promtool(
        "check", "service-discovery", "--timeout=2s", "config.yml", job, directory=by_file
    )

    kept = [target["labels"] for target in json.loads(told) if target["labels"]]
    assert [(its["__address__"], its["job"], its["pod"], its["namespace"]) for its in kept] == [
        (f"10.0.0.1:{port}", job, "litellm-1", "llm")
    ]
    assert kept[0]["__metrics_path__"] == path


def test_ports_of_the_pods_are_those_of_the_manifests() -> None:
    """Discovery looks for names that deploy/kubernetes gives."""
    given = {
        port["name"]: port["containerPort"]
        for path in KUBERNETES.rglob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
        for port in found_ports(document)
    }
    looked_for = [
        rule["regex"]
        for job in load("prometheus-pods.yml")["scrape_configs"]
        for rule in job["relabel_configs"]
        if rule.get("action") == "keep"
    ]

    assert looked_for == ["sidecar-metrics", "litellm"]
    assert (given["sidecar-metrics"], given["litellm"]) == (4002, 4000)


def found_ports(document: Any) -> list[Json]:
    """All ports of containers, wherever they stand."""
    if isinstance(document, dict):
        own = [document] if "containerPort" in document else []
        return own + [port for value in document.values() for port in found_ports(value)]
    if isinstance(document, list):
        return [port for value in document for port in found_ports(value)]
    return []


@pytest.mark.parametrize("name", CONFIGS)
def test_scrapes_come_often_enough_for_the_last_one(name: str) -> None:
    """The sidecar's wait at its end is longer than the interval."""
    interval = float(load(name)["global"]["scrape_interval"].removesuffix("s"))

    assert interval < Settings.model_fields["final_scrape_wait_s"].default


@pytest.mark.parametrize("name", CONFIGS)
def test_scrape_keeps_one_meaning_for_each_name(name: str) -> None:
    """LiteLLM's own series of the three names go, and nothing else of it; the sidecar's stay."""
    jobs = {job["job_name"]: job for job in load(name)["scrape_configs"]}

    def dropped(job: str, series: str) -> bool:
        rules = jobs[job]["metric_relabel_configs"]
        assert all(rule["action"] == "drop" for rule in rules)
        return any(re.fullmatch(rule["regex"], series) for rule in rules)

    for stem in ("cached_tokens", "cache_hits", "cache_misses"):
        assert dropped("litellm", f"litellm_{stem}_metric_total")
        assert not dropped("litellm-sidecar", f"litellm_{stem}_metric_total")
    assert not dropped("litellm", "litellm_spend_metric_total")
    assert not dropped("litellm", "litellm_provider_cache_read_input_tokens_metric_total")
    assert not dropped("litellm-sidecar", "litellm_sidecar_input_tokens_total")
    assert dropped("litellm-sidecar", "litellm_sidecar_input_tokens_created")


# Alerts


@pytest.mark.parametrize("alert", ALERTS, ids=by_name)
def test_alert_says_what_to_do(alert: Json) -> None:
    """A severity, what it is about, and a runbook of three checks that leads to its section."""
    assert alert["labels"] == {"severity": alert["labels"]["severity"]}
    assert alert["labels"]["severity"] in ("page", "ticket")
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert re.match(r"1\. .+ 2\. .+ 3\. .+ Then ", annotations["runbook"])
    assert annotations["runbook"].endswith(f"See docs/alerts.md#{alert['alert'].lower()}")


@pytest.mark.parametrize("alert", ALERTS, ids=by_name)
def test_templates_name_labels_that_there_are(alert: Json) -> None:
    """Each label in an alert's words is one by which its expression adds up, or of `up`."""
    text = " ".join(alert["annotations"].values())
    named = set(re.findall(r"\$labels\.(\w+)", text))
    kept = {
        label.strip()
        for labels in re.findall(r"\bby \(([^)]*)\)", alert["expr"])
        for label in labels.split(",")
    }
    kept |= {"instance", "job"} if "up{" in alert["expr"] else set()
    kept |= {"route"} if "on (route)" in alert["expr"] else set()

    assert named <= kept
    # SIDECAR_LABELS may leave these out: there are words for that.
    optional = {"model": "all models", "team_alias": "All teams"}
    if "reason" in kept:  # Not of the token series: the model is always there.
        optional = {}
    spelled = {
        f'or $labels.{label} "{optional[label]}"' if label in optional else f"$labels.{label}"
        for label in kept
    }
    assert set(re.findall(r"\{\{ (.+?) \}\}", text)) <= spelled | set(_VALUES)


# A count is whole, though `increase` makes fractions; `humanize` would write 0.07 as 70m.
_VALUES = {"$value | humanizePercentage": r"\d[\d.]*%", 'printf "%.0f" $value': r"\d+"}


def test_words_of_alerts_can_be_read(tmp_path: Path) -> None:
    """Prometheus fills in every template of every alert that fires in the tests, with all its
    labels and without those that may be left out."""
    tests = load("alerts_test.yml")
    tests["rule_files"] = [str(DIRECTORY / name) for name in RULES]
    for test in tests["tests"]:
        cases = test.pop("promql_expr_test")
        fires = [c for c in cases if c["exp_samples"] and f'"{test["name"]}"' in c["expr"]]
        # It expects nothing, so that it tells what there is.
        test["alert_rule_test"] = [
            {"alertname": test["name"], "eval_time": fires[0]["eval_time"], "exp_alerts": []}
        ]
    path = tmp_path / "words.yml"
    path.write_text(yaml.safe_dump(tests))
    program = require(shutil.which("promtool"), "promtool")
    told = subprocess.run(
        [program, "test", "rules", str(path)], capture_output=True, text=True, check=False
    )
    quoted = r'(\w+)="((?:[^"\\]|\\.)*)"'
    fired: dict[str, list[tuple[Json, Json]]] = {name: [] for name in NAMES}
    for labels, words in re.findall(
        r"Labels:(\{.*?\})\s+Annotations:(\{.*?\})\s*(?:\n|,$)", told.stdout + told.stderr, re.M
    ):
        its, said = (
            {name: json.loads(f'"{text}"') for name, text in re.findall(quoted, found)}
            for found in (labels, words)
        )
        fired[its["alertname"]].append((its, said))

    assert [name for name, found in fired.items() if not found] == []
    for alert in ALERTS:
        for its, said in fired[alert["alert"]]:
            for name, template in alert["annotations"].items():
                expected = "".join(
                    _filled(piece[3:-3], its) if piece.startswith("{{") else re.escape(piece)
                    for piece in re.split(r"(\{\{ .+? \}\})", template)
                )
                assert re.fullmatch(expected, said[name]), (said[name], template)


def _filled(template: str, labels: Json) -> str:
    """What stands for a template, as a regular expression."""
    if template in _VALUES:
        return _VALUES[template]
    match = re.fullmatch(r'(?:or )?\$labels\.(\w+)(?: "(.+)")?', template)
    assert match is not None
    text = labels.get(match[1]) or match[2]
    assert text, template
    return re.escape(text)


def test_every_alert_has_a_section_and_no_section_is_left_over() -> None:
    """In the order of the file, with severity, three checks and what to do."""
    page = (ROOT / "docs" / "alerts.md").read_text()
    sections = dict(re.findall(r"(?ms)^## (\w+)\n\n(.*?)(?=^## |\Z)", page))

    assert list(sections) == NAMES
    for alert in ALERTS:
        text = sections[alert["alert"]]
        assert text.startswith(f"`{alert['labels']['severity']}`. ")
        assert re.search(r"(?m)^1\. .*\n2\. .*\n3\. .*\n\n\*\*Do:\*\* ", text)


def test_way_round_the_sidecar_names_what_stands_in_it() -> None:
    """Who leads clients to LiteLLM's port at night is told of the policy that keeps them out."""
    page = (ROOT / "docs" / "alerts.md").read_text()
    said = {
        **{f"runbook of {by_name(one)}": one["annotations"]["runbook"] for one in ALERTS},
        **dict(re.findall(r"(?ms)^#+ (.+?)\n(.*?)(?=^## |\Z)", page)),
    }

    told = {
        name: "docs/rollout.md, Rollback" in text or "rollout.md#rollback" in text
        for name, text in said.items()
        if re.search(r"lead (?:clients|them) to LiteLLM", text)
    }
    assert told == dict.fromkeys(["runbook of SidecarDown", "Alerts", "SidecarDown"], True)


def test_queries_of_runbooks_can_be_pasted(tmp_path: Path) -> None:
    """Prometheus reads each query of the alerts' words, and of their page."""
    # An aggregation or a function, with all of its parentheses.
    nested = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
    query = rf"\b(?:sum|count|topk|avg|histogram_quantile)(?: by {nested})? ?{nested}"
    texts = [alert["annotations"]["runbook"] for alert in ALERTS]
    told = [re.findall(query, re.sub(r"\{\{.+?\}\}", "model", text)) for text in texts]
    page = (ROOT / "docs" / "alerts.md").read_text()
    spans = [span for span in re.findall(r"`([^`\n]+)`", page) if "(" in span]
    queries = [*(one for found in told for one in found), *spans]
    rules = [
        {"record": f"q:{number}", "expr": text.replace("…", "x")}
        for number, text in enumerate(queries)
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))

    promtool("check", "rules", str(path))

    assert (len(spans) > 8, sum(map(len, told)) > 5) == (True, True)
    # None is cut short.
    assert [one for one in queries if re.match(r"(sum|count) by \([^)]*\)$", one)] == []


def test_every_alert_is_tested_firing_and_silent() -> None:
    """Each has a test of its name in which it fires, and in which something else does not."""
    tests = {test["name"]: test for test in load("alerts_test.yml")["tests"]}

    assert list(tests) == [name for name in NAMES if name in tests]
    assert set(tests) == set(NAMES)
    for name, test in tests.items():
        cases = [case for case in test["promql_expr_test"] if f'"{name}"' in case["expr"]]
        fires = [sample for case in cases for sample in case["exp_samples"]]
        silent = [case for case in cases if not case["exp_samples"]]
        assert fires, name
        # Silence is a time at which nothing fires, or a label value that is in no answer.
        told_apart = re.findall(r"by \((\w+)", cases[0]["expr"])
        values = {
            value
            for series in test["input_series"]
            for label in told_apart
            for value in re.findall(rf'\b{label}="([^"]+)"', series["series"])
        }
        assert silent or len(values) > len(fires), name


# The pages

PAGES = [
    path for path in sorted((ROOT / "docs").rglob("*.md")) if "```promql\n" in path.read_text()
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_queries_of_pages_can_be_pasted(path: Path, tmp_path: Path) -> None:
    """Prometheus reads each of them; a comment or a blank line stands between two."""
    blocks = re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL)
    queries = [
        query for block in blocks for query in re.split(r"(?m)^(?:#.*)?\n", block) if query.strip()
    ]
    # Where a line is a query of its own.
    if path.stem == "rollout":
        queries = [line for query in queries for line in query.splitlines()]
    rules = [{"record": f"q:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]})
    )

    promtool("check", "rules", str(tmp_path / "queries.yml"))

    assert len(queries) >= len(blocks)


def test_cookbook_has_ten_questions() -> None:
    """In order, each with a query at least."""
    page = (ROOT / "docs" / "cookbook.md").read_text()
    sections = re.findall(r"(?ms)^## Question (\d+): (.*?)(?=^## |\Z)", page)

    assert [number for number, _ in sections] == [str(number) for number in range(1, 11)]
    for _, text in sections:
        assert "```promql\n" in text
        assert "**Read it:**" in text


def test_cookbook_says_which_labels_a_query_needs() -> None:
    """A query by a label that is not there by default stands behind its name."""
    page = (ROOT / "docs" / "cookbook.md").read_text()
    optional = {"model_id", "client", "api_key_alias", "hashed_api_key", "response_model"}

    for before, query in re.findall(r"(?s)\n([^\n]*\n(?:[^\n]+\n)?)\n```promql\n(.*?)```", page):
        used = {label for label in optional if re.search(rf"\b{label}\b", query)}
        assert used == {label for label in optional if f"`{label}`" in before}, query
