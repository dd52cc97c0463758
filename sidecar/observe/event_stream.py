"""Cutting AWS event streams into messages, their checksums checked.

What this module knows is the framing that the AWS SDKs call the event-stream encoding
(https://smithy.io/2.0/aws/amazon-eventstream.html): a prelude of two lengths and their CRC-32,
headers, a payload, and a CRC-32 of all of it. What it must not know is what any message means.

Why not `botocore`'s parser: it comes with 30 MB of service definitions, takes messages of 16 MB,
and copies the rest of its buffer behind each message, which costs the square of a chunk's size.
The tests hold this reader against it.

The contract: bytes in by `feed`, messages out; any split of the same bytes gives the same
messages; the work is linear; at most `MAX_MESSAGE_BYTES` and one chunk are held; nothing raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from struct import Struct
from typing import NamedTuple
from zlib import crc32

__all__ = ["MAX_MESSAGE_BYTES", "Message", "MessageReader"]

MAX_MESSAGE_BYTES = 1024 * 1024
"""Longest message that is read, in bytes; that of an event in text streams. A longer one is
skipped and noted, and reading goes on behind it."""

_PRELUDE = Struct("!III")
"""Length of the message, length of its headers, CRC of both."""
_CRC = Struct("!I")
_LEAST_BYTES = _PRELUDE.size + _CRC.size
_STRING = 7
_SHORT_HEADERS_BYTES = 256
# Sizes of the other types' values; None for those that say it themselves.
_SIZES: Mapping[int, int | None] = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 6: None, 8: 8, 9: 16}


class Message(NamedTuple):
    """One message of the stream."""

    headers: Mapping[bytes, bytes]
    """Those that are strings."""
    payload: bytes


class MessageReader:
    """Cuts an event stream into messages."""

    __slots__ = ("_needed", "_pending", "_skip", "fault", "oversized")

    def __init__(self) -> None:
        self._pending = bytearray()
        self._needed = _PRELUDE.size
        """How many bytes have to be there before anything can be said."""
        self._skip = 0
        self.oversized = False
        """Whether a message was longer than the bound, and therefore skipped."""
        self.fault = ""
        """What is wrong with the framing, in words; behind it nothing can be read."""

    def feed(self, chunk: bytes) -> list[Message]:
        """Return the messages that end in this chunk."""
        if self.fault:
            return []
        if self._skip:
            skipped = min(self._skip, len(chunk))
            self._skip -= skipped
            chunk = chunk[skipped:]
        data = chunk
        if self._pending or len(chunk) < self._needed:
            self._pending += chunk
            if len(self._pending) < self._needed:
                return []
            data = bytes(self._pending)
            self._pending.clear()
        found: list[Message] = []
        rest = self._take(data, found)
        if not self.fault:
            self._pending += data[rest:]
        return found

    def _take(self, data: bytes, found: list[Message]) -> int:
        """Take all whole messages, and say where the rest begins."""
        at = 0
        while True:
            self._needed = _PRELUDE.size
            if len(data) - at < _PRELUDE.size:
                return at
            length, headers_length, checksum = _PRELUDE.unpack_from(data, at)
            if crc32(data[at : at + 8]) != checksum:
                self.fault = "the checksum of a message's lengths is wrong"
                return at
            if headers_length > length - _LEAST_BYTES:
                self.fault = "a message's headers are longer than the message"
                return at
            end = at + length
            if length > MAX_MESSAGE_BYTES:
                self.oversized = True
                self._skip = max(0, end - len(data))
                at = min(end, len(data))
                continue
            if end > len(data):
                self._needed = length
                return at
            body_end = end - _CRC.size
            if crc32(data[at:body_end]) != _CRC.unpack_from(data, body_end)[0]:
                self.fault = "the checksum of a message is wrong"
                return at
            payload_at = at + _PRELUDE.size + headers_length
            try:
                headers = _headers_of(data[at + _PRELUDE.size : payload_at])
            except (IndexError, KeyError, ValueError):
                self.fault = "a message's headers cannot be read"
                return at
            found.append(Message(headers, data[payload_at:body_end]))
            at = end


def _headers_of(block: bytes) -> Mapping[bytes, bytes]:
    """Read a message's headers. Raises what `_headers` raises."""
    return _same_headers(block) if len(block) <= _SHORT_HEADERS_BYTES else dict(_headers(block))


@lru_cache(maxsize=64)
def _same_headers(block: bytes) -> Mapping[bytes, bytes]:
    # Of all messages of a kind they are the same.
    return dict(_headers(block))


def _headers(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers that are strings.

    Raises:
        IndexError, KeyError, ValueError: they are not what they should be.
    """
    at = 0
    while at < len(block):
        name_end = at + 1 + block[at]
        name = block[at + 1 : name_end]
        kind = block[name_end]
        at = name_end + 1
        size = None if kind == _STRING else _SIZES[kind]
        if size is None:
            size = int.from_bytes(block[at : at + 2])
            at += 2
        value = block[at : at + size]
        at += size
        if at > len(block):
            raise ValueError
        if kind == _STRING:
            yield name, value
