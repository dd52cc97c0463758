"""`python -m sidecar`, and the command `sidecar`."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit.

    To import it takes a while, in which a signal is not to end in a traceback, nor to be lost:
    to the first process of a container SIGTERM does nothing unless it is asked for.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from sidecar import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    """End at once, as if nobody had asked for the signal."""
    os._exit(128 + number)


if __name__ == "__main__":
    main()
