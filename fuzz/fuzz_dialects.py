"""What `tap` says of Anthropic's answers holds for those of the other dialects."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.exchange import Dialect, End, Observation
    from sidecar.observe import event_stream, sse, tap

BOUND = 1024  # so low that an input of a few kilobytes goes past it
sse.MAX_EVENT_BYTES = tap.MAX_JSON_BYTES = event_stream.MAX_MESSAGE_BYTES = BOUND
sse._MAX_PENDING = BOUND + 5
sse.TAIL_BYTES = 128


def unchecked(data: object, value: int = 0, /) -> int:
    """Stand in for the checksum: no fuzzer guesses one. That it is checked the tests show."""
    return 0


event_stream.crc32 = unchecked  # type: ignore[attr-defined]

DIALECTS = (
    Dialect.OPENAI_CHAT,
    Dialect.OPENAI_RESPONSES,
    Dialect.BEDROCK_INVOKE,
    Dialect.BEDROCK_CONVERSE,
)
TYPES = (b"application/json", tap.STREAM_TYPE, tap.MESSAGES_TYPE, b"")


def observe(dialect: Dialect, chunks: list[bytes], kind: bytes, end: End) -> Observation:
    reader = tap.tap_for(dialect, 200, [(b"content-type", kind)])
    for chunk in chunks:
        reader.feed(chunk)
        if isinstance(reader, tap._MessagesReader):
            assert len(reader._messages._pending) <= BOUND
    return reader.finish(end)


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    dialect, kind = DIALECTS[control & 3], TYPES[control >> 2 & 3]
    end = list(End)[(control >> 4) % 3]
    whole = observe(dialect, [body], kind, end)
    split = observe(dialect, pieces(body, control >> 6), kind, end)
    assert whole == split, (whole, split)
    assert min(whole.usage.input_classes()) >= 0


if __name__ == "__main__":
    start(one_input)
