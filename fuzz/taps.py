"""What the targets of the taps share: bounds that an input reaches, and what is held to."""

from __future__ import annotations

import atheris

from fuzz.harness import pieces

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.exchange import Dialect, End, Observation, Status, Tap
    from sidecar.observe import event_stream, sse, tap

__all__ = ["BOUND", "ENDS", "JSON", "MESSAGES", "SSE", "hold_to_contract"]

BOUND = 512  # so low that an input of a few kilobytes goes past it
sse.MAX_EVENT_BYTES = tap.MAX_JSON_BYTES = event_stream.MAX_MESSAGE_BYTES = BOUND
sse._MAX_PENDING = BOUND + 5
sse.TAIL_BYTES = 128

ENDS = tuple(End)
JSON, SSE, MESSAGES = b"application/json", tap.STREAM_TYPE, tap.MESSAGES_TYPE


def _check_memory(reader: Tap, chunk: bytes) -> None:
    inner = getattr(reader, "_reader", reader)
    if isinstance(inner, tap._StreamReader):
        finder = inner._finder
        assert len(finder._pending) <= BOUND + 5 + len(chunk)
        assert sum(map(len, finder._tail)) <= 2 * sse.TAIL_BYTES
    elif isinstance(inner, tap._MessagesReader):
        assert len(inner._messages._pending) <= BOUND + len(chunk)
    elif isinstance(inner, tap._JsonReader):
        assert sum(map(len, inner._chunks)) <= BOUND


def _observe(
    dialect: Dialect, headers: list[tuple[bytes, bytes]], chunks: list[bytes], end: End
) -> tuple[Observation, bool]:
    reader = tap.tap_for(dialect, 200, headers)
    for chunk in chunks:
        reader.feed(chunk)
        _check_memory(reader, chunk)
    return reader.finish(end), reader.first_token_seen


def hold_to_contract(
    dialect: Dialect, content_type: bytes, body: bytes, end: End, seed: int, coding: bytes = b""
) -> None:
    """Observe a body whole and split.

    Args:
        seed: chooses how it is split.
        coding: its content coding; empty for none.
    """
    headers = [(b"content-type", content_type)]
    if coding:
        headers.append((b"content-encoding", coding))
    whole = _observe(dialect, headers, [body], end)
    split = _observe(dialect, headers, pieces(body, seed), end)
    # How much of a damaged coding comes out before the fault depends on how it is cut.
    statuses = {whole[0].status, split[0].status}
    damaged = coding and statuses <= {Status.INVALID, Status.OVERSIZED}
    assert damaged or whole == split, (whole, split)
