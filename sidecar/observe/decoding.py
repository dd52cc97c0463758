"""Decoding a copy of a coded body (RFC 9110 section 8.4), in bounded steps.

The client gets the coded bytes; only the tap sees what comes out here. A decoder takes input
in any split, hands back pieces of at most `PIECE_BYTES`, and stops with `ExpansionError` where
a body expands beyond `MAX_EXPANSION`: the work done for hostile input stays in proportion to
the bytes that came over the wire. Of a damaged body the libraries give more or less before the
fault, by how it was cut; that there is a fault they always say.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import brotli
import zstandard

from sidecar.exchange import RawHeaders

__all__ = ["DecodingError", "ExpansionError", "codings_of", "decoder_for"]

PIECE_BYTES = 64 * 1024
STEP_BYTES = 4 * 1024
"""Input is decoded in steps of so many bytes, counted from the body's first one, and each is
granted at its beginning what it may expand to: whether a body expands too far does not depend on
how it is cut."""
MAX_EXPANSION = 100
"""Bytes out for each byte in. Event streams of short deltas reach about 30 with brotli."""
_FREE_BYTES = 1024 * 1024
"""Expansion below this is never refused, whatever its ratio."""
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024
"""RFC 9659 has senders of the `zstd` coding keep to 8 MB, and receivers refuse more."""
_ZSTD_STEP_BYTES = 128
"""Each 4 bytes of input can be a block of 128 KiB (RFC 8878, RLE blocks), and the library's
push interface has no limit on its output: so its steps are short; their worst case is 4 MiB."""


class DecodingError(Exception):
    """The body is not in the coding that its header names."""


class ExpansionError(DecodingError):
    """The body expands beyond the bound."""


class Decoder(Protocol):
    """One content coding, as a push decoder."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield decoded pieces.

        Raises:
            DecodingError: if this raises anything else, that is a bug.
        """

    @property
    def complete(self) -> bool:
        """Whether the coded stream has ended where it says it ends."""


class _Budget:
    """Counts both sides of a decoder and refuses what expands too far."""

    __slots__ = ("_in", "_left", "_step_bytes")

    def __init__(self, step_bytes: int) -> None:
        self._step_bytes = step_bytes
        self._in = 0
        self._left = _FREE_BYTES + MAX_EXPANSION * step_bytes

    def steps(self, data: bytes) -> Iterator[bytes]:
        """Cut input into steps, or the parts of them that have come."""
        at = 0
        while at < len(data):
            begun = self._in % self._step_bytes
            if not begun and self._in:
                self._left += MAX_EXPANSION * self._step_bytes
            step = data[at : at + self._step_bytes - begun]
            self._in += len(step)
            at += len(step)
            yield step

    def give(self, piece: bytes) -> Iterator[bytes]:
        """Give output, as far as it is granted.

        Raises:
            ExpansionError: that is less than there is.
        """
        granted = piece[: self._left]
        self._left -= len(granted)
        yield granted
        if len(granted) < len(piece):
            raise ExpansionError(f"expands to more than {MAX_EXPANSION} times its size")


class _Zlib:
    """gzip (RFC 1952, several members too) and deflate, wrapped (RFC 1950) or raw (RFC 1951)."""

    def __init__(self, wbits: int | None) -> None:
        self._wbits = wbits
        self._inner = None if wbits is None else zlib.decompressobj(wbits)
        self._head = b""
        self._padded = False
        self._budget = _Budget(STEP_BYTES)

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._inner is None:
            self._head += data
            if len(self._head) < 2:
                return
            data, self._head = self._head, b""
            # A zlib header has method 8 and is a multiple of 31; raw deflate hardly ever is.
            wrapped = data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
            self._wbits = 15 if wrapped else -15
            self._inner = zlib.decompressobj(self._wbits)
        try:
            for step in self._budget.steps(data):
                yield from self._take(step)
        except zlib.error as exc:
            raise DecodingError(str(exc)) from None

    def _take(self, step: bytes) -> Iterator[bytes]:
        while step and not self._padded:
            assert self._inner is not None
            if self._inner.eof:
                if self._wbits != 31 or not step.startswith(b"\x1f"):
                    self._padded = True  # gzip tools ignore what follows, too
                    return
                self._inner = zlib.decompressobj(self._wbits)
            while piece := self._inner.decompress(step, PIECE_BYTES):
                yield from self._budget.give(piece)
                step = self._inner.unconsumed_tail
            step = self._inner.unused_data

    @property
    def complete(self) -> bool:
        return self._inner is not None and self._inner.eof


class _Brotli:
    """br (RFC 7932)."""

    def __init__(self) -> None:
        self._inner = brotli.Decompressor()
        self._budget = _Budget(STEP_BYTES)

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            for step in self._budget.steps(data):
                if self._inner.is_finished():
                    # As the library says where both are in one step.
                    raise DecodingError("there is more behind its end")
                piece = self._inner.process(step, output_buffer_limit=PIECE_BYTES)
                # That more data are accepted does not say that nothing is left of these.
                while piece or not self._inner.can_accept_more_data():
                    yield from self._budget.give(piece)
                    if self._inner.is_finished():
                        break
                    piece = self._inner.process(b"", output_buffer_limit=PIECE_BYTES)
        except brotli.error as exc:
            raise DecodingError(str(exc)) from None

    @property
    def complete(self) -> bool:
        return bool(self._inner.is_finished())


class _Zstd:
    """zstd (RFC 8878), several frames too."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._inner = self._context.decompressobj()
        self._fresh = True
        self._budget = _Budget(_ZSTD_STEP_BYTES)

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            for step in self._budget.steps(data):
                yield from self._take(step)
        except zstandard.ZstdError as exc:
            raise DecodingError(str(exc)) from None

    def _take(self, step: bytes) -> Iterator[bytes]:
        while step:
            if self._inner.eof:
                self._inner, self._fresh = self._context.decompressobj(), True
            # The library checks a frame that it is given whole in another way than one in pieces.
            end = 1 if self._fresh else len(step)
            self._fresh = False
            decoded = self._inner.decompress(step[:end])
            step = (self._inner.unused_data if self._inner.eof else b"") + step[end:]
            for at in range(0, len(decoded), PIECE_BYTES):
                yield from self._budget.give(decoded[at : at + PIECE_BYTES])

    @property
    def complete(self) -> bool:
        return bool(self._inner.eof)


_CODINGS: dict[bytes, Callable[[], Decoder]] = {
    b"gzip": lambda: _Zlib(31),
    b"x-gzip": lambda: _Zlib(31),  # RFC 9110 section 8.4.1.3
    b"deflate": lambda: _Zlib(None),
    b"br": _Brotli,
    b"zstd": _Zstd,
}


def codings_of(headers: RawHeaders) -> bytes:
    """Name the content codings that were applied, in order; empty for none.

    The header is a list (RFC 9110 section 8.4): it may come several times, with empty members.
    """
    values = [value for name, value in headers if name == b"content-encoding"]
    if not values:
        return b""
    names = (name.strip().lower() for name in b",".join(values).split(b","))
    return b", ".join(name for name in names if name not in (b"", b"identity"))


def decoder_for(codings: bytes) -> Decoder | None:
    """Make the decoder of a single coding.

    Args:
        codings: from `codings_of`, not empty.

    Returns:
        None where the coding is unknown, or where several were applied.
    """
    make = _CODINGS.get(codings)
    return make() if make else None
