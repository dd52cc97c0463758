"""The quick start of the README, as it stands there, on compose's files and without an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.litellm import LiteLLM, find_litellm
from tests.support.process import ManagedProcess, free_port
from tests.support.requirements import require
from tests.support.running import ROOT, SidecarProcess, sidecar_process

README = (ROOT / "README.md").read_text()
VERSION = "1.83.10"


class _ComposeLiteLLM(LiteLLM):
    """LiteLLM with the files that compose mounts into it."""

    def __init__(self, provider_url: str, directory: Path) -> None:
        super().__init__(VERSION, provider_url, directory)
        for mounted in ("deploy/compose/local_auth.py", "deploy/litellm/sidecar_identity.py"):
            (directory / Path(mounted).name).write_text((ROOT / mounted).read_text())
        self._mounted = directory / "config.yaml"
        text = (ROOT / "deploy/compose/litellm.yaml").read_text()
        assert "http://provider:4010" in text
        self._mounted.write_text(text.replace("http://provider:4010", provider_url))

    def _write_files(self) -> Path:
        return self._mounted


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    """Run compose's three: the provider, LiteLLM and the sidecar."""
    require(find_litellm(VERSION), f"LiteLLM {VERSION}")
    directory = tmp_path_factory.mktemp("compose")
    port = free_port()
    provider = ManagedProcess(
        [sys.executable, "-m", "sidecar.demo.provider", "--port", str(port)],
        directory=directory,
        log=directory / "provider.log",
        environment={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )
    try:
        with (
            _ComposeLiteLLM(f"http://127.0.0.1:{port}", directory) as litellm,
            sidecar_process(directory, {"SIDECAR_UPSTREAM": litellm.url}) as front,
        ):
            yield front
    finally:
        provider.stop()


def test_calls_of_the_quick_start_give_what_it_says(sidecar: SidecarProcess) -> None:
    """Its lines are run by a shell, and its series are among those that come out."""
    block = re.search(r"```sh\n(docker compose up .*?)```", README, re.DOTALL)
    expected = re.search(r"reads them:\n\n```text\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert expected is not None
    up, _, script = block[1].partition("\n")
    assert up == "docker compose up --build --wait"
    script = script.replace("127.0.0.1:4001", f"127.0.0.1:{sidecar.port}")
    script = script.replace("127.0.0.1:4002", f"127.0.0.1:{sidecar.admin_port}")
    done = subprocess.run(
        ["sh", "-euc", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert set(expected[1].splitlines()) <= set(done.stdout.splitlines()), done.stdout


def test_every_block_of_the_quick_start_is_run_here() -> None:
    """A block that is added to the README is to be run by a test of this file, too."""
    start = README.partition("## Quick start\n")[2].partition("\n## ")[0]
    first = [block.split()[:2] for block in re.findall(r"```sh\n(.*?)```", start, re.DOTALL)]

    assert first == [["make", "demo"], ["docker", "compose"]]


def test_demo_shows_its_page_before_it_has_counted(tmp_path: Path) -> None:
    """`make demo`, with the packages that are here in place of those that it would fetch."""
    demo = tmp_path / "demo"
    demo.symlink_to(sys.prefix)
    log = tmp_path / "demo.log"
    process = ManagedProcess(
        ["make", "--old-file", f"{demo}/.ready", "demo", f"DEMO={demo}"],
        directory=ROOT,
        log=log,
        environment={"PATH": os.environ["PATH"]},
        watched=False,  # it says how to ask it something, with a key that is none
    )
    try:
        process.wait_until(lambda: "http://" in log.read_text(), timeout_s=30)
        found = re.search(r"http://127\.0\.0\.1:\d+/?", log.read_text())
        assert found is not None
        assert "<html" in _fetched(found[0])
        process.wait_until(lambda: "Every count equals the truth." in log.read_text(), timeout_s=30)
    finally:
        process.stop()


def test_beside_a_litellm_of_ones_own(sidecar: SidecarProcess, tmp_path: Path) -> None:
    """The block of docs/quickstart.md: check, serve, a call, and the series that it speaks of."""
    page = (ROOT / "docs" / "quickstart.md").read_text()
    block = re.search(r"```sh\n(python3 -m venv .*?)```", page, re.DOTALL)
    query = re.search(r"```sh\n(curl \S+ \S+ \| grep '\^litellm_sidecar_responses.*)\n", page)
    assert block is not None
    assert query is not None
    venv, install, export, check, serve = block[1].splitlines()
    assert venv == "python3 -m venv .sidecar"
    assert install.endswith(
        "install --quiet --require-hashes --no-deps -r requirements/runtime.txt"
    )
    (tmp_path / ".sidecar").symlink_to(sys.prefix)
    # What relays LiteLLM's answers is as good as LiteLLM.
    export = export.replace("http://127.0.0.1:4000", sidecar.url)
    port, admin_port = free_port(), free_port()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    environment |= {"SIDECAR_PORT": str(port), "SIDECAR_ADMIN_PORT": str(admin_port)}

    done = subprocess.run(
        ["sh", "-euc", f"{export}\n{check}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"ok: LiteLLM answers at {sidecar.url}"
    process = ManagedProcess(
        ["sh", "-euc", f"{export}\nexec {serve}"],
        directory=tmp_path,
        log=tmp_path / "serve.log",
        environment=environment,
    )
    try:
        process.wait_until(
            lambda: '"serving"' in (tmp_path / "serve.log").read_text(), timeout_s=30
        )
        calls = re.search(r"(?ms)^(PROMPT=.*?)^curl", README)
        assert calls is not None
        script = f"{calls[1]}{query[1]}".replace(":4001", f":{port}")
        script = script.replace(":4002", f":{admin_port}").replace("Every word", "Each word")
        told = subprocess.run(
            ["sh", "-euc", script], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    finally:
        process.stop()
    ones = re.findall(r'outcome="(\w+)",[^}]*\} 1\.0', told)
    assert sorted(ones) == ["hit", "write"], told


def _fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
