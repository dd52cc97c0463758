"""All of docker-compose.yml but the engine: command lines, files, names, health checks, order.

Grafana alone has no program here; tests/test_deploy.py reads its files as it would.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from scripts.image import Store, image_name
from tests.support.compose import Stack
from tests.support.container import first_process, mounted_image
from tests.support.litellm import find_litellm
from tests.support.prometheus import find_prometheus
from tests.support.requirements import require

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.83.10"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run the services."""
    compose = require(shutil.which("docker-compose"), "docker-compose")
    litellm = require(find_litellm(VERSION), f"LiteLLM {VERSION}")
    prometheus = require(find_prometheus(), "Prometheus")
    require(shutil.which("buildah"), "buildah")
    require(os.geteuid() == 0, "root, without whom nothing is mounted,")
    store = Store()
    require(store.has(image_name()), "the image of this tree (make image)")
    config = subprocess.run(
        [compose, "--file", str(ROOT / "docker-compose.yml"), "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    programs = {"litellm": litellm, "prometheus": Path(prometheus)}
    with (
        mounted_image(store) as image,
        Stack(config, image, programs, tmp_path_factory.mktemp("compose")) as running,
    ):
        yield running


def test_services_turn_healthy_in_the_order_that_is_declared(stack: Stack) -> None:
    """Each by its own check, and still when all run; the traffic comes last."""
    assert stack.services["litellm"]["image"].endswith(f":v{VERSION}-stable")
    assert set(stack.started) == {"provider", "litellm", "prometheus", "sidecar", "traffic"}
    assert stack.started.index("provider") < stack.started.index("litellm")
    assert stack.started[-2:] == ["sidecar", "traffic"]
    for name in stack.started[:-1]:
        assert stack.healthy(name), stack.processes[name].log_tail()


def test_traffic_is_counted_and_scraped(stack: Stack) -> None:
    """Prometheus has what the sidecar counted, by the teams that LiteLLM named, and LiteLLM's."""
    read = 'litellm_sidecar_input_tokens_total{job="litellm-sidecar", cache="read"} > 0'
    teams = {row["team_alias"] for row in stack.wait_for(read)}

    assert teams <= {"search", "data science", "None"}
    assert "search" in teams
    assert stack.wait_for('litellm_input_tokens_metric_total{job="litellm"} > 0')
    assert stack.wait_for("count(up == 1) == count(up)")


def test_prometheus_has_the_rules_without_an_error(stack: Stack) -> None:
    """Each file that its configuration names is loaded, and what has been evaluated is sound."""
    groups = stack.ask_prometheus("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())

    assert {Path(group["file"]).name for group in groups} == set(config["rule_files"])
    assert [rule["name"] for rule in rules if rule.get("lastError")] == []
    assert "ok" in {rule["health"] for rule in rules}


def test_live_page_opens_from_the_host(stack: Stack) -> None:
    """Without a token, as its port is published on loopback alone."""
    assert "<html" in stack.fetch("http://127.0.0.1:4002/")
    assert stack.services["sidecar"]["environment"]["SIDECAR_ADMIN_OPEN"] == "true"


def test_traffic_ends_when_it_is_told_to(stack: Stack) -> None:
    """It had no call that did not end well, and ends with 0."""
    traffic = stack.processes["traffic"]

    os.kill(first_process(traffic), signal.SIGTERM)

    assert traffic.exit_code(timeout_s=15) == 0
    assert traffic.log_tail() == ""
