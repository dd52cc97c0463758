"""Rewriting only adds: without what was put in, the bytes are those that came, for any split."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start
from tests.support.bodies import without_additions

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.exchange import Rewrite
    from sidecar.observe import rewrite

BOUND = 512  # so low that an input of a few kilobytes goes past it
vars(rewrite).update(MAX_EVENT_BYTES=BOUND, MAX_JSON_BYTES=BOUND)
TYPES = (b"application/json", b"text/event-stream")


def rewritten(chunks: list[bytes], content_type: bytes, full: bool) -> tuple[bytes, Rewrite]:
    transformer = rewrite.transformer_for([(b"content-type", content_type)], full=full)
    assert not isinstance(transformer, Rewrite)
    out = b""
    for chunk in chunks:
        out += transformer.feed(chunk)
        assert len(transformer.held) <= BOUND + len(chunk)
    return out + transformer.finish(), transformer.result


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    content_type, full = TYPES[control & 1], bool(control & 2)
    whole = rewritten([body], content_type, full)
    split = rewritten(pieces(body, control >> 2), content_type, full)
    assert whole == split, (whole, split)
    assert without_additions(whole[0], body) == body, whole
    assert whole[0] == body or whole[1] in (
        Rewrite.REWRITTEN,
        Rewrite.OVERSIZED,
        Rewrite.UNREADABLE,
    )


if __name__ == "__main__":
    start(one_input)
