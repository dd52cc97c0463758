"""A sidecar that says at SIGUSR1 how many tasks there are.

python -m tests.support.telling serve
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import uvloop

from sidecar.app import Sidecar
from sidecar.config import load_settings
from sidecar.lifecycle import Lifecycle
from sidecar.logs import set_up_logging

__all__ = ["serve"]


async def serve() -> None:
    """Run it until SIGTERM; what it says goes to standard output, as `tasks=N`."""
    settings = load_settings()
    set_up_logging(settings.log_level)
    lifecycle = Lifecycle(Sidecar(settings))

    def say() -> None:
        gc.collect()
        os.write(1, b"tasks=%d\n" % len(asyncio.all_tasks()))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, say)
    loop.add_signal_handler(signal.SIGTERM, lifecycle.stop, signal.SIGINT)
    await lifecycle.run()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
