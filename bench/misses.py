"""What it costs to know why caching missed: `python -m bench.misses [--against DIRECTORY]`.

Sends the same request of a coding agent, in three sizes, through a sidecar that is told nothing
of misses, one that tells their reasons, and, if a directory is given, the sidecar of another
checkout, such as one from before the feature. Each is a process of its own on a core of its own;
they are measured in turns, and what is shown is the processor time of one request: the least of
the rounds, which other work disturbed least, and the median.

Behind that, what the reader of requests alone takes for 100 KB, in a tight loop: the same request
again, as above; those of a conversation that grows; and those of new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from bench import bodies
from bench.accounting import cpu_s, process_tree
from bench.measures import MeasureError, build_upstream, upstream
from bench.proxies import LOAD_CORE, PROXY_CORE, pinned
from sidecar.exchange import Dialect
from sidecar.observe.prefix import PrefixReader
from tests.support.process import ManagedProcess, free_port
from tests.support.requests import facts_of

__all__ = ["main", "request"]

_ROOT = Path(__file__).resolve().parents[1]
_CONNECTIONS = 16
_WAIT_MS = 20
"""An answer comes up to so much later: a provider's never comes before its request is read."""
_SIZES = (1, 10, 100)
_PIECE_BYTES = 64 * 1024
_BOUNDS = {"off": 1.10, "on": 1.20}
_SOURCE = (
    "def add(self, head: bytes) -> None:\n"
    '    """Take a part; what comes before its content, such as its role."""\n'
    '    self.sizes["content"] += len(head)\n\n'
)


def _text(size: int) -> str:
    return (_SOURCE * (size // len(_SOURCE) + 1))[:size]


def request(kilobytes: int) -> bytes:
    """Write a request as a coding agent does: a fifth are tools, a fifth the system prompt, the
    rest turns of 2 KB at most; three breakpoints."""
    size = kilobytes * 1000
    control = {"type": "ephemeral"}
    tool_size = max(100, size // 60)
    turns = max(1, size * 3 // 5 // 2000) // 2 * 2 + 1
    messages: list[dict[str, Any]] = [
        {
            "role": "user" if at % 2 == 0 else "assistant",
            "content": [{"type": "text", "text": _text(size * 3 // 5 // turns)}],
        }
        for at in range(turns)
    ]
    messages[-1]["content"][-1]["cache_control"] = control
    body = {
        "model": "claude-sonnet-4-5",
        "messages": messages,
        "system": [
            {"type": "text", "text": "You are a coding agent.", "cache_control": control},
            {"type": "text", "text": _text(size // 5), "cache_control": control},
        ],
        "tools": [
            {"name": f"tool{at}", "description": _text(tool_size), "input_schema": {}}
            for at in range(size // 5 // tool_size)
        ],
        "max_tokens": 1024,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def _conversation(number: int, turns: int) -> bytes:
    """Write a request of 2 KB a message, the last of which is marked."""
    body: dict[str, Any] = json.loads(request(100))
    control = body["messages"][-1]["content"][0]["cache_control"]
    body["messages"] = [
        {
            "role": "user" if at % 2 == 0 else "assistant",
            "content": [{"type": "text", "text": f"{number} {at} {_text(2000)}"}],
        }
        for at in range(2 * turns + 1)
    ]
    body["messages"][-1]["content"][0]["cache_control"] = control
    return json.dumps(body, separators=(",", ":")).encode()


_READ: dict[str, list[bytes]] = {
    "the same": [request(100)] * 40,
    "growing": [_conversation(number, turns) for turns in range(10, 18) for number in range(5)],
    "new": [_conversation(number, 14) for number in range(40)],
}


def _read_us(requests: list[bytes], salt: int | None) -> float:
    """Read requests one after the other; returns the processor time of one, as a mean.

    Args:
        salt: of a reader of prefixes; None for none.
    """
    prefixes = None if salt is None else PrefixReader(Dialect.ANTHROPIC, salt)
    began = time.thread_time()
    for body in requests:
        facts_of(body, prefixes=prefixes, ttls=True, piece_bytes=_PIECE_BYTES)
    return (time.thread_time() - began) / len(requests) * 1e6


@contextmanager
def _sidecar(
    root: Path, settings: dict[str, str], upstream_port: int, directory: Path
) -> Iterator[tuple[int, int]]:
    """Run a sidecar and give its port and process id."""
    port, admin_port = free_port(), free_port()
    directory.mkdir()
    process = ManagedProcess(
        pinned(PROXY_CORE, [sys.executable, "-m", "sidecar", "serve"]),
        directory=directory,
        log=directory / "log",
        environment={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(root),
            "SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream_port}",
            "SIDECAR_PORT": str(port),
            "SIDECAR_ADMIN_PORT": str(admin_port),
            "SIDECAR_USAGE_LOG": "off",
            "SIDECAR_PRICE_SOURCES": "package",
            "SIDECAR_DRAIN_DELAY_S": "0",
            "SIDECAR_FINAL_SCRAPE_WAIT_S": "0",
            **settings,
        },
    )

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{admin_port}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        process.wait_until(ready, timeout_s=30)
        yield port, process.pid
    finally:
        process.stop()


def _load(port: int, body: Path, count: int) -> None:
    command = ["h2load", "--h1", "-t1", f"-c{_CONNECTIONS}", f"-n{count}", "-d", str(body)]
    for name, value in bodies.REQUEST_HEADERS.items():
        command += ["-H", f"{name}: {value}"]
    command.append(f"http://127.0.0.1:{port}/v1/messages")
    done = subprocess.run(
        pinned(LOAD_CORE, command), capture_output=True, text=True, timeout=300, check=False
    )
    if not re.search(rf"\b{count} succeeded, 0 failed, 0 errored", done.stdout):
        raise MeasureError(f"h2load: {done.stdout[-900:]}{done.stderr[-300:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, the base of the ratios")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=1500)
    options = parser.parse_args(arguments)
    sides: dict[str, tuple[Path, dict[str, str]]] = {
        "off": (_ROOT, {"SIDECAR_MISS_REASONS": "false"}),
        "on": (_ROOT, {}),
    }
    if options.against:
        sides = {"before": (options.against.resolve(), {}), **sides}
    base = next(iter(sides))
    build_upstream()
    missed = False
    print(f"| request | {' | '.join(sides)} | ratios to {base} |\n|{' --- |' * (len(sides) + 2)}")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        answer = bodies.message()
        # Nothing first, and then the answer, as the upstream's clock has it.
        later = replace(answer, frames=(b"", *answer.frames))
        upstream_port, _ = stack.enter_context(upstream(later, directory, _WAIT_MS))
        running = {
            name: stack.enter_context(_sidecar(*side, upstream_port, directory / name))
            for name, side in sides.items()
        }
        for size in _SIZES:
            body = directory / "request"
            body.write_bytes(request(size))
            used: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(options.rounds + 1):
                names = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
                for name in names:
                    port, pid = running[name]
                    pids = process_tree(pid)
                    before = cpu_s(pids)
                    _load(port, body, options.requests)
                    if turn:  # the first one warms up
                        used[name].append((cpu_s(pids) - before) / options.requests * 1e6)
            cells = [
                f"{min(each):.0f} / {statistics.median(each):.0f} µs" for each in used.values()
            ]
            ratios = {
                name: statistics.median(
                    one / other for one, other in zip(used[name], used[base], strict=True)
                )
                for name in sides
                if name != base
            }
            shown = ", ".join(f"{name} {ratio:.2f}×" for name, ratio in ratios.items())
            print(f"| {size} KB | {' | '.join(cells)} | {shown} |", flush=True)
            if size == _SIZES[-1]:
                missed = any(ratio > _BOUNDS[name] for name, ratio in ratios.items())
    print("\n| requests of 100 KB | reader, off | reader, on |\n| --- | --- | --- |")
    for kind, requests in _READ.items():
        off, on = (min(_read_us(requests, salt) for _ in range(15)) for salt in (None, 7))
        print(f"| {kind} | {off:.0f} µs | {on:.0f} µs |")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
