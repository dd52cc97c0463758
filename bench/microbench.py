"""What the pieces on the hot path cost by themselves: `python -m bench.microbench`.

The tap, the reader of requests, the ledger and the usage log, without sockets. Prints each
figure beside that of `microbench-baseline.json`; `--update` makes the figures the new baseline.
The baseline is of one machine: on another one compare the ratios with each other, or make a
baseline first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from bench import bodies
from sidecar.account.log_file import LogFile
from sidecar.account.metrics import Metrics
from sidecar.account.usage_log import Lines, UsageLog
from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.exchange import (
    Dialect,
    End,
    Exchange,
    Observation,
    Outcome,
    RequestFacts,
    Route,
    Status,
)
from sidecar.lines import LineWriter, Losses
from sidecar.observe.request import BodyReader
from sidecar.observe.tap import tap_for

__all__ = ["run"]

_BASELINE = Path(__file__).with_name("microbench-baseline.json")
_REPEATS = 7
_REPEAT_S = 0.1
_CHUNK_BYTES = 64 * 1024

_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
_LITELLM_HEADERS = [
    (name.encode(), value.encode())
    for name, value in {
        "x-litellm-call-id": "1f0f1c60-0001-4a5c-8f1e-000000000001",
        "x-litellm-model-id": "2f" * 32,
        "x-litellm-version": "1.83.10",
        "x-litellm-key-spend": "0.0123",
        "x-litellm-team-alias": "Team Red",
        "date": "Tue, 24 Nov 2026 12:00:00 GMT",
        "server": "uvicorn",
        "content-length": "800",
    }.items()
]
_REQUEST_HEADERS = [
    (name.encode(), value.encode()) for name, value in bodies.REQUEST_HEADERS.items()
]


def _seconds_each(work: Callable[[], object]) -> float:
    """Time a call: the fastest of some repeats, which other processes disturbed least."""
    work()
    began = time.perf_counter()
    work()
    calls = max(1, int(_REPEAT_S / (time.perf_counter() - began)))
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def _read_stream(chunks: list[bytes]) -> Observation:
    tap = tap_for(Dialect.ANTHROPIC, 200, _SSE)
    for chunk in chunks:
        tap.feed(chunk)
    return tap.finish(End.COMPLETE)


def _sse_gb_s() -> float:
    """A long stream, nearly all text deltas, in large chunks that cut events anywhere."""
    body = bodies.paced(60_000).body
    chunks = [body[at : at + _CHUNK_BYTES] for at in range(0, len(body), _CHUNK_BYTES)]
    assert _read_stream(chunks).usage.read_tokens == bodies.READ_TOKENS
    return len(body) / _seconds_each(lambda: _read_stream(chunks)) / 1e9


def _events(count: int) -> list[bytes]:
    return [event + b"\n\n" for event in bodies.paced(count).body.split(b"\n\n")[:-1]]


def _event_us() -> float:
    """One text delta, alone in its chunk: the difference that 10,000 more of them make."""
    few, many = _events(1_000), _events(11_000)
    assert _read_stream(many).status is Status.COMPLETE
    return (
        (_seconds_each(lambda: _read_stream(many)) - _seconds_each(lambda: _read_stream(few)))
        / 10_000
        * 1e6
    )


def _burst_us() -> float:
    """A stream of 300 events as it comes out of a socket: in one chunk."""
    body = bodies.burst().body
    return _seconds_each(lambda: _read_stream([body])) * 1e6


def _stream_us() -> float:
    """A stream of hardly anything but its frame: start, stop and their usage."""
    events = _events(6)
    return _seconds_each(lambda: _read_stream(events)) * 1e6


def _read_json(body: bytes) -> Observation:
    tap = tap_for(Dialect.ANTHROPIC, 200, _JSON)
    tap.feed(body)
    return tap.finish(End.COMPLETE)


def _json_us() -> float:
    """A JSON answer of 800 bytes, whole."""
    body = bodies.message().body
    assert _read_json(body).usage.read_tokens == bodies.READ_TOKENS
    return _seconds_each(lambda: _read_json(body)) * 1e6


def _read_request(body: bytes) -> RequestFacts:
    length = (b"content-length", b"%d" % len(body))
    reader = BodyReader([*_REQUEST_HEADERS, length], 32 * 1024 * 1024)
    for at in range(0, len(body), _CHUNK_BYTES):
        reader.feed(body[at : at + _CHUNK_BYTES])
    for _ in reader.finish():
        pass
    return reader.facts()


def _request_us() -> float:
    """A request of 1 KB."""
    facts = _read_request(bodies.REQUEST)
    assert (facts.model, facts.stream, facts.caching_asked) == (bodies.MODEL, False, True)
    return _seconds_each(lambda: _read_request(bodies.REQUEST)) * 1e6


def _upload_ms() -> float:
    """A request of 1 MB."""
    assert _read_request(bodies.UPLOAD).model == bodies.MODEL
    return _seconds_each(lambda: _read_request(bodies.UPLOAD)) * 1e3


def _exchange() -> Exchange:
    return Exchange(
        route=Route.MESSAGES,
        method="POST",
        status_code=200,
        observed=True,
        end=End.COMPLETE,
        facts=_read_request(bodies.REQUEST),
        observation=_read_json(bodies.message().body),
        request_headers=_REQUEST_HEADERS,
        response_headers=[*_JSON, *_LITELLM_HEADERS],
        duration_s=1.0,
        first_byte_s=0.1,
        first_token_s=0.1,
        overhead_s=0.0001,
    )


def _submit_us() -> float:
    """Counting an exchange whose labels are known."""
    settings = Settings(upstream="http://127.0.0.1:9", port=0, admin_port=0)
    ledger = Sidecar(settings, registry=CollectorRegistry()).ledger
    exchange = _exchange()

    def submit() -> None:
        ledger.begin(Route.MESSAGES)
        ledger.submit(exchange)

    return _seconds_each(submit) * 1e6


def _line_us(lines: Lines) -> float:
    log = UsageLog(lines, Metrics((), compat=(), clock=time.time))
    exchange = _exchange()
    observation = exchange.observation
    assert observation is not None

    def write() -> None:
        log.write(
            exchange,
            observation,
            outcome=Outcome.HIT,
            provider="anthropic",
            team_alias="Team Red",
            hashed_key="0123456789abcdef" * 4,
            cost_usd=0.0123,
        )

    each = _seconds_each(write) * 1e6
    assert not lines.losses.total
    return each


class _Nowhere:
    """Takes lines and forgets them."""

    losses = Losses()

    def write(self, line: bytes) -> None:
        pass


def _usage_line_us() -> float:
    """A line of the usage log, encoded."""
    return _line_us(_Nowhere())


def _usage_file_us() -> float:
    """The same, written to a file, which is rotated now and then."""
    with tempfile.TemporaryDirectory() as directory:
        file = LogFile(Path(directory) / "usage.log", max_bytes=10_000_000, files=2)
        try:
            return _line_us(file)
        finally:
            file.close()


def _usage_stdout_us() -> float:
    """The same, handed to the thread that writes to standard output."""
    with open(os.devnull, "wb") as nowhere:
        writer = LineWriter(nowhere.fileno(), max_held_bytes=1 << 30)
        each = _line_us(writer.usage)
        assert writer.flush(60)
    return each


_FIGURES: dict[str, tuple[str, Callable[[], float]]] = {
    "sse_gb_s": ("tap, delta-heavy SSE in chunks of 64 KiB, GB/s", _sse_gb_s),
    "event_us": ("tap, one chunk of one event, µs", _event_us),
    "stream_us": ("tap, a stream of 6 events, µs", _stream_us),
    "burst_us": ("tap, 300 events in one chunk, µs", _burst_us),
    "json_us": ("tap, JSON answer of 800 bytes, µs", _json_us),
    "request_us": ("request reader, 1 KB, µs", _request_us),
    "upload_ms": ("request reader, 1 MB, ms", _upload_ms),
    "submit_us": ("ledger, submit, µs", _submit_us),
    "usage_line_us": ("usage log, a line encoded, µs", _usage_line_us),
    "usage_file_us": ("usage log, a line to a file, µs", _usage_file_us),
    "usage_stdout_us": ("usage log, a line to standard output, µs", _usage_stdout_us),
}


def run() -> dict[str, float]:
    """Measure everything once."""
    gc.collect()
    gc.freeze()
    return {name: measure() for name, (_, measure) in _FIGURES.items()}


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.microbench", description=__doc__)
    parser.add_argument("--update", action="store_true", help="make this the baseline")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    arguments = parser.parse_args()
    figures = run()
    if arguments.json:
        print(json.dumps(figures))
        return
    baseline = json.loads(_BASELINE.read_text()) if _BASELINE.exists() else {}
    print(f"{'':48} {'now':>9} {'baseline':>9} {'ratio':>6}")
    for name, (title, _) in _FIGURES.items():
        then = baseline.get(name)
        compared = f"{then:9.2f} {figures[name] / then:6.2f}" if then else ""
        print(f"{title:48} {figures[name]:9.2f} {compared}")
    if arguments.update:
        rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
        _BASELINE.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
