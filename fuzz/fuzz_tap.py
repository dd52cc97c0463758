"""The tap says the same of a body whole and split, never raises, and keeps within its bounds."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.exchange import Dialect, End, Observation, Status
    from sidecar.observe import sse, tap

BOUND = 512  # so low that an input of a few kilobytes goes past it
sse.MAX_EVENT_BYTES = tap.MAX_JSON_BYTES = BOUND
sse._MAX_PENDING = BOUND + 5
sse.TAIL_BYTES = 128

TYPES = (b"application/json", b"text/event-stream")
CODINGS = (b"", b"", b"", b"gzip", b"deflate", b"br", b"zstd", b"x")


def observe(chunks: list[bytes], headers: list[tuple[bytes, bytes]], end: End) -> Observation:
    reader = tap.tap_for(Dialect.ANTHROPIC, 200, headers)
    for chunk in chunks:
        reader.feed(chunk)
        inner = getattr(reader, "_reader", reader)
        if isinstance(inner, tap._StreamReader):
            finder = inner._finder
            assert len(finder._pending) <= BOUND + 5 + len(chunk)
            assert sum(map(len, finder._tail)) <= 2 * sse.TAIL_BYTES
        elif isinstance(inner, tap._JsonReader):
            assert sum(map(len, inner._chunks)) <= BOUND
    return reader.finish(end)


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    headers = [(b"content-type", TYPES[control & 1])]
    if coding := CODINGS[control >> 1 & 7]:
        headers.append((b"content-encoding", coding))
    end = list(End)[(control >> 4) % 3]
    whole = observe([body], headers, end)
    split = observe(pieces(body, control >> 6), headers, end)
    # How much of a damaged coding comes out before the fault depends on how it is cut.
    damaged = coding and {whole.status, split.status} <= {Status.INVALID, Status.OVERSIZED}
    assert damaged or whole == split, (whole, split)


if __name__ == "__main__":
    start(one_input)
