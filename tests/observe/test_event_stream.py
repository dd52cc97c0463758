"""The framing of AWS event streams, its bounds, and the parser of the AWS SDK as an oracle."""

from __future__ import annotations

import json
import random
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from sidecar.observe import event_stream
from sidecar.observe.event_stream import MAX_MESSAGE_BYTES, Message, MessageReader
from tests.support.bodies import cuts, frame
from tests.support.litellm import VERSIONS, find_litellm
from tests.support.requirements import require, require_corpus

# A value of every type of header, as they stand on the wire.
TYPES = {
    "true": b"\x00",
    "false": b"\x01",
    "byte": b"\x02\x7f",
    "short": b"\x03\x00\x07",
    "integer": b"\x04" + bytes(4),
    "long": b"\x05" + bytes(8),
    "bytes": b"\x06\x00\x03abc",
    "timestamp": b"\x08" + bytes(8),
    "uuid": b"\x09" + bytes(16),
}


def read(*chunks: bytes) -> tuple[list[Message], MessageReader]:
    """Read a stream that comes in these chunks."""
    reader = MessageReader()
    return [message for chunk in chunks for message in reader.feed(chunk)], reader


def test_headers_of_all_types_are_passed_over() -> None:
    """Those that are strings come out."""
    body = frame({":event-type": "chunk", **TYPES, "last": "é"}, b"payload")
    found, reader = read(body)
    assert found == [Message({b":event-type": b"chunk", b"last": "é".encode()}, b"payload")]
    assert not reader.fault


def test_long_headers_are_read() -> None:
    """Those of one message, which no other has."""
    found, reader = read(frame({":event-type": "chunk", "long": "x" * 300}, b"payload"))
    assert found == [Message({b":event-type": b"chunk", b"long": b"x" * 300}, b"payload")]
    assert not reader.fault


def test_any_split_gives_the_same_messages() -> None:
    """Whole, byte by byte, and at random."""
    body = b"".join(frame({":event-type": f"e{n}", **TYPES}, b"x" * n) for n in (0, 1, 500, 3))
    whole, _ = read(body)
    assert [len(message.payload) for message in whole] == [0, 1, 500, 3]
    for chunks in cuts(body, seed=1):
        assert read(*chunks)[0] == whole


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        (0, "the checksum of a message's lengths is wrong"),
        (9, "the checksum of a message's lengths is wrong"),
        (14, "the checksum of a message is wrong"),
        (-6, "the checksum of a message is wrong"),
        (-1, "the checksum of a message is wrong"),
    ],
)
def test_damaged_message_ends_the_reading(place: int, fault: str) -> None:
    """Behind it nobody can say where a message begins."""
    sound = frame({":event-type": "chunk"}, b"payload")
    damaged = bytearray(sound)
    damaged[place] ^= 1
    found, reader = read(sound + bytes(damaged) + sound, sound)
    assert len(found) == 1
    assert reader.fault == fault
    for chunks in cuts(sound + bytes(damaged) + sound, seed=2):
        split, reader = read(*chunks)
        assert (split, reader.fault) == (found, fault)


@pytest.mark.parametrize(
    "value", [b"\x0a", b"\x07\x00\x09abc", b"\x06", b"\x04\x00", b"\x07\xff\xff"]
)
def test_headers_that_cannot_be_read(value: bytes) -> None:
    """A type that there is not, or a value that is longer than the headers."""
    found, reader = read(frame({"x": value}))
    assert (found, reader.fault) == ([], "a message's headers cannot be read")


def test_headers_longer_than_their_message() -> None:
    """Lengths that contradict one another, with the right checksum."""
    from struct import pack
    from zlib import crc32

    for lengths in (pack("!II", 20, 5), pack("!II", 15, 0), pack("!II", 0, 0)):
        _, reader = read(lengths + pack("!I", crc32(lengths)) + bytes(8))
        assert reader.fault == "a message's headers are longer than the message"


def test_long_message_is_skipped_within_bounded_memory() -> None:
    """It is noted, and the next one is read."""
    small = frame({":event-type": "metadata"}, b"{}")
    largest = frame({}, b"x" * (MAX_MESSAGE_BYTES - 16))
    assert len(largest) == MAX_MESSAGE_BYTES
    found, reader = read(largest + small)
    assert (len(found), reader.oversized) == (2, False)
    huge = frame({}, b"x" * (8 * MAX_MESSAGE_BYTES))
    body = small + huge + small
    for size in (65536, len(body)):
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        found, reader = read(*chunks)
        assert (len(found), reader.oversized, reader.fault) == (2, True, "")
    tracemalloc.start()
    reader = MessageReader()
    for at in range(0, len(huge), 4096):
        reader.feed(huge[at : at + 4096])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024


def test_damage_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 damaged streams: no exception, and every split says the same."""
    monkeypatch.setattr(event_stream, "MAX_MESSAGE_BYTES", 300)
    dice = random.Random(20261124)
    sound = b"".join(frame({":event-type": "chunk", **TYPES}, b"x" * n) for n in (3, 400, 20))
    for _ in range(10_000):
        damaged = bytearray(sound)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(damaged))
            if dice.random() < 0.5:
                damaged[at] = dice.randrange(256)
            else:
                del damaged[at : at + dice.randint(1, 30)]
        cut = dice.randrange(len(damaged) + 1)
        found, reader = read(bytes(damaged))
        split, other = read(bytes(damaged[:cut]), bytes(damaged[cut:]))
        assert (found, reader.fault) == (split, other.fault)


_ORACLE = """
import json, sys
from botocore.eventstream import EventStreamBuffer
for path in sys.stdin.read().splitlines():
    buffer = EventStreamBuffer()
    with open(path, "rb") as body:
        buffer.add_data(body.read())
    print(json.dumps([[m.headers[":message-type"], m.payload.hex()] for m in buffer]))
"""


def test_recorded_streams_are_cut_as_the_aws_sdk_does() -> None:
    """All recorded streams: the same messages as `botocore` finds, which LiteLLM brings."""
    program = require(find_litellm(VERSIONS[-1]), "LiteLLM")
    paths = sorted(Path(require_corpus()).glob("*/*.eventstream"))
    assert len(paths) == 51
    answer = subprocess.run(
        [str(program.with_name("python")), "-c", _ORACLE],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for path, line in zip(paths, answer.stdout.splitlines(), strict=True):
        found, reader = read(path.read_bytes())
        said = [[m.headers[b":message-type"].decode(), m.payload.hex()] for m in found]
        assert said == json.loads(line), path
        assert not reader.fault
