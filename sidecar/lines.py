"""Writing lines where it may fail: what failed, and standard output as it does not stop us.

A pipe whose reader stands still takes nothing any more, and whoever writes to it stands still
too. `LineWriter` therefore writes in a thread of its own, which alone may wait; the line that
finds its buffer full is dropped, and counted. To make the descriptor non-blocking instead would
do the same to every other process that shares it.

This module knows nothing of what the lines say.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import Counter

from sidecar.exchange import LogFault

__all__ = ["Channel", "LineWriter", "Losses", "fault_of"]

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def fault_of(error: OSError) -> LogFault:
    """Classify what kept a line from being written."""
    if error.errno in _NO_SPACE:
        return LogFault.NO_SPACE
    if error.errno == errno.EPIPE:
        return LogFault.CLOSED
    return LogFault.IO_ERROR


class Losses:
    """What failed in writing a log, by reason, since the start."""

    def __init__(self) -> None:
        self.total = 0
        self.by_fault: Counter[LogFault] = Counter()
        self.details: dict[LogFault, str] = {}
        """The system's words for the last of each, where it had any."""

    def add(self, fault: LogFault, detail: str = "", count: int = 1) -> None:
        """Note what failed."""
        self.details[fault] = detail
        self.by_fault[fault] += count
        self.total += count


class Channel:
    """One log's way into a `LineWriter`, which makes it."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer
        self.losses = Losses()

    def write(self, line: bytes) -> None:
        """Take a line, its line end included; never waits, and may be called in any thread."""
        self._writer.put(self, line)


class LineWriter:
    """Writes lines to a descriptor, in the order in which they came, in a thread of its own.

    Args:
        descriptor: it is neither closed nor changed.
        max_held_bytes: lines that are not written yet; one more is dropped.
    """

    MAX_HELD_BYTES = 4 * 1024 * 1024
    _BATCH_BYTES = 64 * 1024
    """Written at once, unless a line is longer; what a pipe holds on Linux."""
    _GATHER_S = 0.01
    """How long lines wait for more, so that under load the thread takes the interpreter's lock a
    hundred times a second and not at every line."""

    def __init__(self, descriptor: int, *, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._descriptor = descriptor
        self._max_held_bytes = max_held_bytes
        self._lock = threading.Lock()
        self._held: list[tuple[Channel, bytes]] = []
        self._held_bytes = 0
        self._torn = False
        # Held while the thread has nothing to do; whoever brings the first line releases it.
        self._sleep = threading.Lock()
        self._sleep.acquire()
        self._asleep = True
        self._hurry = threading.Event()
        self.usage = Channel(self)
        self.process = Channel(self)
        """The process's own log."""
        # A daemon: nobody may have to wait for it, not even the end of the process.
        threading.Thread(target=self._run, name="lines", daemon=True).start()

    def put(self, channel: Channel, line: bytes) -> None:
        """Take a line for a channel."""
        with self._lock:
            if self._held_bytes + len(line) > self._max_held_bytes:
                channel.losses.add(LogFault.BUFFER_FULL)
                return
            self._held.append((channel, line))
            self._held_bytes += len(line)
            if self._asleep:
                self._asleep = False
                self._sleep.release()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written, or the time is over; returns whether it is."""
        deadline = time.monotonic() + timeout_s
        self._hurry.set()
        try:
            while self._held_bytes and time.monotonic() < deadline:
                time.sleep(0.002)
        finally:
            self._hurry.clear()
        return not self._held_bytes

    # In the thread

    def _run(self) -> None:
        while True:
            self._sleep.acquire()
            self._hurry.wait(self._GATHER_S)
            while batch := self._take():
                self._write(batch)
                with self._lock:
                    self._held_bytes -= sum(len(line) for _, line in batch)

    def _take(self) -> list[tuple[Channel, bytes]]:
        """Take the next lines; with none left, go to sleep."""
        with self._lock:
            size = count = 0
            for _, line in self._held:
                size += len(line)
                if count and size > self._BATCH_BYTES:
                    break
                count += 1
            batch = self._held[:count]
            del self._held[:count]
            self._asleep = not batch
        return batch

    def _write(self, batch: list[tuple[Channel, bytes]]) -> None:
        """Write some lines; those that did not get out whole are lost."""
        begin = b"\n" if self._torn else b""
        data = begin + b"".join(line for _, line in batch)
        written = 0
        error: OSError | None = None
        while written < len(data):
            try:
                written += os.write(self._descriptor, data[written:] if written else data)
            except BlockingIOError:
                # Somebody who shares the descriptor has made it so.
                self._await_room()
            except OSError as exc:
                error = exc
                break
        if written:
            self._torn = data[written - 1] != ord("\n")
        if error is None:
            return
        end = len(begin)
        with self._lock:
            for channel, line in batch:
                end += len(line)
                if end > written:
                    channel.losses.add(fault_of(error), error.strerror or "")

    def _await_room(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll()
