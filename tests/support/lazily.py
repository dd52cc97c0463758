"""A sidecar under traffic in a process of its own, which says what that made it import.

`python -m tests.support.lazily` prints a JSON object: the modules by what was being done. Its
client and its upstream are bare sockets, so that nothing but the sidecar imports.
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib

from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.lifecycle import Lifecycle

USAGE = b'{"usage":{"input_tokens":7,"output_tokens":16}}'
REQUEST = b'{"model":"m","messages":[],"system":[{"cache_control":{"type":"ephemeral"}}]}'
ANSWERS = {
    b"json": (b"application/json", b"", USAGE),
    b"deflate": (b"application/json", b"content-encoding: deflate\r\n", zlib.compress(USAGE)),
    b"stream": (
        b"text/event-stream",
        b"",
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":1}}\n\n',
    ),
}
DATA = [b"POST /v1/messages?%b HTTP/1.1" % name for name in ANSWERS] + [
    b"POST /v1/chat/completions?json HTTP/1.1",
    b"POST /v1/messages?cut HTTP/1.1",
    b"GET /ui/ HTTP/1.1",
    b"POST no-target HTTP/1.1",
    b"GET /v1/realtime HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket",
]
ADMIN = [
    b"GET /metrics HTTP/1.1",
    b"GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text\r\naccept-encoding: gzip",
    *[b"GET %b HTTP/1.1" % path for path in (b"/healthz", b"/readyz", b"/", b"/nowhere")],
]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request with what its query names."""
    head = await reader.readuntil(b"\r\n\r\n")
    query = head.split(b" ")[1].partition(b"?")[2]
    content_type, coding, body = ANSWERS.get(query, ANSWERS[b"json"])
    if query != b"cut":
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%bcontent-length: %d\r\n\r\n%b"
            % (content_type, coding, len(body), body)
        )
    writer.close()


async def ask(port: int, first_line: bytes) -> None:
    """Send a request and wait for the end of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = REQUEST if first_line.startswith(b"POST") else b""
    writer.write(
        b"%b\r\nhost: 127.0.0.1\r\nauthorization: Bearer sk-1\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (first_line, len(body), body)
    )
    await reader.read()
    writer.close()


async def main() -> None:
    """Send one request of each kind."""
    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    sidecar = Sidecar(Settings(upstream=f"http://127.0.0.1:{port}", port=0, admin_port=0))
    lifecycle = Lifecycle(sidecar)
    running = asyncio.create_task(lifecycle.run())
    await lifecycle.serving.wait()
    imported: dict[str, list[str]] = {}
    known = set(sys.modules)
    for port, lines in ((lifecycle.port, DATA), (lifecycle.admin_port, ADMIN)):
        for line in lines:
            async with asyncio.timeout(10):
                await ask(port, line)
            imported[line.decode()] = sorted(set(sys.modules) - known)
            known = set(sys.modules)
    counted = sidecar.metrics.http_requests.children
    lifecycle.stop()
    await running
    upstream.close()
    print(json.dumps({"imported": imported, "answered": sum(v.value for v in counted.values())}))


if __name__ == "__main__":
    asyncio.run(main())
