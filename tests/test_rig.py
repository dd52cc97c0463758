"""The rig that the tests stand on: it leaves nothing behind, and keeps together what it must."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.process import ManagedProcess
from tests.support.running import ROOT
from tests.support.schedule import place_of, unit_of

# Starts three groups of two processes, ends one of them, and waits to be ended itself.
_STARTER = """
import os, sys, time
from pathlib import Path
from tests.support.process import ManagedProcess

directory = Path(sys.argv[1])
command = ["sh", "-c", "sleep 600 & sleep 600"]
started = [
    ManagedProcess(
        command, directory=directory, log=directory / f"{n}.log", environment=dict(os.environ)
    )
    for n in range(3)
]
started[1].stop()
print(*(process.pid for process in started), flush=True)
time.sleep(600)
"""


def members(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            found.append(stat.parent.name)
    return found


def wait_for_the_end(groups: list[int]) -> None:
    """What was killed ends when the kernel comes to it."""
    deadline = time.monotonic() + 10
    while any(map(members, groups)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are read through Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_tests(tmp_path: Path, number: signal.Signals) -> None:
    """However the process of the tests is ended, the groups that it started end with it."""
    with subprocess.Popen(
        [sys.executable, "-c", _STARTER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as starter:
        assert starter.stdout is not None
        groups = [int(group) for group in starter.stdout.readline().split()]
        wait_for_the_end(groups[1:2])
        running = [group for group in groups if members(group)]
        starter.send_signal(number)
    assert running == [groups[0], groups[2]]
    wait_for_the_end(groups)


def test_a_process_is_ended_with_its_children(tmp_path: Path) -> None:
    """Not its leader alone."""
    process = ManagedProcess(
        ["sh", "-c", "sleep 600 & sleep 600"],
        directory=tmp_path,
        log=tmp_path / "log",
        environment=dict(os.environ),
    )
    process.stop()
    wait_for_the_end([process.pid])


@pytest.mark.parametrize(
    ("nodeid", "unit"),
    [
        ("tests/test_a.py::test_b", "tests/test_a.py"),
        ("tests/test_a.py::test_b[x::y-1.2.3]", "tests/test_a.py"),
        ("tests/test_a.py::test_b[litellm]", "tests/test_a.py"),
        ("tests/test_a.py::test_b[litellm-1.2.3]", "litellm-1.2.3"),
        ("tests/test_a.py::test_b[litellm-1.2.30-x y]", "litellm-1.2.30"),
        ("tests/test_c.py::test_d[x-keyed-1.2.3-\\n[y]]", "keyed-1.2.3"),
    ],
)
def test_what_goes_to_one_process(nodeid: str, unit: str) -> None:
    """The tests of a file, and those of a rig whatever their file."""
    assert unit_of(nodeid) == unit


def test_what_takes_longest_goes_first() -> None:
    """Whole rigs, and then the files that start processes."""
    nodeids = [
        "tests/e2e/test_a.py::test_b[keyed-1.2.3]",
        "tests/e2e/test_a.py::test_b",
        "tests/proxy/test_a.py::test_b",
        "tests/test_a.py::test_b",
        "tests/account/test_a.py::test_b",
    ]
    places = [place_of(nodeid) for nodeid in nodeids]
    assert places == sorted(set(places))


_CONFTEST = """
from tests.conftest import pytest_collection_modifyitems, pytest_xdist_make_scheduler
"""
_ENDS_ITS_PROCESS = """
import os, pytest

@pytest.mark.parametrize("number", range({tests}))
def test_it(number):
    if number == {last}:
        os._exit(1)
"""


@pytest.mark.parametrize("last", [0, 3])
def test_the_suite_ends_when_a_process_of_it_dies(tmp_path: Path, last: int) -> None:
    """The test that it died of fails, once; what it had left is run, and nothing is waited for."""
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    for file in "abcd":
        tests, ends = (1 if file == "d" else 4), (last if file == "c" else -1)
        text = _ENDS_ITS_PROCESS.format(tests=tests, last=ends)
        (tmp_path / f"test_{file}.py").write_text(text)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "loadfile"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"test_c.py::test_it[{last}]" in ran.stdout
    assert "1 failed, 12 passed" in ran.stdout
