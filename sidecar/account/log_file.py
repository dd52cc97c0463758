"""A file that whole lines are appended to, and that may be rotated under our hands.

Each line is one `os.write` to a descriptor opened for appending: when it has returned, the line
outlives the process. Nothing raises after the start; what fails is counted in `losses`, and the
file is opened again a second later, so that a disk with room again, or a directory that is
back, needs nobody's hand.

It must not know what the lines say.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sidecar.exchange import LogFault
from sidecar.lines import Losses, fault_of

__all__ = ["LogFile"]

_LOOK_S = 1.0
"""How often the file is looked at: whether it is still the one at its path."""
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
_MODE = 0o640


class LogFile:
    """Appends lines to a file, and rotates it by size.

    Args:
        max_bytes: a file that a line would take beyond is renamed to `PATH.1` first; 0 for never.
        files: how many renamed files are kept.
        clock: monotonic seconds.

    Raises:
        OSError: the file cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 0,
        files: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._clock = clock
        self._descriptor: int | None = None
        self._identity = (0, 0)
        self._size = 0
        self._torn = False
        self._failed = False
        self._reason = ""
        self._rotation_at = 0.0
        self.losses = Losses()
        self._open()
        self._look_at = clock() + _LOOK_S

    def write(self, line: bytes) -> None:
        """Append a line, its line end included."""
        now = self._clock()
        if now >= self._look_at:
            self._look(now)
        if self._is_full(line) and now >= self._rotation_at:
            self._look(now)  # somebody else may have renamed it already
            if self._is_full(line):
                self._rotate(now)
        if self._descriptor is None:
            self.losses.add(LogFault.UNAVAILABLE, self._reason)
            return
        # A line that was cut off would take the next one down with it.
        data = b"\n" + line if self._torn else line
        written = 0
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):  # what a full disk does; the next attempt says why
                written += os.write(self._descriptor, data[written:])
        except OSError as exc:
            self._failed = True
            self.losses.add(fault_of(exc), exc.strerror or "")
        else:
            if written < len(data):
                self.losses.add(LogFault.NO_SPACE)
        if written:
            self._size += written
            self._torn = data[written - 1] != ord("\n")

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        """Open the file at the path, and let go of the one before."""
        descriptor = os.open(self._path, _FLAGS, _MODE)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                # A pipe could stop us.
                raise OSError(0, "it is not a file")
            last = os.pread(descriptor, 1, status.st_size - 1) if status.st_size else b"\n"
        except OSError:
            os.close(descriptor)
            raise
        self.close()
        self._descriptor = descriptor
        self._identity = status.st_dev, status.st_ino
        self._size = status.st_size
        self._torn = last != b"\n"
        self._failed = False

    def _is_full(self, line: bytes) -> bool:
        return 0 < self._max_bytes < self._size + len(line) and self._size > 0

    def _look(self, now: float) -> None:
        """See whether somebody has moved, removed or emptied the file."""
        self._look_at = now + _LOOK_S
        try:
            found = self._path.stat()
            same = (found.st_dev, found.st_ino) == self._identity
            if same and not self._failed and self._descriptor is not None:
                self._size = found.st_size
                return
        except OSError:
            pass
        try:
            self._open()
        except OSError as exc:
            self._reason = exc.strerror or ""
            if self._is_nowhere():
                self.close()
            else:
                self.losses.add(LogFault.UNAVAILABLE, self._reason)

    def _is_nowhere(self) -> bool:
        """Whether nobody can find any more what is written to the file that is open."""
        try:
            return self._descriptor is None or not os.fstat(self._descriptor).st_nlink
        except OSError:
            return True

    def _rotate(self, now: float) -> None:
        """Rename `PATH` to `PATH.1`, `PATH.1` to `PATH.2` and so on; begin a new file."""
        freed: int | None = None
        try:
            names = [self._path, *(self._numbered(n + 1) for n in range(self._files))]
            # Up to the first gap: a rotation that broke off is not done twice.
            last = next((n for n, name in enumerate(names) if not name.exists()), self._files)
            if last == self._files:
                freed = _held(names[last])
            for n in range(last, 0, -1):
                names[n - 1].rename(names[n])
            self._open()
        except OSError as exc:
            self._rotation_at = now + _LOOK_S
            self.losses.add(LogFault.ROTATION, exc.strerror or "")
        finally:
            if freed is not None:
                _close_elsewhere(freed)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _held(path: Path) -> int | None:
    """Hold a file that is about to be replaced, so that its blocks are not freed by that."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None


def _close_elsewhere(descriptor: int) -> None:
    """Close a file that has no name any more: to free 100 MB takes the disk some 10 ms."""
    try:
        threading.Thread(target=os.close, args=(descriptor,), daemon=True).start()
    except RuntimeError:  # no thread is to be had
        os.close(descriptor)
