"""Chat completions and responses are the same whole and split, raise nothing, and stay bounded."""

from __future__ import annotations

from fuzz.harness import controlled, start
from fuzz.taps import ENDS, JSON, SSE, hold_to_contract
from sidecar.exchange import Dialect

DIALECTS = (Dialect.OPENAI_CHAT, Dialect.OPENAI_RESPONSES)


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    hold_to_contract(
        DIALECTS[control >> 1 & 1],
        SSE if control & 1 else JSON,
        body,
        ENDS[(control >> 4) % 3],
        control >> 6,
    )


if __name__ == "__main__":
    start(one_input)
