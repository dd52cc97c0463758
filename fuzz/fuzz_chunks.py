"""A request's body in chunks is what a strict reader reads, and ends where that says it does."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start
from fuzz.reference import Body, Head, read_body

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.proxy.head import RefusedError, parse_head

CODING = (b"transfer-encoding", b"chunked")
HEAD = b"POST / HTTP/1.1\r\nhost: a\r\n%b: %b\r\n\r\n" % CODING


def read(chunks: list[bytes]) -> Body | None:
    """Read as the edge does; None where it refuses."""
    request = parse_head(HEAD)
    content, rest = b"", b"".join(chunks)
    for chunk in chunks:
        try:
            fed = request.feed_chunks(chunk, 65536)
        except RefusedError:
            return None
        content, rest = content + request.take(), rest[fed:]
        if request.complete:
            return Body(content, True, rest)
        assert fed == len(chunk)
    return Body(content, False, b"")


def one_input(data: bytes) -> None:
    data, control = controlled(data)
    whole, split = read([data]), read(pieces(data, control))
    assert whole == split, (whole, split)
    strict = read_body(Head([], [CODING], data))
    if whole is None:
        return
    if whole.complete:
        assert whole == strict, (whole, strict)
    else:
        assert strict is None or strict.content.startswith(whole.content), (whole, strict)


if __name__ == "__main__":
    start(one_input)
