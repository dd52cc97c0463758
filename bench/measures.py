"""What is measured, and how one peer is put through one measure once.

Each run has a fresh upstream and a fresh peer, so that no measure inherits another's memory or
warmth. Whatever is wrong with an answer ends the run without figures.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import bodies
from bench.accounting import cpu_s, peak_bytes, process_tree
from bench.proxies import LOAD_CORE, Peer, Running, pinned, start
from tests.support.process import ManagedProcess, free_port

__all__ = ["MEASURES", "Figures", "MeasureError", "build_upstream", "run", "upstream"]

_ROOT = Path(__file__).resolve().parents[1]
_UPSTREAM = _ROOT / ".bench" / "upstream"

Figures = dict[str, float]
"""By name: `us` (CPU per request or event), `rps`, `busy` (share of the core), `peak_mb`,
`pace`, `added_p50_ms`, `added_p99_ms`."""


class MeasureError(Exception):
    """A run went wrong: there is no result."""


@dataclass(frozen=True, slots=True)
class Requests:
    """As many requests as go, on so many connections."""

    title: str
    connections: int
    answer: bodies.Answer
    body: bytes = bodies.REQUEST


@dataclass(frozen=True, slots=True)
class Paced:
    """So many streams side by side, each with an event every 20 ms."""

    title: str
    streams: int


@dataclass(frozen=True, slots=True)
class Latency:
    """A fixed rate, against the upstream directly and through the peer, in turns."""

    title: str
    rate: int


MEASURES: dict[str, Requests | Paced | Latency] = {
    "json1": Requests("JSON, 1 connection", 1, bodies.message()),
    "json32": Requests("JSON, 32 connections", 32, bodies.message()),
    "json256": Requests("JSON, 256 connections", 256, bodies.message()),
    "json1000": Requests("JSON, 1,000 connections", 1000, bodies.message()),
    "burst": Requests("SSE, 300 events in one burst", 32, bodies.burst(), bodies.STREAM_REQUEST),
    "paced100": Paced("SSE paced, 100 streams", 100),
    "paced500": Paced("SSE paced, 500 streams", 500),
    "paced1000": Paced("SSE paced, 1,000 streams", 1000),
    "upload": Requests("JSON request of 1 MB", 8, bodies.message(), bodies.UPLOAD),
    "latency": Latency("Added latency at 200 requests/s", 200),
}

_SLOW_CONNECTIONS = 8
_WARM_UP_S = 0.7
_COUNTED_WITHIN_S = 2.0


def build_upstream() -> None:
    """Compile the upstream if that has to be done.

    Raises:
        MeasureError: there is no compiler, or it failed.
    """
    source = Path(__file__).with_name("upstream.c")
    if _UPSTREAM.exists() and _UPSTREAM.stat().st_mtime > source.stat().st_mtime:
        return
    _UPSTREAM.parent.mkdir(exist_ok=True)
    command = ["cc", "-O2", "-Wall", "-Wextra", "-o", str(_UPSTREAM), str(source)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise MeasureError(f"the upstream cannot be compiled: {exc}") from None


@contextmanager
def upstream(
    answer: bodies.Answer, directory: Path, interval_ms: int = bodies.PACED_INTERVAL_MS
) -> Iterator[tuple[int, int]]:
    """Run the upstream and give its port and process id."""
    port = free_port()
    answer.write(directory / "frames")
    command = [str(_UPSTREAM), str(port), str(directory / "frames"), str(interval_ms)]
    process = ManagedProcess(
        pinned(LOAD_CORE, command),
        directory=directory,
        log=directory / "upstream.log",
        environment={},
    )
    try:
        yield port, process.pid
    finally:
        process.stop()


def run(name: str, peer: Peer | None, seconds: float) -> Figures:
    """Put a peer through a measure once.

    Args:
        peer: None for the upstream itself, without a proxy.
        seconds: about how long the measured part takes.

    Raises:
        MeasureError: a wrong or missing answer, or a count that is not what was sent.
        ReadinessError: the peer did not start.
    """
    measure = MEASURES[name]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        answer = (
            measure.answer
            if isinstance(measure, Requests)
            else bodies.paced(_paced_events(seconds))
            if isinstance(measure, Paced)
            else bodies.message()
        )
        upstream_port, _ = stack.enter_context(upstream(answer, directory))
        running = None
        if peer is not None:
            running = stack.enter_context(start(peer, upstream_port, directory))
        before = running.counted() if running else None
        if isinstance(measure, Requests):
            figures = _requests(measure, running, upstream_port, directory, seconds)
        elif isinstance(measure, Paced):
            figures = _paced(measure, running, upstream_port, seconds)
        else:
            figures = _latency(measure, running, upstream_port, seconds)
        if running is not None:
            figures["peak_mb"] = peak_bytes(process_tree(running.pid)) / 1e6
            _check_counts(running, before, int(figures["answers"]))
        return figures


def _check_counts(running: Running, before: tuple[int, int] | None, answers: int) -> None:
    """A peer that counts must have counted every answer and every token."""
    if before is None:
        return
    expected = (answers, answers * bodies.READ_TOKENS)
    deadline = time.monotonic() + _COUNTED_WITHIN_S
    while True:
        after = running.counted()
        assert after is not None
        counted = (after[0] - before[0], after[1] - before[1])
        if counted == expected:
            return
        # Envoy counts a moment after the client has the answer.
        if time.monotonic() > deadline:
            raise MeasureError(f"counted {counted} instead of {expected}")
        time.sleep(0.05)


def _requests(
    measure: Requests, running: Running | None, upstream_port: int, directory: Path, seconds: float
) -> Figures:
    slow = running is not None and running.peer.slow
    connections = min(measure.connections, _SLOW_CONNECTIONS) if slow else measure.connections
    port = running.port if running else upstream_port
    headers = running.headers if running else bodies.REQUEST_HEADERS
    alters = running is not None and running.peer.alters
    (directory / "request").write_bytes(measure.body)

    def load(count: int) -> float:
        body = None if alters else measure.answer.body
        return _h2load(port, headers, connections, count, directory / "request", body)

    # The first requests find nothing open and nothing cached; then some to learn the rate.
    warm_up = max(connections, 20 if slow else 200)
    load(warm_up)
    rate = load(warm_up)
    second_warm_up = max(connections, int(rate * _WARM_UP_S))
    rate = load(second_warm_up)
    count = max(connections, int(rate * seconds))
    pids = process_tree(running.pid) if running else []
    used_s = cpu_s(pids)
    rate = load(count)
    used_s = cpu_s(pids) - used_s
    return {
        "us": used_s / count * 1e6,
        "rps": rate,
        "busy": used_s * rate / count,
        "answers": count + second_warm_up + 2 * warm_up,
    }


def _h2load(
    port: int,
    headers: Mapping[str, str],
    connections: int,
    count: int,
    request: Path,
    body: bytes | None,
) -> float:
    """Make exactly `count` requests, check what came, and return requests per second."""
    command = ["h2load", "--h1", "-t1", f"-c{connections}", f"-n{count}", "-d", str(request)]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    command.append(f"http://127.0.0.1:{port}/v1/messages")
    done = subprocess.run(
        pinned(LOAD_CORE, command), capture_output=True, text=True, timeout=300, check=False
    )
    text = done.stdout
    rate = re.search(r"([\d.]+) req/s", text)
    data = re.search(r"\((\d+)\) data", text)
    if f"{count} succeeded, 0 failed, 0 errored, 0 timeout" not in text or not rate or not data:
        raise MeasureError(f"h2load: {text[-900:]}{done.stderr[-300:]}")
    if body is not None and int(data[1]) != count * len(body):
        raise MeasureError(f"h2load got {data[1]} bytes of bodies, not {count * len(body)}")
    return float(rate[1])


def _paced_events(seconds: float) -> int:
    # Two seconds of each stream are for opening and settling.
    return int((seconds + 2) * 1000 / bodies.PACED_INTERVAL_MS)


def _paced(measure: Paced, running: Running | None, upstream_port: int, seconds: float) -> Figures:
    return _own_load(
        "paced",
        running,
        port=running.port if running else upstream_port,
        streams=measure.streams,
        events=_paced_events(seconds),
        pid=running.pid if running else None,
    )


def _latency(
    measure: Latency, running: Running | None, upstream_port: int, seconds: float
) -> Figures:
    figures = _own_load(
        "latency",
        running,
        ports={"direct": upstream_port, "proxy": running.port if running else upstream_port},
        rate=measure.rate,
        # 200 requests/s give a p99 that is worth its name only after some seconds.
        seconds=3 * seconds,
        compare=running is None or not running.peer.alters,
    )
    for quantile in ("p50", "p99"):
        figures[f"added_{quantile}_ms"] = (
            figures[f"proxy_{quantile}_ms"] - figures[f"direct_{quantile}_ms"]
        )
    return figures


def _own_load(kind: str, running: Running | None, **arguments: object) -> Figures:
    arguments["headers"] = running.headers if running else bodies.REQUEST_HEADERS
    command = [sys.executable, "-m", "bench.load", kind, json.dumps(arguments)]
    done = subprocess.run(
        pinned(LOAD_CORE, command),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=_ROOT,
    )
    if done.returncode:
        raise MeasureError(done.stderr[-900:])
    figures: Figures = json.loads(done.stdout)
    return figures
