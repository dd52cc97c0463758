"""Decoding raises nothing but DecodingError, keeps to its expansion, and is one for any split."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.observe import decoding

# So low that an input of a few kilobytes goes past them.
decoding._FREE_BYTES = 4096
decoding.STEP_BYTES = decoding._ZSTD_STEP_BYTES = 64
CODINGS = (b"gzip", b"deflate", b"br", b"zstd")


def decode(coding: bytes, chunks: list[bytes]) -> tuple[bytes, str, bool]:
    """Return what came out, how it ended, and whether it was whole."""
    decoder = decoding.decoder_for(coding)
    assert decoder is not None
    out, taken = b"", 0
    try:
        for chunk in chunks:
            taken += len(chunk)
            for piece in decoder.feed(chunk):
                assert len(piece) <= decoding.PIECE_BYTES
                out += piece
                granted = decoding.MAX_EXPANSION * (taken + decoding.STEP_BYTES)
                assert len(out) <= granted + decoding._FREE_BYTES
    except decoding.DecodingError as error:
        return out, type(error).__name__, False
    return out, "", decoder.complete


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    coding = CODINGS[control & 3]
    whole = decode(coding, [body])
    split = decode(coding, pieces(body, control >> 2))
    if "DecodingError" in (whole[1], split[1]):
        # What a damaged body gave before the fault depends on how it is cut.
        assert "" not in (whole[1], split[1]), (whole[1:], split[1:])
        assert split[0].startswith(whole[0]) or whole[0].startswith(split[0])
    else:
        assert whole == split, (whole[1:], split[1:], len(whole[0]), len(split[0]))


if __name__ == "__main__":
    start(one_input)
