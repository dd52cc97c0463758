"""The tap says the same of a body whole and split, never raises, and keeps within its bounds."""

from __future__ import annotations

from fuzz.harness import controlled, start
from fuzz.taps import ENDS, JSON, SSE, hold_to_contract
from sidecar.exchange import Dialect

CODINGS = (b"", b"", b"", b"gzip", b"deflate", b"br", b"zstd", b"x")


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    hold_to_contract(
        Dialect.ANTHROPIC,
        SSE if control & 1 else JSON,
        body,
        ENDS[(control >> 4) % 3],
        control >> 6,
        CODINGS[control >> 1 & 7],
    )


if __name__ == "__main__":
    start(one_input)
