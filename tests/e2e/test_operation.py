"""What an operator meets: settings that are wrong, ports that are taken, probes, and commands."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.calls import ask_now, body_for, post, request
from tests.support.clouds import Clouds
from tests.support.process import free_port
from tests.support.running import ROOT, SidecarProcess, sidecar_process
from tests.support.secrets import assert_no_keys

NOWHERE = "http://127.0.0.1:9"


def command(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `sidecar` to its end, with these settings without their prefix."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    environment |= {f"SIDECAR_{name.upper()}": value for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sidecar", *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )
    assert_no_keys(done.stdout + done.stderr, f"`sidecar {' '.join(arguments)}`")
    return done


def ports() -> dict[str, str]:
    return {"port": str(free_port()), "admin_port": str(free_port())}


def logged(sidecar: SidecarProcess, event: str) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in sidecar.process.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def await_log(sidecar: SidecarProcess, event: str) -> dict[str, str]:
    deadline = time.monotonic() + 10
    while not (lines := logged(sidecar, event)):
        assert time.monotonic() < deadline, sidecar.process.log_tail()
        time.sleep(0.05)
    return lines[0]


# No upstream.


def test_no_upstream(tmp_path: Path) -> None:
    """Without LiteLLM it starts, and says what is wrong: in the log, on /readyz, and to each
    client in the words of its API."""
    with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": NOWHERE}) as sidecar:
        warning = await_log(sidecar, "upstream_unreachable")
        assert warning["level"] == "warning"
        for part in (NOWHERE, "SIDECAR_UPSTREAM", "connect_failed"):
            assert part in warning["reason"]

        ready = ask_now(sidecar.admin_url, request("GET", "/readyz"))
        assert (ready.status, ready.body.decode()) == (503, warning["reason"] + "\n")
        assert ask_now(sidecar.admin_url, request("GET", "/healthz")).status == 200

        anthropic = ask_now(sidecar.url, post(body_for("m", "x"), "sk-secret-7"))
        openai = ask_now(sidecar.url, request("POST", "/v1/chat/completions", {}, {"model": "m"}))
        assert (anthropic.status, openai.status) == (502, 502)
        assert anthropic.header(b"x-sidecar-error") == b"connect_failed"
        assert json.loads(anthropic.body) == {
            "type": "error",
            "error": {"type": "api_error", "message": "LiteLLM could not be reached."},
        }
        assert json.loads(openai.body)["error"]["code"] == "connect_failed"
        assert "sk-secret-7" not in sidecar.process.log.read_text()


def test_upstream_that_comes_later(clouds: Clouds, tmp_path: Path) -> None:
    """It gets ready by itself once LiteLLM answers."""
    port = free_port()
    settings = {"SIDECAR_UPSTREAM": f"http://127.0.0.1:{port}"}
    with sidecar_process(tmp_path, settings) as sidecar:
        assert ask_now(sidecar.admin_url, request("GET", "/readyz")).status == 503
        code = (
            "import sys, uvicorn\nfrom sidecar.demo.provider import *\n"
            "app = create_provider(books=Books(), cache=PromptCache())\n"
            "uvicorn.run(app, port=int(sys.argv[1]), log_level='critical')"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(port)], cwd=ROOT) as late:
            try:
                deadline = time.monotonic() + 15
                while ask_now(sidecar.admin_url, request("GET", "/readyz")).status != 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                assert ask_now(sidecar.url, post(body_for("m", "late"), "sk-1")).status == 200
            finally:
                late.terminate()


def test_no_level_logs_a_key_or_a_prompt(clouds: Clouds, tmp_path: Path) -> None:
    """Whatever goes well or wrong, at the lowest level: no key, prompt or answer is logged, and
    every line is an object with an event."""
    teams = tmp_path / "teams.json"
    teams.write_text("{}")
    settings = {
        "SIDECAR_UPSTREAM": clouds.url,
        "SIDECAR_LOG_LEVEL": "debug",
        "SIDECAR_TEAM_FILE": str(teams),
        "SIDECAR_MAX_REQUEST_BODY_BYTES": "100000",
        "SIDECAR_MAX_LABEL_VALUES": "1",
    }
    secret = "sk-secret-9"
    body = body_for("secret-model", "a secret prompt", tokens=1000)
    with sidecar_process(tmp_path, settings) as sidecar:
        answers = [
            ask_now(sidecar.url, raw)
            for raw in (
                post(body, secret),
                post(body | {"stream": True}, secret),
                request("POST", f"/v1/messages?key={secret}", {"authorization": secret}, body),
                request("GET", f"/{secret}", {"cookie": secret}),
                request("POST", "/v1/messages", {"x-api-key": secret}, b"x" * 200_000),
                f"GET / HTTP/1.1\r\nHost: x\r\nx-api-key : {secret}\r\n\r\n".encode(),
                f"POST / HTTP/1.1\r\nx-api-key: {secret}\r\n\r\n".encode(),
            )
        ]
        assert [answer.status for answer in answers] == [200, 200, 401, 404, 413, 400, 400]
        teams.write_text(f"{secret}: red")
        await_log(sidecar, "team_file_failed")
    log = sidecar.process.log.read_text()
    assert all("event" in json.loads(line) for line in log.splitlines())
    for text in (secret, "secret prompt"):
        assert text not in log


# Settings.


def test_every_fault_is_named_and_no_secret() -> None:
    """All faulty settings are named at once, each with its value and what is allowed."""
    done = command(
        "serve",
        upstream="http://admin:hunter2@litellm:4000/v1",
        port="70000",
        labels="model,colour",
        trusted_proxies="10.0.0.0/99",
        drain_delay_s="soon",
        log_level="sk-ant-api03-key",
        team_file="/no/such/file.yaml",
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    named = [re.match(r"sidecar: SIDECAR_(\w+)='(.*?)' must be (.+)", line) for line in lines]
    assert [match and match[1].lower() for match in named] == [
        "upstream",
        "port",
        "labels",
        "team_file",
        "trusted_proxies",
        "drain_delay_s",
        "log_level",
    ]
    values = {match[1]: match[2] for match in named if match}
    assert values["PORT"] == "70000"
    assert values["LABELS"] == "model,colour"
    assert "colour" in lines[2].split("must be")[1]
    for secret in ("hunter2", "admin", "ant-api03"):
        assert secret not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("- red\n- blue\n", "must be one mapping", id="a list"),
        pytest.param("sk-live-key-1: red\n", "entry 1 is not named by a sha256", id="a bare key"),
        pytest.param("a: [b\n", "neither JSON nor YAML", id="not YAML"),
        pytest.param("", "must be one mapping", id="empty"),
    ],
)
def test_team_file_that_is_no_map_of_keys(tmp_path: Path, content: str, told: str) -> None:
    """A team file that cannot be used ends the start; the file is named, a key in it is not."""
    path = tmp_path / "teams.yaml"
    path.write_text(content)
    done = command("serve", upstream=NOWHERE, team_file=str(path), **ports())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sidecar: {path}")
    assert told in done.stderr
    assert "sk-live" not in done.stderr


def test_setting_that_does_not_exist(clouds: Clouds, tmp_path: Path) -> None:
    """A misspelt setting is a warning that names what may be meant."""
    settings = {"SIDECAR_UPSTREAM": clouds.url, "SIDECAR_UPSTREEM": "x", "SIDECAR_SERVICE_HOST": ""}
    with sidecar_process(tmp_path, settings) as sidecar:
        (warning,) = logged(sidecar, "unknown_setting")
        assert warning["level"] == "warning"
        assert warning["detail"] == (
            "SIDECAR_UPSTREEM is not a setting; did you mean SIDECAR_UPSTREAM?"
        )


def test_proxies_of_the_environment_are_not_used(clouds: Clouds, tmp_path: Path) -> None:
    """What the machine's environment says about proxies has no effect on the way to LiteLLM."""
    settings = {"SIDECAR_UPSTREAM": clouds.url, "HTTP_PROXY": NOWHERE, "http_proxy": NOWHERE}
    with sidecar_process(tmp_path, settings | {"ALL_PROXY": NOWHERE}) as sidecar:
        assert ask_now(sidecar.url, post(body_for("m", "proxies"), "sk-1")).status == 200
        assert ask_now(sidecar.admin_url, request("GET", "/readyz")).status == 200


# Ports.


@pytest.mark.parametrize("taken", ["port", "admin_port"])
def test_port_that_is_taken(taken: str) -> None:
    """It ends with 1, and says which port and which setting that is."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        done = command("serve", **(ports() | {taken: str(number), "upstream": NOWHERE}))
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"sidecar: cannot listen on 127.0.0.1:{number} (SIDECAR_{taken.upper()}): "
        "Address already in use"
    )
    assert len(done.stderr.splitlines()) == 1
    assert "serving" not in done.stdout


def test_host_that_is_not_ours() -> None:
    """So it is with an address that the machine does not have."""
    numbers = ports()
    done = command("serve", host="192.0.2.1", upstream=NOWHERE, **numbers)
    assert done.returncode == 1
    assert done.stderr == (
        f"sidecar: cannot listen on 192.0.2.1:{numbers['port']} (SIDECAR_HOST): "
        "Cannot assign requested address\n"
    )


def test_port_zero_picks_free_ones(clouds: Clouds, tmp_path: Path) -> None:
    """With port 0 the log says which ports were picked, and they answer."""
    settings = {"SIDECAR_UPSTREAM": clouds.url, "SIDECAR_PORT": "0", "SIDECAR_ADMIN_PORT": "0"}
    with sidecar_process(tmp_path, settings, wait=False) as sidecar:
        serving = await_log(sidecar, "serving")
        assert serving["address"] != serving["admin"]
        assert not serving["address"].endswith(":0")
        metrics = ask_now(f"http://{serving['admin']}", request("GET", "/metrics"))
        assert b"litellm_sidecar_build_info" in metrics.body
        answer = ask_now(f"http://{serving['address']}", post(body_for("m", "zero"), "sk-1"))
        assert answer.status == 200


# Commands.


def test_check(clouds: Clouds) -> None:
    """`check` shows all settings in force and says that LiteLLM answers."""
    done = command("check", upstream=clouds.url, labels="provider,model", prot="1")
    assert done.returncode == 0
    assert f"SIDECAR_UPSTREAM={clouds.url}\n" in done.stdout
    assert "SIDECAR_LABELS=model,provider\n" in done.stdout
    assert "SIDECAR_DRAIN_TIMEOUT_S=60.0\n" in done.stdout
    assert done.stdout.endswith(f"ok: LiteLLM answers at {clouds.url}\n")
    assert done.stderr == "warning: SIDECAR_PROT is not a setting; did you mean SIDECAR_PORT?\n"


def test_check_without_litellm() -> None:
    """It ends with 1 if LiteLLM does not answer, and with 2 if settings are wrong."""
    done = command("check", upstream=NOWHERE)
    assert done.returncode == 1
    assert NOWHERE in done.stderr
    assert "the settings are sound" in done.stderr
    assert command("check", upstream="litellm:4000").returncode == 2


def test_healthcheck(clouds: Clouds, tmp_path: Path) -> None:
    """`healthcheck` says by its code whether the process answers, or is ready."""
    with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": NOWHERE}) as sidecar:
        port = str(sidecar.admin_port)
        alive = command("healthcheck", admin_port=port, admin_host="0.0.0.0")
        assert (alive.returncode, alive.stdout) == (0, "ok\n")
        ready = command("healthcheck", "--ready", admin_port=port)
        assert ready.returncode == 1
        assert "503" in ready.stderr
        assert "connect_failed" in ready.stderr
    gone = command("healthcheck", admin_port=port)
    assert gone.returncode == 1
    assert f"127.0.0.1:{port}" in gone.stderr


@pytest.mark.parametrize("arguments", [("no-such-command",), ("serve", "--no-such-option"), ()])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """A command that does not exist ends with 2, in a line and not in a traceback."""
    done = command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
