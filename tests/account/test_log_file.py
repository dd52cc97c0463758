"""A file of lines: full disks, rotation by us and by others, and directories that come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.account import log_file
from sidecar.account.log_file import LogFile
from sidecar.exchange import LogFault
from tests.support.running import ROOT


class Clock:
    """Monotonic seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "usage.log"


Open = Callable[..., LogFile]


@pytest.fixture
def open_log(path: Path, clock: Clock) -> Iterator[Open]:
    """Open log files at the path, and close them at the end."""
    path.parent.mkdir()
    opened: list[LogFile] = []

    def open_one(**options: Any) -> LogFile:
        opened.append(LogFile(path, clock=clock, **options))
        return opened[-1]

    yield open_one
    for log in opened:
        log.close()


def test_lines_are_appended(open_log: Open, path: Path) -> None:
    """To what is there, each at once, and not for everybody to read."""
    path.write_bytes(b"old\n")
    log = open_log()
    log.write(b"1\n")
    assert path.read_bytes() == b"old\n1\n"
    log.write(b"2\n")
    assert path.read_bytes() == b"old\n1\n2\n"
    path.unlink()
    open_log()
    assert path.stat().st_mode & 0o007 == 0


def test_line_is_one_write(open_log: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the system for each line, and none besides until a second is over."""
    log = open_log(max_bytes=1000)
    calls: list[bytes] = []

    def write(descriptor: int, data: bytes) -> int:
        calls.append(data)
        return len(data)

    # The log's alone: other threads of this process write, too.
    monkeypatch.setattr(log_file, "os", SimpleNamespace(**vars(os) | {"write": write}))
    monkeypatch.setattr(Path, "stat", lambda self: pytest.fail("looked"))
    for number in range(3):
        log.write(b"%d\n" % number)
    assert calls == [b"0\n", b"1\n", b"2\n"]


@pytest.mark.parametrize("there", ["no directory", "a directory", "a pipe", "no name for a file"])
def test_unusable_path(open_log: Open, path: Path, there: str) -> None:
    """What cannot be written to, or could stop us, is refused at the start."""
    if there == "no directory":
        path.parent.rmdir()
    elif there == "a directory":
        path.mkdir()
    elif there == "a pipe":
        os.mkfifo(path)
    else:
        path = path.with_name("x" * 256)
    with pytest.raises(OSError, match=r".") as caught:
        LogFile(path)
    assert caught.value.strerror


# Full disks.


_FILLING = """
import sys
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from sidecar.account.log_file import LogFile

# No file may be longer, which is for a line what a full disk is.
_, most = getrlimit(RLIMIT_FSIZE)
setrlimit(RLIMIT_FSIZE, (60, most))
now = 0.0
log = LogFile(Path(sys.argv[1]), clock=lambda: now)
for number in range(5):
    log.write(b"%d: a line of 24 letters.\\n" % number)
print(dict(log.losses.by_fault), log.losses.details)
setrlimit(RLIMIT_FSIZE, (most, most))
log.write(b"room\\n")
now = 5.0
log.write(b"more\\n")
print(log.losses.total)
"""


def test_full_disk(tmp_path: Path) -> None:
    """A line that is cut off is counted and spoils no other; with room again all goes on."""
    path = tmp_path / "usage.log"
    done = subprocess.run(
        [sys.executable, "-c", _FILLING, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "{<LogFault.NO_SPACE: 'no_space'>: 3} {<LogFault.NO_SPACE: 'no_space'>: 'File too large'}",
        "3",
    ]
    line = b"a line of 24 letters.\n"
    whole = b"0: " + line + b"1: " + line
    assert path.read_bytes() == whole + (b"2: " + line)[: 60 - len(whole)] + b"\nroom\nmore\n"


def test_torn_end_of_an_earlier_run(open_log: Open, path: Path) -> None:
    """The first line does not go on where another one broke off."""
    path.write_bytes(b'{"event":')
    open_log().write(b"1\n")
    assert path.read_bytes() == b'{"event":\n1\n'


# Rotation by others.


def test_renamed_file(open_log: Open, path: Path, clock: Clock) -> None:
    """What renames the file gets all that came before, and the new file all that comes later; a
    second may pass until then."""
    log = open_log()
    log.write(b"1\n")
    path.rename(path.with_suffix(".old"))
    log.write(b"2\n")
    clock.now = 1.0
    log.write(b"3\n")
    assert path.with_suffix(".old").read_bytes() == b"1\n2\n"
    assert path.read_bytes() == b"3\n"
    assert log.losses.total == 0


def test_emptied_file(open_log: Open, path: Path, clock: Clock) -> None:
    """Lines go on at the new beginning, and the size is counted from there."""
    log = open_log(max_bytes=10)
    log.write(b"12345678\n")
    os.truncate(path, 0)
    clock.now = 1.0
    log.write(b"2\n")
    assert path.read_bytes() == b"2\n"
    assert sorted(path.parent.iterdir()) == [path]


def test_directory_that_is_gone(open_log: Open, path: Path, clock: Clock) -> None:
    """Lines are lost, and counted, until it is back."""
    log = open_log()
    log.write(b"1\n")
    shutil.rmtree(path.parent)
    clock.now = 1.0
    for _ in range(3):
        log.write(b"lost\n")
    assert dict(log.losses.by_fault) == {LogFault.UNAVAILABLE: 3}
    assert log.losses.details == {LogFault.UNAVAILABLE: "No such file or directory"}
    path.parent.mkdir()
    log.write(b"lost\n")
    clock.now = 2.0
    log.write(b"2\n")
    assert path.read_bytes() == b"2\n"
    assert log.losses.total == 4


def test_file_that_cannot_be_made_anew(open_log: Open, path: Path, clock: Clock) -> None:
    """As long as the old one is to be found under another name, it is written to."""
    log = open_log()
    log.write(b"1\n")
    old = path.rename(path.with_suffix(".old"))
    path.mkdir()
    clock.now = 1.0
    log.write(b"2\n")
    assert old.read_bytes() == b"1\n2\n"
    assert dict(log.losses.by_fault) == {LogFault.UNAVAILABLE: 1}
    path.rmdir()
    clock.now = 2.0
    log.write(b"3\n")
    assert path.read_bytes() == b"3\n"


# Rotation by size.


def contents(path: Path) -> dict[str, bytes]:
    return {found.name: found.read_bytes() for found in path.parent.iterdir()}


def test_rotation(open_log: Open, path: Path) -> None:
    """A line that would make the file too large begins a new one; so many old ones are kept."""
    log = open_log(max_bytes=6, files=2)
    for number in range(11):
        log.write(b"%02d\n" % number)
    assert contents(path) == {
        "usage.log": b"10\n",
        "usage.log.1": b"08\n09\n",
        "usage.log.2": b"06\n07\n",
    }
    log.write(b"a line longer than a file\n")
    log.write(b"12\n")
    assert contents(path)["usage.log.1"] == b"a line longer than a file\n"
    assert log.losses.total == 0


def test_rotation_goes_on_after_a_restart(open_log: Open, path: Path) -> None:
    """The size of what was there counts."""
    path.write_bytes(b"12345\n")
    open_log(max_bytes=6).write(b"2\n")
    assert contents(path) == {"usage.log": b"2\n", "usage.log.1": b"12345\n"}


def test_rotation_that_fails(open_log: Open, path: Path, clock: Clock) -> None:
    """The file grows on, nothing is lost and no old file moved; a second later it is tried
    again."""
    log = open_log(max_bytes=6, files=2)
    path.with_name("usage.log.1").mkdir()
    (path.with_name("usage.log.1") / "in the way").touch()
    path.with_name("usage.log.2").write_bytes(b"old\n")
    (path.with_name("usage.log.2")).chmod(0o400)
    for number in range(5):
        log.write(b"%02d\n" % number)
    assert path.read_bytes() == b"00\n01\n02\n03\n04\n"
    assert dict(log.losses.by_fault) == {LogFault.ROTATION: 1}
    assert path.with_name("usage.log.2").read_bytes() == b"old\n"
    shutil.rmtree(path.with_name("usage.log.1"))
    clock.now = 1.0
    log.write(b"05\n")
    assert contents(path) == {
        "usage.log": b"05\n",
        "usage.log.1": b"00\n01\n02\n03\n04\n",
        "usage.log.2": b"old\n",
    }


def test_two_that_rotate_one_file(open_log: Open, path: Path) -> None:
    """Before it renames, each looks whether the other has done so already."""
    one, other = open_log(max_bytes=6, files=9), open_log(max_bytes=6, files=9)
    for number in range(6):
        (one, other)[number % 2].write(b"%02d\n" % number)
    assert sorted(b"".join(contents(path).values()).split()) == [
        b"%02d" % number for number in range(6)
    ]
