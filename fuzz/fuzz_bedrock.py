"""Bedrock's answers are the same whole and split, raise nothing, and stay bounded; of a sound
event stream every message comes out that is within the bound."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from zlib import crc32

from fuzz.harness import controlled, pieces, start
from fuzz.taps import BOUND, ENDS, JSON, MESSAGES, hold_to_contract
from sidecar.exchange import Dialect
from sidecar.observe.event_stream import MessageReader

TYPES = (b"contentBlockDelta", b"messageStop", b"metadata", b"chunk")


def frame(kind: bytes, payload: bytes) -> bytes:
    """Write a message; an exception for an empty kind."""
    said = [(b":message-type", b"event" if kind else b"exception"), (b":event-type", kind)]
    headers = b"".join(
        struct.pack(">B", len(name)) + name + b"\x07" + struct.pack(">H", len(value)) + value
        for name, value in said
    )
    message = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message += struct.pack(">I", crc32(message)) + headers + payload
    return message + struct.pack(">I", crc32(message))


def messages(text: bytes, *, wrapped: bool) -> Iterator[tuple[bytes, bytes]]:
    """Make messages of lines, whose first byte chooses their kind: their checksums cannot be
    guessed.

    Args:
        wrapped: whether the payload is an event in Base64, as in invocations.
    """
    for line in text.split(b"\n"):
        kind, payload = line[:1], line[1:]
        if wrapped and kind != b"=":
            payload = b'{"bytes":"%b"}' % base64.b64encode(payload)
        yield TYPES[kind[0] % 4] if kind and kind != b"!" else b"", payload


def one_input(data: bytes) -> None:
    text, control = controlled(data)
    wrapped = bool(control & 1)
    dialect = Dialect.BEDROCK_INVOKE if wrapped else Dialect.BEDROCK_CONVERSE
    end, seed = ENDS[(control >> 4) % 3], control >> 6
    shape = control >> 1 & 7
    if shape < 2:  # as it is
        return hold_to_contract(dialect, MESSAGES if shape else JSON, text, end, seed)
    sent = list(messages(text, wrapped=wrapped))
    frames = [frame(*message) for message in sent]
    body = b"".join(frames)
    if shape == 2:  # damaged
        at = seed % len(body)
        body = body[:at] + bytes([body[at] ^ 1 << seed % 8]) + body[at + 1 :]
    else:
        reader = MessageReader()
        read = [message for piece in pieces(body, seed) for message in reader.feed(piece)]
        fit = [
            (kind, payload)
            for (kind, payload), whole in zip(sent, frames, strict=True)
            if len(whole) <= BOUND
        ]
        assert [(each.headers[b":event-type"], each.payload) for each in read] == fit
        assert (reader.fault, reader.oversized) == ("", len(fit) < len(sent))
    return hold_to_contract(dialect, MESSAGES, body, end, seed)


if __name__ == "__main__":
    start(one_input)
