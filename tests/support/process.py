"""Child processes of the test rig: free ports, readiness, the end of a whole process group.

Contract: what is started here is ended here, by its own id, within a bounded time; also when this
process is killed, or ends without its fixtures, as it does at a test's time-out.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.secrets import assert_no_keys

__all__ = [
    "ManagedProcess",
    "ReadinessError",
    "checked",
    "coverage_environment",
    "free_port",
    "said_until",
]

_LOG_TAIL_BYTES = 6000
_POLL_S = 0.1
_TERM_WAIT_S = 10.0
_KILL_WAIT_S = 5.0


# Reads "+ group" and "- group", and at the end of its input kills the groups that are left.
_REAPER = """
groups=
while read -r sign group; do
  case $sign$groups in
    +*) groups="$groups $group " ;;
    -*" $group "*) groups="${groups%% $group *} ${groups#* $group }" ;;
  esac
done
for group in $groups; do kill -s KILL -- "-$group"; done
"""


class ReadinessError(RuntimeError):
    """A child ended, or was not ready in time; the text has the end of its log."""


def checked(
    *command: str,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> str:
    """Run a checker to its end; its words are the assertion's message, or what is returned."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def said_until(child: subprocess.Popen[str], words: str) -> str:
    """Read what a process says up to the line with these words."""
    said = ""
    assert child.stdout is not None
    for line in child.stdout:
        said += line
        if words in line:
            break
    return said


def coverage_environment() -> dict[str, str]:
    """What coverage.py hands to child processes where it measures; else empty."""
    return {key: value for key, value in os.environ.items() if key.startswith("COVERAGE_")}


# The sockets of the last ports that were given away.
_reserved: deque[socket.socket] = deque(maxlen=64)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody else is given, for a child that cannot inherit a socket.

    The port stays bound here, but without a listener: on Linux the child may bind it beside this,
    as all servers do with `SO_REUSEADDR`, while no other process gets it when it asks for any.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    if len(_reserved) == _reserved.maxlen:
        _reserved.popleft().close()
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])


class _Reaper:
    """A process that outlives this one, to end the groups that this one has not ended."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def add(self, group: int) -> None:
        """End this group, should this process not come to it."""
        self._write(f"+ {group}\n")

    def remove(self, group: int) -> None:
        """Forget a group that has ended, before its number is another's."""
        self._write(f"- {group}\n")

    def _write(self, line: str) -> None:
        if self._child is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._child = subprocess.Popen(
                ["sh", "-c", _REAPER],
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # What is sent to the terminal's group must not reach it.
                start_new_session=True,
            )
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode())
        self._child.stdin.flush()


_reaper = _Reaper()


class ManagedProcess:
    """One child in a process group of its own, its output in a file."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        log: Path,
        environment: Mapping[str, str],
        watched: bool = True,
    ) -> None:
        """Start the child.

        Args:
            command: program and arguments.
            directory: its working directory.
            log: where its output goes, both streams in one.
            environment: all of its environment; nothing is inherited but what measures coverage.
            watched: whether a key in its output is a fault; of a sidecar, however started, it is.
        """
        self.log = log
        self._watched = watched
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                list(command),
                cwd=directory,
                env={**coverage_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _reaper.add(self._child.pid)

    @property
    def pid(self) -> int:
        """The child's id, which is its group's id too."""
        return self._child.pid

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Poll until ready; the child is stopped when it is not.

        Raises:
            ReadinessError: with the end of the log.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            ended = self._child.poll()
            if ended is not None or time.monotonic() > deadline:
                self.stop()
                what = f"ended with {ended}" if ended is not None else f"not ready in {timeout_s} s"
                raise ReadinessError(f"{what}; {self.log} ends:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def log_tail(self) -> str:
        """The last kilobytes of the log."""
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send the child alone a signal."""
        self._child.send_signal(number)

    def exit_code(self, *, timeout_s: float) -> int:
        """Wait for the child to end by itself."""
        return self._child.wait(timeout_s)

    def stop(self) -> None:
        """Ask the group to end, then make it; waits some seconds at most.

        Raises:
            AssertionError: it is watched, and has written a key.
        """
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(_TERM_WAIT_S)
        # Also when the leader has ended: a worker of it may still be there.
        self._signal(signal.SIGKILL)
        self._child.wait(_KILL_WAIT_S)
        _reaper.remove(self._child.pid)
        if self._watched:
            assert_no_keys(self.log.read_bytes(), f"the output in {self.log}")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)
