"""The first and the last moments of a command, in which a signal must not look like a fault."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.running import ROOT

MOMENTS_S = (0.0, 0.1, 0.3, 0.6)


def catches_sigterm(pid: int) -> bool:
    """Whether the process has come so far that it looks after signals itself."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def start(*arguments: str) -> subprocess.Popen[str]:
    # A signal may come between a file's opening and what closes it.
    warnings = ["-W", "error", "-W", "ignore::ResourceWarning"]
    child = subprocess.Popen(
        [sys.executable, *warnings, "-m", "sidecar", *arguments],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "SIDECAR_PORT": "0",
            "SIDECAR_ADMIN_PORT": "0",
            "SIDECAR_UPSTREAM": "http://127.0.0.1:9",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 20
    while child.poll() is None and not catches_sigterm(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return child


@pytest.mark.parametrize(
    ("arguments", "number", "own_codes"),
    [
        # Once it serves, a signal is a clean end.
        pytest.param(("serve",), signal.SIGINT, {0}, id="serve, Ctrl-C"),
        pytest.param(("serve",), signal.SIGTERM, {0}, id="serve, SIGTERM"),
        pytest.param(("check",), signal.SIGINT, {1}, id="check, Ctrl-C"),
        pytest.param(("demo", "--once"), signal.SIGINT, {0, 1}, id="demo, Ctrl-C"),
    ],
)
def test_signal_at_any_moment(
    arguments: tuple[str, ...], number: signal.Signals, own_codes: set[int]
) -> None:
    """It ends the command within a moment and without a traceback, whatever was being done."""
    # With -2 or -15 the interpreter was about to end anyway.
    codes = {128 + number, -number} | own_codes
    for moment in MOMENTS_S:
        child = start(*arguments)
        try:
            time.sleep(moment)
            child.send_signal(number)
            said, _ = child.communicate(timeout=20)
        finally:
            child.kill()
            child.wait()
        assert "Traceback" not in said, f"after {moment} s:\n{said}"
        assert child.returncode in codes, f"after {moment} s:\n{said}"


def test_first_process_of_a_container_hears_sigterm_from_the_start() -> None:
    """Its default would be to go on: nothing but a handler of our own ends such a process."""
    child = start("serve")
    try:
        assert catches_sigterm(child.pid)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 128 + signal.SIGTERM
