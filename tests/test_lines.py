"""Standard output that nobody reads, or nobody reads fast enough."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.exchange import LogFault
from sidecar.lines import LineWriter
from tests.support.running import ROOT

_PIPE_BYTES = 4096


@dataclass
class Pipe:
    """A pipe of one page, and a writer to it."""

    reading: int
    writing: int

    def read(self, until: bytes, timeout_s: float = 10) -> bytes:
        """Read what comes, until it ends so."""
        got = b""
        deadline = time.monotonic() + timeout_s
        while not got.endswith(until):
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.reading], [], [], left)[0], got[-200:]
            got += os.read(self.reading, 1 << 20)
        return got


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    made = Pipe(reading, writing)
    yield made
    for descriptor in (made.reading, made.writing):
        if descriptor >= 0:
            os.close(descriptor)


def test_lines_of_both_logs_keep_their_order(pipe: Pipe) -> None:
    """They come out whole and in the order in which they were given."""
    writer = LineWriter(pipe.writing)
    for number in range(1000):
        (writer.usage, writer.process)[number % 2].write(b"%d\n" % number)
    assert pipe.read(b"999\n") == b"".join(b"%d\n" % number for number in range(1000))
    assert writer.flush(5)


def test_a_line_does_not_wait_for_others(pipe: Pipe) -> None:
    """What is written comes out, whether or not more follows."""
    writer = LineWriter(pipe.writing)
    for _ in range(3):
        writer.usage.write(b"x\n")
        assert pipe.read(b"\n") == b"x\n"


def test_reader_that_stands_still(pipe: Pipe) -> None:
    """Nobody waits; what is too much is dropped and counted, and what was taken comes out whole
    when the reader goes on."""
    writer = LineWriter(pipe.writing, max_held_bytes=20_000)
    line = b"x" * 999 + b"\n"
    began = time.monotonic()
    for _ in range(100):
        writer.usage.write(line)
    writer.process.write(b"y" * 1000)
    assert time.monotonic() - began < 5
    assert not writer.flush(0.05)
    assert writer.usage.losses.by_fault == {LogFault.BUFFER_FULL: 80}
    assert writer.process.losses.by_fault == {LogFault.BUFFER_FULL: 1}
    assert pipe.read(line * 20) == line * 20
    assert writer.flush(5)
    writer.usage.write(b"last\n")
    assert pipe.read(b"last\n") == b"last\n"
    assert writer.flush(5)


def test_nobody_reads_any_more(pipe: Pipe) -> None:
    """Lines are lost, and counted for the log whose they are."""
    writer = LineWriter(pipe.writing)
    os.close(pipe.reading)
    pipe.reading = -1
    writer.usage.write(b"1\n")
    writer.process.write(b"2\n")
    writer.usage.write(b"3\n")
    assert writer.flush(5)
    assert writer.usage.losses.by_fault == {LogFault.CLOSED: 2}
    assert writer.process.losses.by_fault == {LogFault.CLOSED: 1}
    assert writer.usage.losses.details == {LogFault.CLOSED: "Broken pipe"}


def test_descriptor_that_does_not_block(pipe: Pipe) -> None:
    """Whoever shares it may have made it so; nothing is lost by that."""
    os.set_blocking(pipe.writing, False)
    writer = LineWriter(pipe.writing)
    lines = [b"%d" % number + b"x" * 300 + b"\n" for number in range(500)]
    for line in lines:
        writer.usage.write(line)
    assert not writer.flush(0.05)  # the pipe is full
    assert pipe.read(lines[-1]) == b"".join(lines)
    assert writer.flush(5)
    assert writer.usage.losses.total == 0


_FILLING = """
import os
import sys
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from sidecar.lines import LineWriter
from tests.support.running import ROOT

# No file may be longer, which is for a line what a full disk is.
_, most = getrlimit(RLIMIT_FSIZE)
setrlimit(RLIMIT_FSIZE, (60, most))
writer = LineWriter(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT))
for number in range(5):
    writer.usage.write(b"%d: a line of 24 letters.\\n" % number)
assert writer.flush(10)
setrlimit(RLIMIT_FSIZE, (most, most))
writer.process.write(b"room\\n")
assert writer.flush(10)
print(dict(writer.usage.losses.by_fault), writer.process.losses.total)
"""


def test_standard_output_on_a_full_disk(tmp_path: Path) -> None:
    """Of lines that are written together those that got out whole are not lost, and one that is
    cut off spoils no other."""
    path = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", _FILLING, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "{<LogFault.NO_SPACE: 'no_space'>: 3} 0\n"
    whole = b"0: a line of 24 letters.\n1: a line of 24 letters.\n"
    assert path.read_bytes() == whole + b"2: a line of 24 letters.\n"[: 60 - len(whole)] + (
        b"\nroom\n"
    )
