"""What a process has used, by the kernel's own accounting in /proc. Linux only.

Children count with their parent: nginx works in one, and an npm start script in another.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_s", "open_files", "peak_bytes", "process_tree", "resident_bytes"]


def process_tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:  # the thread has ended
                continue
    return found


def cpu_s(pids: list[int]) -> float:
    """CPU time of the processes so far, user and system, in seconds.

    /proc/PID/stat counts in ticks of 10 ms; the scheduler's own figure, which those ticks are
    scaled to, is in nanoseconds and is taken where the kernel keeps it.
    """
    total = 0.0
    for pid in pids:
        threads = [task / "schedstat" for task in Path(f"/proc/{pid}/task").iterdir()]
        precise = sum(int(path.read_text().split()[0]) for path in threads) / 1e9
        # Fields 14 and 15; the name, field 2, may have spaces in it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        total += precise or ticks
    return total


def _status_bytes(pids: list[int], field: str) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                total += int(line.split()[1]) * 1024
    return total


def peak_bytes(pids: list[int]) -> int:
    """Sum of the largest resident sizes so far. Pages that two processes share count twice."""
    return _status_bytes(pids, "VmHWM")


def resident_bytes(pids: list[int]) -> int:
    """Sum of the resident sizes."""
    return _status_bytes(pids, "VmRSS")


def open_files(pid: int) -> int:
    """How many file descriptors a process holds."""
    return len(os.listdir(f"/proc/{pid}/fd"))
