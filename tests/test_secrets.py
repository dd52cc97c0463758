"""The watch on keys, which every test is under: that it sees one where there is one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.process import ManagedProcess
from tests.support.running import ROOT
from tests.support.secrets import LogWatch, assert_no_keys, keys_in


def test_keys_are_found_and_masked_ones_are_none() -> None:
    """Whole, cut, and between other text."""
    assert keys_in(b'{"a":"sk-red-1"} Bearer sk-ant-api03-x sk-*** task- ask') == [
        "sk-red-1",
        "sk-ant-api03-x",
    ]
    assert_no_keys("sk-***", "this")
    with pytest.raises(AssertionError, match="this has the keys"):
        assert_no_keys("x sk-1 y", "this")


def test_watch_sees_what_a_record_refers_to() -> None:
    """Message, arguments and extras."""
    watch = LogWatch()
    for number, (message, arguments, extra) in enumerate(
        [("sk-a", (), {}), ("%s", ("sk-b",), {}), ("x", (), {"headers": [(b"k", b"sk-c")]})]
    ):
        record = logging.makeLogRecord({"msg": message, "args": arguments, **extra})
        watch.handle(record)
        assert "sk-" + "abc"[number] in watch.take()
    assert watch.take() == []


@pytest.mark.parametrize(
    "leak",
    [
        "logging.getLogger('sidecar.account').debug('x', extra={'key': SECRET})",
        "logging.getLogger('uvicorn.error').warning('x %s', SECRET)",
        "print(SECRET)",
        "print(SECRET, file=sys.stderr)",
    ],
)
def test_test_that_leaks_fails(tmp_path: Path, leak: str) -> None:
    """One that would pass otherwise, and no other."""
    (tmp_path / "test_leak.py").write_text(
        "import logging, sys\nSECRET = '-'.join(('sk', 'leak'))\n"
        f"def test_leaks():\n    {leak}\ndef test_does_not():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout
    assert "it logged or printed the keys" in done.stdout


LEAK = "import signal; print('-'.join(('Bearer sk', 'leak')), flush=True); signal.pause()"


@pytest.mark.parametrize(
    "command", [["-c", LEAK], ["-m", "sidecar_by_another_name"]], ids=["program", "module"]
)
@pytest.mark.parametrize("watched", [True, False, None], ids=["watched", "not", "by default"])
def test_child_is_watched_however_it_is_started(
    tmp_path: Path, command: list[str], watched: bool | None
) -> None:
    """Unless somebody says that it is none of the product's."""
    (tmp_path / "sidecar_by_another_name.py").write_text(LEAK)
    process = ManagedProcess(
        [sys.executable, *command],
        directory=tmp_path,
        log=tmp_path / "log",
        environment={"PATH": os.environ["PATH"]},
        **({} if watched is None else {"watched": watched}),
    )
    process.wait_until(lambda: "sk-leak" in process.log_tail(), timeout_s=20)
    with nullcontext() if watched is False else pytest.raises(AssertionError, match="sk-leak"):
        process.stop()
