"""EventFinder finds what a plain reading of the WHATWG grammar finds, for any split."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start
from fuzz.reference import events

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.observe import sse

BOUND = 256
# So low that an input of a few kilobytes goes past them.
sse.MAX_EVENT_BYTES = BOUND
sse._MAX_PENDING = BOUND + 5
sse.TAIL_BYTES = 64
NEEDLES = (b'"u"', b"use")
END_NEEDLES = (b'"e"', b"stop")


def find(chunks: list[bytes]) -> tuple[list[tuple[bytes, bytes, bool, bool]], bool]:
    """Return name, data, whether terminated, whether torn of each; and whether one was skipped."""
    finder = sse.EventFinder(NEEDLES, END_NEEDLES)
    found = [event for chunk in chunks for event in finder.feed(chunk)]
    found += finder.finish()
    plain = [(event.name, event.data, event.terminated, event.stray) for event in found]
    return plain, finder.oversized


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    expected = events(body, NEEDLES, END_NEEDLES, BOUND, sse.TAIL_BYTES)
    assert find([body]) == expected, (find([body]), expected)
    split = find(pieces(body, control))
    assert split == expected, (split, expected)


if __name__ == "__main__":
    start(one_input)
