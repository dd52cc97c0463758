"""A response that is taken is what a strict reader makes of the same bytes, for any split."""

from __future__ import annotations

from typing import Any, cast

import atheris

from fuzz.harness import Wire, controlled, pieces, start
from fuzz.reference import read_final_head, read_response_body

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.proxy.transport import Timeouts, UpstreamResponse


def read(chunks: list[bytes], method: str, eof: bool) -> tuple[UpstreamResponse, bytes, bool]:
    wire, body = cast("Any", Wire()), b""
    response = UpstreamResponse(wire, method, Timeouts())
    response.sent()
    for chunk in filter(None, chunks):
        if not wire.over:
            response.feed(chunk)
            body += response.take()
    if eof and not wire.over:
        response.eof()
    return response, body, wire.over == "kept"


def one_input(data: bytes) -> None:
    data, control = controlled(data)
    method, eof = "HEAD" if control % 8 == 7 else "GET", bool(control & 8)
    whole, head = read([data], method, eof), read_final_head(data)
    strict = head and read_response_body(head, head_only=method == "HEAD", eof=eof)
    for response, taken, kept in (whole, read(pieces(data, control >> 4), method, eof)):
        assert (response.status_code, response.ended) == (whole[0].status_code, whole[0].ended)
        if not response.status_code:
            continue
        assert head
        headers = [(name, value.strip(b" \t")) for name, value in response.headers]
        assert (b"%d" % response.status_code, headers) == (head.line[1], head.headers)
        if response.ended:
            assert (strict or ())[:2] == (taken, True)
            # What is behind would answer the next request.
            assert response is not whole[0] or not (kept and strict and strict.rest.strip(b"\r\n"))
        else:
            assert strict is None or strict.content.startswith(taken), (strict, taken)


if __name__ == "__main__":
    start(one_input)
