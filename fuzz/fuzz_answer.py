"""An answer to a handshake is what a strict reader makes of the same bytes, for any split."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start
from fuzz.reference import read_final_head, read_response_body

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.errors import UpstreamError
    from sidecar.proxy.handshake import Answer

Read = tuple[int, list[tuple[bytes, bytes]], bytes, bytes, bool]


def answer(chunks: list[bytes], eof: bool) -> Read | None:
    reader = Answer()
    body = behind = b""
    try:
        for chunk in filter(None, chunks):
            behind += chunk if reader.status_code == 101 else reader.feed(chunk)
            body += reader.take_body()
    except UpstreamError:
        return None
    if eof and reader.status_code != 101:
        reader.feed_eof()
    headers = [(name, value.strip(b" \t")) for name, value in reader.headers]
    return reader.status_code, headers if reader.status_code else [], body, behind, reader.complete


def one_input(data: bytes) -> None:
    data, control = controlled(data)
    eof = bool(control & 1)
    whole, split = answer([data], eof), answer(pieces(data, control >> 1), eof)
    assert whole == split, (whole, split)
    if whole is None or not whole[0]:
        return
    head = read_final_head(data)
    assert head is not None
    assert (b"%d" % whole[0], whole[1]) == (head.line[1], head.headers)
    if whole[0] == 101:
        assert whole[3] == head.rest
        return
    body = read_response_body(head, head_only=False, eof=eof)
    assert (whole[2], whole[4]) == (body or (None, None))[:2], (whole, body)


if __name__ == "__main__":
    start(one_input)
