"""The commands that look at something: inspect, check, healthcheck."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.bodies import message, stream
from tests.support.process import coverage_environment, free_port
from tests.support.running import ROOT, sidecar_process
from tests.support.secrets import assert_no_keys

USAGE = {
    "input_tokens": 7,
    "output_tokens": 16,
    "cache_read_input_tokens": 0,
    "cache_creation_input_tokens": 2101,
    "cache_creation": {"ephemeral_5m_input_tokens": 2101, "ephemeral_1h_input_tokens": 0},
}


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | settings
    environment |= coverage_environment()
    command = [sys.executable, "-m", "sidecar", *arguments]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=30
    )
    assert_no_keys(done.stdout + done.stderr, " ".join(command))
    return done


def test_inspect_prints_what_the_wire_said(tmp_path: Path) -> None:
    """One JSON object a line, with null where nothing was said."""
    files = {
        "a.json": message(USAGE),
        "b.sse": stream({"input_tokens": 7, "cache_read_input_tokens": 5}, {"output_tokens": 3}),
        "c.json": b'{"type":"error","error":{"type":"api_error","message":"x"}}',
        "d.json": message({"input_tokens": 1, "cache_read_input_tokens": 0}),
    }
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    done = run("inspect", "--json", *(str(tmp_path / name) for name in files))
    assert done.returncode == 0
    first, second, third, fourth = map(json.loads, done.stdout.splitlines())
    assert first == {
        "file": str(tmp_path / "a.json"),
        "status": "complete",
        "outcome": "write",
        "usage": {
            "input_tokens": 7,
            "output_tokens": 16,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 2101,
            "ephemeral_5m_input_tokens": 2101,
            "ephemeral_1h_input_tokens": 0,
        },
        "terms": {},
    }
    assert (second["status"], second["outcome"]) == ("complete", "hit")
    assert second["usage"]["cache_creation_input_tokens"] is None
    assert (third["status"], third["outcome"]) == ("error", None)
    assert set(third["usage"].values()) == {None}
    assert (fourth["status"], fourth["outcome"]) == ("complete", "unknown")
    assert "write_5m 2101" in run("inspect", str(tmp_path / "a.json")).stdout


def test_what_is_printed_cannot_command_the_terminal(tmp_path: Path) -> None:
    """Whoever named a file, a model or a setting."""
    name = "\x1b[2J\x9b1m\u2028"
    path = tmp_path / f"{name}.json"
    path.write_bytes(message(USAGE))
    assert json.loads(run("inspect", "--json", str(path)).stdout)["file"] == str(path)
    for done in (
        run("inspect", str(path)),
        run("prices", name, SIDECAR_UPSTREAM="http://127.0.0.1:9", SIDECAR_PRICE_SOURCES="package"),
        run("check", SIDECAR_UPSTREAM=name),
    ):
        said = done.stdout + done.stderr
        assert "\\x1b[2J\\x9b1m\\u2028" in said
        assert not set("\x1b\x9b\u2028") & set(said)


def test_inspect_tells_what_a_file_is(tmp_path: Path) -> None:
    """By its name in any case, else by its beginning; a query in the route does no harm. Files
    that are neither are read like any answer."""
    body, events = message(USAGE), stream(USAGE, {"output_tokens": 16})
    files = {
        "a.JSON": (body, "complete"),
        "b.SSE": (events, "complete"),
        "c.txt": (b"\n " + body, "complete"),
        "d": (events, "complete"),
        "empty.json": (b"", "missing"),
        "empty.sse": (b"", "missing"),
        "binary.json": (bytes(range(256)), "invalid"),
        "binary.sse": (bytes(range(256)), "missing"),
        "list.json": (b"[1]", "invalid"),
        "deep.json": (b'{"a":' * 100_000, "invalid"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in files]
    done = run("inspect", "--json", "--route", "/v1/messages?beta=true", *paths)
    assert (done.returncode, done.stderr) == (0, "")
    statuses = [json.loads(line)["status"] for line in done.stdout.splitlines()]
    assert statuses == [status for _, status in files.values()]
    assert run("inspect", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("> /dev/full", "sidecar: [Errno 28] No space left on device\n"),
        ("| true", ""),
        (">&-", ""),
    ],
)
def test_output_that_cannot_be_written(
    where: str, said: str, buffered: bool, tmp_path: Path
) -> None:
    """A full disk is a line, not a traceback; a reader that has enough is none."""
    (tmp_path / "a.json").write_bytes(message(USAGE))
    inspect = f"{sys.executable} -m sidecar inspect {tmp_path}/a.json"
    done = subprocess.run(
        ["sh", "-c", f"{{ {inspect}; echo $? > {tmp_path}/code; }} {where}"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | ({} if buffered else {"PYTHONUNBUFFERED": "1"}),
    )
    assert (tmp_path / "code").read_text() == ("0\n" if where == ">&-" else "1\n")
    assert done.stderr == said


def test_wrong_usage_ends_with_2(tmp_path: Path) -> None:
    """A file that is not there, a route that is not observed, and no command at all."""
    (tmp_path / "a.json").write_text("{}")
    assert run("inspect", str(tmp_path / "absent.json")).returncode == 2
    done = run("inspect", "--route", "/v1/models", str(tmp_path / "a.json"))
    assert (done.returncode, "not an observed route" in done.stderr) == (2, True)
    assert run("nonsense").returncode == 2


def test_check_and_healthcheck(tmp_path: Path) -> None:
    """Both say what they found, with 0 where all is well and 1 where it is not."""
    nobody = f"http://127.0.0.1:{free_port()}"
    failed = run("check", SIDECAR_UPSTREAM=nobody)
    assert (failed.returncode, "LiteLLM does not answer" in failed.stderr) == (1, True)
    assert run("check", SIDECAR_PORT="x").returncode == 2
    assert run("healthcheck", SIDECAR_ADMIN_PORT=str(free_port())).returncode == 1
    with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": nobody}) as side:
        admin = {"SIDECAR_ADMIN_PORT": str(side.admin_port)}
        healthy = run("healthcheck", **admin)
        assert (healthy.returncode, healthy.stdout) == (0, "ok\n")
        # A process is not unwell because a file that it has read is gone.
        gone = {"SIDECAR_TEAM_FILE": str(tmp_path / "gone.json")}
        assert run("healthcheck", **admin, **gone).returncode == 0
        unready = run("healthcheck", "--ready", **admin)
        assert (unready.returncode, "503" in unready.stderr) == (1, True)
        passed = run("check", SIDECAR_UPSTREAM=side.admin_url)
        assert (passed.returncode, "ok: LiteLLM answers" in passed.stdout) == (0, True)
        assert "SIDECAR_LABELS=model,team_alias,provider" in passed.stdout
