"""What all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


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


@pytest.fixture(autouse=True)
def _loggers_are_as_they_were() -> Iterator[None]:
    """No test may quiet a logger: those after it would find no fault where there is one."""
    yield
    for name in ("", "asyncio", "sidecar", "sidecar.account", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        quiet = logger.disabled or not logger.propagate or logger.level > logging.WARNING
        assert not quiet, f"the logger {name!r} was quieted in this process"
