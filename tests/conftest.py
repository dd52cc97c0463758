"""What all tests share."""

from __future__ import annotations

import os

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
