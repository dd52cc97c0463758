"""The file that maps keys to teams, edited under a running sidecar."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.calls import ask_now, body_for, post, request, samples
from tests.support.clouds import Clouds
from tests.support.running import SidecarProcess, sidecar_process

KEY = "sk-team-file-1"
HASH = hashlib.sha256(KEY.encode()).hexdigest()
MODEL = "claude-team-file"


def replace(path: Path, text: str) -> None:
    """Replace the file in one step, as editors and Kubernetes do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def rows(sidecar: SidecarProcess) -> list[tuple[str, dict[str, str], float]]:
    return samples(ask_now(sidecar.admin_url, request("GET", "/metrics")).body.decode())


def reloads(sidecar: SidecarProcess) -> dict[str, float]:
    name = "litellm_sidecar_team_file_reloads_total"
    return {labels["result"]: value for found, labels, value in rows(sidecar) if found == name}


def last_success(sidecar: SidecarProcess) -> float:
    name = "litellm_sidecar_team_file_last_success_timestamp_seconds"
    (value,) = [value for found, _, value in rows(sidecar) if found == name]
    return value


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def logged(sidecar: SidecarProcess, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in sidecar.process.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def teams_of_calls(clouds: Clouds, sidecar: SidecarProcess, key: str = KEY) -> set[str]:
    """Make a call and say whose series it raised."""

    def calls() -> dict[str, float]:
        name = "litellm_sidecar_responses_total"
        grouped: dict[str, float] = {}
        for found, labels, value in rows(sidecar):
            if found == name:
                team = labels["team_alias"]
                grouped[team] = grouped.get(team, 0) + value
        return grouped

    before = calls()
    assert ask_now(sidecar.url, post(body_for(MODEL, "teams"), key)).status == 200
    return {team for team, value in calls().items() if value > before.get(team, 0)}


def test_edited_under_a_running_sidecar(clouds: Clouds, tmp_path: Path) -> None:
    """A new map holds from about a second on; a broken one is counted and told, and the old map
    stays in force; a mended one is read again."""
    path = tmp_path / "teams.yaml"
    path.write_text(f"{HASH}: red\n")
    settings = {"SIDECAR_UPSTREAM": clouds.url, "SIDECAR_TEAM_FILE": str(path)}
    with sidecar_process(tmp_path, settings) as sidecar:
        assert teams_of_calls(clouds, sidecar) == {"red"}
        assert teams_of_calls(clouds, sidecar, "sk-stranger") == {"unknown"}
        assert reloads(sidecar) == {"success": 1, "failure": 0}
        began = last_success(sidecar)

        replace(path, json.dumps({HASH: "the blue ones ★"}))
        wait(lambda: reloads(sidecar)["success"] == 2)
        assert teams_of_calls(clouds, sidecar) == {"the blue ones ★"}
        assert last_success(sidecar) > began

        broken = ["{", f"{HASH}: [red]\n", f"{KEY}: red\n", "- red\n"]
        for number, text in enumerate(broken, start=1):
            replace(path, text)
            wait(lambda number=number: reloads(sidecar)["failure"] == number)  # type: ignore[misc]
            assert teams_of_calls(clouds, sidecar) == {"the blue ones ★"}
        path.unlink()
        wait(lambda: reloads(sidecar)["failure"] == len(broken) + 1)
        assert teams_of_calls(clouds, sidecar) == {"the blue ones ★"}
        time.sleep(1.5)  # one failure is told once, not with every look at the file
        assert reloads(sidecar) == {"success": 2, "failure": len(broken) + 1}

        replace(path, f"{HASH}: null\n")
        wait(lambda: reloads(sidecar)["success"] == 3)
        assert teams_of_calls(clouds, sidecar) == {"None"}

        failures = logged(sidecar, "team_file_failed")
        assert len(failures) == len(broken) + 1
        assert all(str(path) in str(line["faults"]) for line in failures)
        assert [line["keys"] for line in logged(sidecar, "team_file_read")] == [1, 1]
        assert KEY not in sidecar.process.log.read_text()
        assert HASH not in sidecar.process.log.read_text()
