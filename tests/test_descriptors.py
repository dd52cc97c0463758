"""How file descriptors are shared out, and the limit on them."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys

import pytest

from sidecar.descriptors import Descriptors
from tests.support.running import ROOT


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


@pytest.mark.parametrize(("limit", "reserved"), [(96, 32), (1024, 128), (1 << 20, 512)])
def test_last_ones_are_kept(limit: int, reserved: int) -> None:
    """An eighth, within bounds, is kept from clients."""
    descriptors = Descriptors(limit)
    assert descriptors.reserved == reserved
    assert descriptors.admits(limit - reserved - 1)
    assert not descriptors.admits(limit - reserved)


def test_litellm_gets_most_of_what_clients_do_not() -> None:
    """A quarter is left for the admin port; connections in the making count."""
    number = os.open(os.devnull, os.O_RDONLY)
    os.close(number)  # so it is the lowest that is free
    descriptors = Descriptors(number + 32 // 4 + 3)
    assert descriptors.reserved == 32
    assert [descriptors.has_room(count) for count in (1, 3, 4)] == [True, True, False]


def test_no_limit() -> None:
    """Where there is none, none is kept to."""
    descriptors = Descriptors(resource.RLIM_INFINITY)
    assert descriptors.admits(1 << 40)
    assert descriptors.has_room()


def test_it_is_said_once_that_they_ran_out(caplog: pytest.LogCaptureFixture) -> None:
    """With the limit, and what to do."""
    descriptors = Descriptors(64)
    for _ in range(3):
        assert not descriptors.admits(63)
    (said,) = caplog.records
    assert (said.message, said.levelno) == ("file_descriptors_ran_out", logging.ERROR)
    assert said.__dict__["limit"] == 64
    assert "ulimit -n" in said.__dict__["detail"]


@pytest.mark.parametrize(
    ("requests", "connections", "needed"),
    [
        pytest.param(100, None, 200 + 32, id="requests"),
        pytest.param(None, 100, 200 + 32, id="connections"),
        pytest.param(100, 50, 100 + 32, id="fewer connections"),
        pytest.param(50, 100, 150 + 32, id="more connections"),
    ],
)
def test_limit_that_is_too_low(
    requests: int | None, connections: int | None, needed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a warning that says how many are needed; one that suffices is none."""
    Descriptors(needed).check(requests, connections)
    assert events(caplog) == []
    Descriptors(needed - 1).check(requests, connections)
    assert events(caplog) == ["file_descriptor_limit_is_low"]
    assert caplog.records[0].__dict__["needed"] == needed


def test_nothing_is_needed_for_no_limits(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can say how many that would be."""
    Descriptors(1).check(None, None)
    assert events(caplog) == []


def test_soft_limit_is_raised() -> None:
    """To the hard one, which is not ours to change."""
    code = (
        "import resource\n"
        "from sidecar.descriptors import raise_limit\n"
        "raise_limit()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 300; ulimit -Sn 200; exec "$@"', "sh", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=30,
    )
    assert done.stdout.split() == ["300", "300"]
