"""Load that no ready-made tool makes: paced streams, and requests at a fixed rate.

    python -m bench.load paced   '{"port": 4001, "streams": 500, …}'
    python -m bench.load latency '{"ports": {"direct": 9701, "proxy": 4001}, …}'

Prints one JSON object. Every answer is compared with what it has to be; if one differs, or a
connection breaks, the exit code is 1 and there are no figures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import uvloop

from bench import bodies
from bench.accounting import cpu_s, process_tree

__all__ = ["request_bytes"]

_RAMP_S = 1.0
"""Over how long streams are opened."""
_SETTLE_S = 0.5
"""Left out at both ends of the time in which all streams run."""


class LoadError(Exception):
    """An answer was wrong, or did not come."""


def request_bytes(body: bytes, headers: dict[str, str]) -> bytes:
    """Write a request."""
    lines = ["POST /v1/messages HTTP/1.1", "host: bench.local", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _dechunk(data: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    while True:
        line_end = data.index(b"\r\n", at)
        size = int(data[at:line_end].split(b";")[0], 16)
        at = line_end + 2 + size + 2
        if not size:
            return b"".join(pieces)
        pieces.append(data[line_end + 2 : at - 2])


def _body_of(answer: bytes) -> bytes:
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise LoadError(f"not a 200: {head[:200]!r}")
    return _dechunk(rest) if b"\r\ntransfer-encoding: chunked" in head.lower() else rest


def _is_whole(answer: bytes) -> bool:
    head, separator, rest = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at >= 0:
        return len(rest) >= int(lower[at + 17 :].split(b"\r\n")[0])
    return rest.endswith(b"0\r\n\r\n")


# Paced streams


class _Stream(asyncio.Protocol):
    """Reads one stream and counts its events as they come."""

    events = 0  # of all streams together

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._last = b""
        self.chunks: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.chunks.append(data)
        _Stream.events += data.count(b"\n\n")
        if self._last == b"\n" and data[:1] == b"\n":
            _Stream.events += 1
        self._last = data[-1:]
        if data.endswith(b"\r\n0\r\n\r\n") or (data == b"0\r\n\r\n"):
            self.done.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(f"a stream broke off: {exc}"))


async def paced(
    *, port: int, streams: int, events: int, pid: int | None, headers: dict[str, str]
) -> dict[str, float]:
    """Run streams side by side and account for a time in which all of them run.

    Args:
        events: of each stream.
        pid: the process whose CPU time is read at both ends of the window.
    """
    loop = asyncio.get_running_loop()
    answer = bodies.paced(events)
    request = request_bytes(bodies.STREAM_REQUEST, headers)
    pids = process_tree(pid) if pid is not None else []
    began = time.monotonic()
    opened: list[_Stream] = []
    for number in range(streams):
        await asyncio.sleep(began + number * _RAMP_S / streams - time.monotonic())
        _, stream = await loop.create_connection(lambda: _Stream(request), "127.0.0.1", port)
        opened.append(stream)
    await asyncio.sleep(_SETTLE_S)

    started, events_before, cpu_before = time.monotonic(), _Stream.events, cpu_s(pids)
    window_s = events * bodies.PACED_INTERVAL_MS / 1000 - _RAMP_S - 2 * _SETTLE_S
    await asyncio.sleep(window_s)
    window_s = time.monotonic() - started
    seen, used_s = _Stream.events - events_before, cpu_s(pids) - cpu_before

    async with asyncio.timeout(60):
        await asyncio.gather(*(stream.done for stream in opened))
    for stream in opened:
        if _body_of(b"".join(stream.chunks)) != answer.body:
            raise LoadError("a stream is not what the upstream sent")
    return {
        "us": used_s / seen * 1e6,
        "busy": used_s / window_s,
        "pace": seen / (streams * window_s * 1000 / bodies.PACED_INTERVAL_MS),
        "answers": streams,
    }


# A fixed rate


class _Caller(asyncio.Protocol):
    """One connection, on which one request at a time is made and timed."""

    def __init__(self, free: list[_Caller], took: Callable[[float], None], body: bytes | None):
        self._free = free
        self._took = took
        self._body = body
        self._answer = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def call(self, request: bytes) -> None:
        self._answer = b""
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._answer += data
        if _is_whole(self._answer):
            self._took(now - self._sent_at)
            body = _body_of(self._answer)
            if self._body is not None and body != self._body:
                raise LoadError("an answer is not what the upstream sent")
            self._free.append(self)


async def latency(
    *,
    ports: dict[str, int],
    rate: int,
    seconds: float,
    headers: dict[str, str],
    compare: bool,
) -> dict[str, float]:
    """Call each port at a fixed rate, in turns, and time the answers.

    The schedule does not wait for answers: what is slow delays no other request's beginning.
    A time is from right before the request's write to the answer's last byte.
    """
    loop = asyncio.get_running_loop()
    failures: list[str] = []
    loop.set_exception_handler(lambda _, context: failures.append(str(context)))
    answer = bodies.message()
    request = request_bytes(bodies.REQUEST, headers)
    times: dict[str, list[float]] = {name: [] for name in ports}
    free: dict[str, list[_Caller]] = {name: [] for name in ports}

    async def connect(name: str) -> _Caller:
        body = answer.body if compare or name == "direct" else None
        _, caller = await loop.create_connection(
            lambda: _Caller(free[name], times[name].append, body), "127.0.0.1", ports[name]
        )
        return caller

    for name in ports:
        free[name] += [await connect(name) for _ in range(16)]
    warm_up = rate  # a second's worth
    total = int(rate * seconds) + warm_up
    began = time.monotonic() + 0.1
    for number in range(total):
        for turn, name in enumerate(ports):
            at = began + (number + turn / len(ports)) / rate
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            caller = free[name].pop() if free[name] else await connect(name)
            caller.call(request)
    deadline = time.monotonic() + 30
    while any(len(taken) < total for taken in times.values()):
        if failures or time.monotonic() > deadline:
            raise LoadError(f"answers are missing; {failures[:3]}")
        await asyncio.sleep(0.05)
    figures: dict[str, float] = {"answers": float(total)}
    for name, taken in times.items():
        counted = sorted(taken[warm_up:])
        figures[f"{name}_p50_ms"] = 1000 * counted[len(counted) // 2]
        figures[f"{name}_p99_ms"] = 1000 * counted[len(counted) * 99 // 100]
    return figures


def main() -> None:
    """Run what the command line says."""
    kind, arguments = sys.argv[1:]
    load: Any = {"paced": paced, "latency": latency}[kind]
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            print(json.dumps(runner.run(load(**json.loads(arguments)))))
    except (LoadError, OSError, TimeoutError) as error:
        sys.exit(f"bench.load: {error!r}")


if __name__ == "__main__":
    main()
