"""What all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import Scheduling

from tests.support.schedule import RigScheduling, place_of
from tests.support.secrets import LogWatch, keys_in

_log_watch = LogWatch()


def pytest_configure() -> None:
    """Watch what is logged, from the first test on."""
    _log_watch.install()


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Share the tests out by rig where it is asked for by file."""
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # by number of tests: the longest are few
    return RigScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put them in the order in which they are shared out."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place_of(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what has logged or printed a key."""
    report = yield
    printed = [text for name, text in report.sections if "stdout" in name or "stderr" in name]
    found = _log_watch.take() + keys_in("".join(printed))
    if found and report.passed:
        report.outcome = "failed"
        report.longrepr = f"it logged or printed the keys {found[:3]}"
    return report


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run asynchronous tests on the loop that the product runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep settings of the machine out of the tests."""
    for name in list(os.environ):
        if name.startswith("SIDECAR_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # What a process says must get through where output is buffered, as it is without this.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture(autouse=True)
def _loggers_are_as_they_were() -> Iterator[None]:
    """No test may quiet a logger: those after it would find no fault where there is one."""
    yield
    for name in ("", "asyncio", "sidecar", "sidecar.account", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        quiet = logger.disabled or not logger.propagate or logger.level > logging.WARNING
        assert not quiet, f"the logger {name!r} was quieted in this process"
