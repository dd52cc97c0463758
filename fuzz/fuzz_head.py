"""A request that is taken is what a strict reader reads, and what h11 reads once passed on."""

from __future__ import annotations

import re

import atheris

from fuzz.harness import controlled, pieces, start
from fuzz.reference import h11_requests, read_body, read_head

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.proxy.head import HEAD_END, RefusedError, may_become_a_head, parse_head
    from sidecar.proxy.headers import ForwardedRule, request_headers

LINE = re.compile(rb"([A-Z-]+) (?:[A-Za-z][\w+.-]*://[^/?#\s]+)?([!-~]*) (HTTP/1\.[01])")
RULE = ForwardedRule(())


def one_input(data: bytes) -> None:
    data, control = controlled(data.lstrip(b"\r\n"))
    end = data.find(HEAD_END) + len(HEAD_END)
    received, possible = bytearray(), True
    for piece in pieces(data[:end], control):
        received += piece
        possible &= not received or may_become_a_head(received, max(0, len(received) - 512))
    try:
        request = parse_head(data[:end])
    except RefusedError:
        return
    assert possible  # else a request is refused that comes in pieces, and taken whole
    head = read_head(data, LINE)
    assert head is not None
    method, target, _ = head.line
    target = target if target.startswith((b"/", b"*")) else b"/" + target
    meant = [pair for pair in head.headers if pair[0] != b"upgrade"]
    plain = [(name, value.strip(b" \t")) for name, value in request.headers]
    assert (request.method, request.target, plain) == (method, target, meant)
    content = b"" if request.complete else head.rest[: request.length]
    if request.complete or (request.length is not None and len(content) == request.length):
        assert read_body(head) == (content, True, head.rest[len(content) :])
    headers = request_headers(request.headers, RULE, "10.0.0.1", "http")
    if b"host" not in dict(headers):
        headers.append((b"host", b"upstream"))
    read = h11_requests(method, target, headers, content)
    assert read == [(method, target, content[: request.length])], read


if __name__ == "__main__":
    start(one_input)
