"""The quick start of the README, as it stands there, on compose's files and without an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
