"""What the targets share: how they start, and how their input is cut."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import pairwise

import atheris

__all__ = ["CONTROL_BYTES", "Wire", "controlled", "pieces", "start"]

CONTROL_BYTES = 2
"""The end of each input is no part of what is read; it chooses how that is done."""


def start(one_input: Callable[[bytes], None]) -> None:
    """Run a target as libFuzzer wants it."""
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


def controlled(data: bytes) -> tuple[bytes, int]:
    """Take what chooses off the end of an input."""
    return data[:-CONTROL_BYTES], int.from_bytes(data[-CONTROL_BYTES:], "big")


def pieces(body: bytes, seed: int) -> list[bytes]:
    """Cut a body: byte by byte, or at random places. A piece may be empty."""
    if seed % 4 == 0:
        return [body[at : at + 1] for at in range(len(body))]
    places = random.Random(seed)  # noqa: S311 - nothing here is to be kept secret
    inner = sorted(places.choices(range(len(body) + 1), k=places.randint(1, 12)))
    return [body[begin:end] for begin, end in pairwise([0, *inner, len(body)])]


class Wire:
    """Stands in for a connection to the upstream, and for its loop."""

    flushed = True
    read_paused = False

    def __init__(self) -> None:
        self.loop = self
        self.over = ""
        """What became of it after the exchange."""

    def time(self) -> float:
        """No time passes."""
        return 0.0

    def pause_reading(self) -> None:
        """Nothing comes but what is fed."""

    def release(self, response: object) -> None:
        """Note that it can be used again."""
        self.over = "kept"

    def abandon(self, response: object) -> None:
        """Note that it is closed."""
        self.over = "closed"
