"""What one end of a connection does, step by step, on a raw socket.

The two ends of a play, a client and an upstream, are written in the same steps. What an end has
seen is in its `Side`, by which the other can wait for it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.running import until

__all__ = [
    "Close",
    "Drip",
    "Flood",
    "HalfClose",
    "Pause",
    "Read",
    "Reset",
    "Seen",
    "Send",
    "Side",
    "Stall",
    "Step",
    "Take",
    "Wait",
    "close",
    "receive",
    "take_step",
]

TOKEN = b"@@@@@@"
"""Stands in a script where the name of the play goes, which is as long."""

_BLOCKED_S = 0.3
_POLL_S = 0.002
_RECEIVE_BYTES = 1 << 18
_WAIT_S = 20.0
_NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Send:
    """Send bytes; those that take time to make are made when they are needed."""

    data: bytes | Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Drip:
    """Send bytes one by one."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Flood:
    """Send the same bytes again and again, until the other end takes no more of them."""

    piece: bytes
    at_most: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Seen:
    """Wait until the far end has so much: bytes of a body, or just a head (0)."""

    body_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until the far end has done all that it does."""


@dataclass(frozen=True, slots=True)
class Read:
    """As a client, read one answer to its end; as an upstream, the rest of the request."""


@dataclass(frozen=True, slots=True)
class Take:
    """As a client, read an answer until there are so many bytes of its body, or a head (0)."""

    body_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """Do nothing until the other end closes."""


@dataclass(frozen=True, slots=True)
class HalfClose:
    """Close the sending side."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Close with a reset."""


Step = Send | Drip | Flood | Pause | Seen | Wait | Read | Take | Stall | HalfClose | Close | Reset


@dataclass(slots=True)
class Side:
    """What one end of a play has seen so far."""

    head: bytes = b""
    body_bytes: int = 0
    whole: bool = False
    """Whether the message that it reads has come to its end."""
    done: bool = False
    """Whether its script has."""


async def take_step(step: Step, connection: socket.socket, name: bytes, far: Side) -> bool:
    """Take a step that is the same for both ends.

    Args:
        name: of the play.
        far: what the other end of the play has seen.

    Returns:
        Whether the connection is still open.

    Raises:
        OSError: it is not, and that was the other end's doing.
    """
    loop = asyncio.get_running_loop()
    match step:
        case Send(data):
            raw = data if isinstance(data, bytes) else data()
            await loop.sock_sendall(connection, raw.replace(TOKEN, name) if name else raw)
        case Drip(data):
            for byte in data.replace(TOKEN, name):
                await loop.sock_sendall(connection, bytes([byte]))
                await asyncio.sleep(0)
        case Flood(piece, at_most):
            await _flood(connection, piece, at_most)
        case Pause(seconds):
            await asyncio.sleep(seconds)
        case Seen(body_bytes):
            await until(lambda: bool(far.head) and far.body_bytes >= body_bytes, _WAIT_S)
        case Wait():
            await until(lambda: far.done, _WAIT_S)
        case Stall():
            while await receive(connection):
                pass
        case HalfClose():
            connection.shutdown(socket.SHUT_WR)
        case Close():
            close(connection)
            return False
        case Reset():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            close(connection)
            return False
        case Read() | Take():
            raise AssertionError("each end reads in a way of its own")
    return True


async def receive(connection: socket.socket) -> bytes:
    """Wait for bytes; empty at the end of the connection.

    Raises:
        OSError: it was reset.
    """
    async with asyncio.timeout(_WAIT_S):
        return await asyncio.get_running_loop().sock_recv(connection, _RECEIVE_BYTES)


def close(connection: socket.socket) -> None:
    """Close; a second time does nothing."""
    if connection.fileno() >= 0:
        connection.close()


async def _flood(connection: socket.socket, piece: bytes, at_most: int) -> None:
    loop = asyncio.get_running_loop()
    sent, progress_at = 0, loop.time()
    view = memoryview(piece)
    while sent < at_most and loop.time() - progress_at < _BLOCKED_S:
        try:
            sent += connection.send(view[sent % len(piece) :])
            progress_at = loop.time()
            await asyncio.sleep(0)
        except BlockingIOError:
            await asyncio.sleep(_POLL_S)
