"""What the composition root does by itself."""

from __future__ import annotations

import gc

import pytest

from tests.support.process import free_port
from tests.support.running import running, until

pytestmark = pytest.mark.anyio


async def test_series_are_spared_by_the_garbage_collector() -> None:
    """Modules from the start, and series once they are many, are out of full collections, which
    would stop the loop for tens of milliseconds; at the end all is as it was."""
    async with running(f"http://127.0.0.1:{free_port()}") as side:
        await until(lambda: gc.get_freeze_count() > 10_000)
        before = gc.get_freeze_count()
        for number in range(1500):
            side.sidecar.metrics.upstream_failures.child(str(number))
        await until(lambda: gc.get_freeze_count() >= before + 1500)
    assert gc.get_freeze_count() == 0
