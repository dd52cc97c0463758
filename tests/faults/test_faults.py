"""Every row of the table is what happens, played against a process of its own settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.cases import CASES
from tests.faults.lab import Lab
from tests.faults.model import Case

THOROUGH = os.environ.get("FAULTS") == "all"
ROWS = [case for cases in CASES.values() for case in cases]


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Lab]]:
    with (
        Lab.open(tmp_path_factory.mktemp("default"), "default") as default,
        Lab.open(tmp_path_factory.mktemp("hasty"), "hasty") as hasty,
    ):
        yield {"default": default, "hasty": hasty}


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_row(labs: dict[str, Lab], case: Case) -> None:
    """The client gets, and the counters say, what the row claims."""
    assert labs[case.settings].differences(case, thorough=THOROUGH) == []


@pytest.mark.parametrize("settings", ["default", "hasty"])
def test_nothing_is_left(labs: dict[str, Lab], settings: str) -> None:
    """After all of them no file, task, or connection to the upstream is left."""
    lab = labs[settings]

    assert lab.rest() == lab.at_rest
