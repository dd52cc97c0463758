"""A WebSocket's handshake that is taken is what a strict reader reads, and h11 once passed on."""

from __future__ import annotations

import re

import atheris

from fuzz.harness import controlled, start
from fuzz.reference import h11_requests, read_head

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.proxy import handshake
    from sidecar.proxy.head import HEAD_END, RefusedError, parse_head
    from sidecar.proxy.headers import ForwardedRule, request_headers

LINE = re.compile(rb"(GET) (?:[A-Za-z][\w+.-]*://[^/?#\s]*)?([!-~]*) (HTTP/1\.1)")
RULE = ForwardedRule(())


def one_input(data: bytes) -> None:
    data, _ = controlled(data)
    end = data.find(HEAD_END) + len(HEAD_END)
    try:
        # As the edge does, which keeps all others to itself.
        if not parse_head(data[:end]).websocket:
            return
    except RefusedError:
        return
    request = handshake.Request(data)
    if request.refusal is not None:
        return
    head = read_head(data, LINE)
    assert head is not None
    assert request.behind == head.rest
    target = head.line[1] if head.line[1].startswith(b"/") else b"/" + head.line[1]
    plain = [(name, value.strip(b" \t")) for name, value in request.headers]
    assert (request.target, plain) == (target, head.headers)
    headers = request_headers(request.headers, RULE, "10.0.0.1", "http", upgrade=True)
    assert h11_requests(b"GET", target, headers, b"") == [(b"GET", target, b"")]


if __name__ == "__main__":
    start(one_input)
