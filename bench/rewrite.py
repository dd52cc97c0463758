"""What rewriting costs, and that it costs nothing where it is off: `python -m bench.rewrite`.

Sends requests through the relay, with an upstream and a client that are plain objects, so that
nothing but the relay, its tap and the accounts takes time. Prints for each case the processor
time and the number of bytecode instructions of one request; the second is the same in every run
and on every machine. `--against DIRECTORY` measures another checkout, such as one from before
the feature, in turns with this one, with the switch off.

It also prints how long the loop stands still for one large JSON body.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop

from sidecar.app import Sidecar
from sidecar.config import Settings

REQUESTS = 2_000
ROUNDS = 8
BODY = b'{"model": "claude-sonnet-4-5", "messages": []}'
USAGE = {"input_tokens": 7, "output_tokens": 16, "cache_read_input_tokens": 2101}


def _event(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


_TEXT = _event("content_block_delta", index=0, delta={"type": "text_delta", "text": "one token"})
ANSWERS: dict[str, tuple[bytes, list[bytes]]] = {
    "json": (
        b"application/json",
        [json.dumps({"type": "message", "content": ["x" * 2000], "usage": USAGE}).encode()],
    ),
    "sse": (
        b"text/event-stream",
        [
            _event("message_start", message={"id": "msg_1", "usage": USAGE}),
            *[_TEXT] * 300,
            _event("message_delta", usage={"output_tokens": 300}),
            _event("message_stop"),
        ],
    ),
}


class _Upstream:
    """Answers every request with the same chunks."""

    authority = b"llm.test"
    status_code = 200

    def __init__(self, kind: bytes, chunks: list[bytes]) -> None:
        self.headers = [(b"content-type", kind), (b"x-litellm-version", b"1.83.10")]
        if len(chunks) == 1:
            self.headers.append((b"content-length", b"%d" % len(chunks[0])))
        self._chunks = chunks

    async def open(self, method: str, target: bytes, headers: Any, body: Any) -> _Upstream:
        body.take()
        await asyncio.sleep(0)  # the request is read while the upstream works
        return self

    @property
    def ended(self) -> bool:
        return len(self._chunks) == 1

    def take(self) -> bytes:
        return self._chunks[0]

    async def pump(self, sink: Callable[[bytes, bool], None]) -> None:
        last = len(self._chunks) - 1
        for number, chunk in enumerate(self._chunks):
            if number:
                sink(chunk, number == last)

    async def chunks(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk

    def pause(self) -> None:
        pass

    resume = close = pause


class _Client:
    """Sends a request and takes what comes."""

    target = b"/v1/messages"
    on_left = on_paused = on_resumed = None
    behind = False

    def take_body(self) -> tuple[bytes, bool]:
        return BODY, False

    def begin(self, status_code: int, headers: list[tuple[bytes, bytes]]) -> None:
        pass

    def write(self, data: bytes, last: bool) -> None:
        pass


async def _request(relay: Any) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body has come")

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/messages",
        "http_version": "1.1",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"llm.test"), (b"content-length", b"%d" % len(BODY))],
        "extensions": {"sidecar": _Client()},
    }
    await relay(scope, receive, send)


async def measure(mode: str, answer: str) -> tuple[float, int]:
    """Return the processor time of a request in microseconds, and its instructions."""
    settings: dict[str, Any] = {} if mode == "off" else {"rewrite_usage": mode}
    sidecar = Sidecar(Settings(upstream="http://127.0.0.1:9", **settings))
    relay: Any = sidecar.relay
    relay.upstream = _Upstream(*ANSWERS[answer])
    count = REQUESTS if answer == "json" else REQUESTS // 10
    for _ in range(count // 10):
        await _request(relay)
    began = time.process_time()
    for _ in range(count):
        await _request(relay)
    cpu_s = time.process_time() - began
    instructions = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        instructions += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        await _request(relay)
    finally:
        sys.settrace(None)
    await sidecar.aclose()
    return 1e6 * cpu_s / count, instructions


def _in_turns(sides: dict[str, tuple[Path, str]], answer: str) -> dict[str, dict[str, float]]:
    """Measure each side in processes of its own, one after the other, several times."""
    figures: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(ROUNDS):
        # Whoever comes first in a round is at an advantage.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            root, mode = sides[name]
            done = subprocess.run(
                [sys.executable, __file__, "--once", mode, answer],
                env=os.environ | {"PYTHONPATH": str(root)},
                capture_output=True,
                check=True,
            )
            figures[name].append(tuple(json.loads(done.stdout)))
    return {
        name: {
            "cpu_us": round(statistics.median(cpu for cpu, _ in rows), 1),
            "cpu_us_least": round(min(cpu for cpu, _ in rows), 1),
            "instructions": statistics.median(count for _, count in rows),
        }
        for name, rows in figures.items()
    }


def pauses() -> dict[str, float]:
    """Return how many milliseconds it takes to finish bodies of one megabyte."""
    from sidecar.exchange import Rewrite
    from sidecar.observe.rewrite import transformer_for

    rows = [{"id": i, "name": f"row {i}", "tags": ["a", "b"], "x": 1.5} for i in range(18_000)]
    contents = {"text": ['He said "yes",\nand went. ' * 36_000], "tool input": [{"rows": rows}]}
    figures = {}
    for name, content in contents.items():
        body = json.dumps({"type": "message", "content": content, "usage": USAGE}).encode()
        times = []
        for _ in range(ROUNDS):
            transformer = transformer_for([(b"content-type", b"application/json")], full=False)
            assert not isinstance(transformer, Rewrite)
            transformer.feed(body)
            began = time.perf_counter()
            transformer.finish()
            times.append(time.perf_counter() - began)
        figures[f"{name}, {len(body) / 1e6:.1f} MB"] = round(1000 * statistics.median(times), 1)
    return figures


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, measured with it off")
    parser.add_argument("--once", nargs=2, metavar=("MODE", "ANSWER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            print(json.dumps(runner.run(measure(*options.once))))
        return
    here = Path(__file__).resolve().parents[1]
    sides = {mode: (here, mode) for mode in ("off", "openai", "openai-full")}
    if options.against:
        sides = {"the other, off": (options.against.resolve(), "off"), **sides}
    figures: dict[str, Any] = {answer: _in_turns(sides, answer) for answer in ANSWERS}
    figures["pause_ms"] = pauses()
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
