"""Content codings, on a copy and within bounds."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard

from sidecar.exchange import End, Status
from sidecar.observe.decoding import (
    STEP_BYTES,
    DecodingError,
    ExpansionError,
    codings_of,
    decoder_for,
)
from tests.support.bodies import SSE, cuts, observe, stream

TEXT = stream({"input_tokens": 7}, {"output_tokens": 3}, text=[str(i) for i in range(500)])


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


CODINGS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"gzip", gzip.compress),
    (b"x-gzip", gzip.compress),
    (b"deflate", zlib.compress),
    (b"deflate", _raw_deflate),
    (b"br", brotli.compress),
    (b"zstd", zstandard.ZstdCompressor().compress),
]
IDS = ["gzip", "x-gzip", "deflate", "raw deflate", "br", "zstd"]


def decode(coding: bytes, chunks: list[bytes]) -> bytes:
    decoder = decoder_for(coding)
    assert decoder is not None
    text = b"".join(piece for chunk in chunks for piece in decoder.feed(chunk))
    assert decoder.complete
    return text


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=IDS)
def test_every_coding_in_every_cut(coding: bytes, encode: Callable[[bytes], bytes]) -> None:
    """What was coded comes out again, however it is cut."""
    coded = encode(TEXT)
    assert decode(coding, [coded]) == TEXT
    for chunks in cuts(coded, seed=4):
        assert decode(coding, chunks) == TEXT


@pytest.mark.parametrize("coding", [b"gzip", b"zstd"])
def test_several_members_are_one_body(coding: bytes) -> None:
    """A gzip body may have several members, a zstd body several frames."""
    encode = dict(CODINGS)[coding]
    coded = encode(TEXT[:500]) + encode(TEXT[500:])
    assert decode(coding, [coded]) == TEXT
    assert decode(coding, [coded[i : i + 1] for i in range(len(coded))]) == TEXT


def test_padding_after_the_end_of_gzip_is_ignored() -> None:
    """Zero bytes after a gzip member, and anything after those, are no fault."""
    coded = gzip.compress(TEXT) + b"\0\0\0" + gzip.compress(TEXT)
    assert decode(b"gzip", [coded]) == TEXT
    for chunks in cuts(coded, seed=6):
        assert decode(b"gzip", chunks) == TEXT


def test_more_after_the_end_of_brotli_is_a_fault() -> None:
    """In the same chunk or in another: the library refuses it where it sees it."""
    for chunks in ([brotli.compress(TEXT) + b"more"], [brotli.compress(TEXT), b"more"]):
        with pytest.raises(DecodingError):
            decode(b"br", chunks)


def test_zstd_frame_that_lies_is_one_in_every_cut() -> None:
    """The library checks the size that a frame announces only where it has all of the frame."""
    coded = b"\x28\xb5\x2f\xfd\x60\x00\x00\x01\x00\x00"  # 256 bytes announced, none there
    assert decode(b"zstd", [coded]) == b""
    assert decode(b"zstd", [coded[at : at + 1] for at in range(len(coded))]) == b""


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=IDS)
def test_bomb_with_ballast_is_a_bomb_in_every_cut(
    coding: bytes, encode: Callable[[bytes], bytes]
) -> None:
    """What follows a bomb does not make it one of a lower ratio, nor where chunks end."""
    ballast = random.Random(8).randbytes(100_000)
    coded = encode(b"\0" * 8_000_000 + ballast)
    given = []
    for chunks in ([coded], *cuts(coded, seed=7)):
        decoder = decoder_for(coding)
        assert decoder is not None
        out = b""
        with pytest.raises(ExpansionError):  # noqa: PT012 - what was given out before counts
            for chunk in chunks:
                for piece in decoder.feed(chunk):
                    out += piece
        given.append(out)
    assert len(set(given)) == 1


def test_last_piece_may_wait_for_no_more_input() -> None:
    """What one piece has no room for comes out although no byte of input is left."""
    text = b"\0" * 70_000
    coded = gzip.compress(text)
    for at in range(len(coded)):
        assert decode(b"gzip", [coded[:at], coded[at:]]) == text


@pytest.mark.parametrize(
    ("values", "codings"),
    [
        ([], b""),
        ([b""], b""),
        ([b" Identity "], b""),
        ([b"GZIP"], b"gzip"),
        ([b"identity, ,gzip,"], b"gzip"),
        ([b"gzip, br"], b"gzip, br"),
        ([b"gzip", b"br"], b"gzip, br"),
        ([b"identity", b"zstd"], b"zstd"),
    ],
)
def test_codings_are_a_list(values: list[bytes], codings: bytes) -> None:
    """Case, blanks, empty members and repeats of the header are the list's own affair."""
    headers = [(b"content-encoding", value) for value in values]
    assert codings_of([(b"x", b"y"), *headers]) == codings


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=IDS)
@pytest.mark.parametrize("size", [60_000, 65_536, 70_000, 200_000])
def test_what_comes_in_one_piece_is_decoded_to_its_end(
    coding: bytes, encode: Callable[[bytes], bytes], size: int
) -> None:
    """Nothing of it waits for a next piece, of which there is none."""
    body = b" " * size + TEXT
    assert decode(coding, [encode(body)]) == body


@pytest.mark.parametrize("coding", [b"compress", b"gzip, br", b"aws-chunked", b"x" * 500])
def test_other_codings_are_named(coding: bytes) -> None:
    """What is not decoded has a status of its own."""
    assert decoder_for(coding) is None
    seen = observe(TEXT, [*SSE, (b"content-encoding", coding)])
    assert seen.status is Status.ENCODED
    assert len(seen.fault) < 200


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=IDS)
def test_damaged_body_is_invalid_and_keeps_what_was_read(
    coding: bytes, encode: Callable[[bytes], bytes]
) -> None:
    """Garbage is a fault of its own, and does not undo what came before."""
    decoder = decoder_for(coding)
    assert decoder is not None
    with pytest.raises(DecodingError):
        list(decoder.feed(b"\x07\xff" * 2048))
    headers = [*SSE, (b"content-encoding", coding)]
    dice = random.Random(5)
    damaged = bytearray(encode(TEXT))
    for _ in range(20):
        damaged[dice.randrange(len(damaged) // 2, len(damaged))] ^= 0xFF
    assert observe(bytes(damaged), headers).status in (Status.INVALID, Status.PARTIAL)


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=IDS)
def test_coded_stream_that_is_cut_is_partial(
    coding: bytes, encode: Callable[[bytes], bytes]
) -> None:
    """A coded body that stops before its end is cut, also when the framing says otherwise."""
    seen = observe(encode(TEXT)[:-40], [*SSE, (b"content-encoding", coding)], end=End.COMPLETE)
    assert seen.status is Status.PARTIAL


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=IDS)
def test_bombs_are_refused_within_bounds(coding: bytes, encode: Callable[[bytes], bytes]) -> None:
    """A body that expands beyond reason is given up early, and in little memory."""
    bomb = encode(b"\0" * (64 * 1024 * 1024))
    decoder = decoder_for(coding)
    assert decoder is not None
    tracemalloc.start()
    pieces = map(len, decoder.feed(bomb[: 64 * 1024]))
    size = 0
    with pytest.raises(ExpansionError):  # noqa: PT012 - what was given out before counts
        while True:
            size += next(pieces)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size <= 100 * (min(len(bomb), 64 * 1024) + STEP_BYTES) + 1024 * 1024
    assert peak < 8 * 1024 * 1024
    assert observe(bomb[:65536], [*SSE, (b"content-encoding", coding)]).status is Status.OVERSIZED
