"""Fetches what the image installs, as wheels for each platform that it is built for.

    python scripts/wheels.py

pip takes nothing but wheels, and only those whose hash is locked: what can be fetched for a
platform can be installed there. Nothing is kept. It ends with 1 where something cannot be had.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main", "pip_arguments"]

ROOT = Path(__file__).resolve().parents[1]

_PYTHON = "3.13"  # the base's
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
# What the base's C library takes, newest first.
_KINDS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")


def pip_arguments(machine: str) -> list[str]:
    """Say to pip for which interpreter and platform it is to look."""
    platforms = [option for kind in _KINDS for option in ("--platform", f"{kind}_{machine}")]
    return [
        "--only-binary",
        ":all:",
        "--implementation",
        "cp",
        "--python-version",
        _PYTHON,
        *platforms,
    ]


def main() -> int:
    """Fetch all; return the exit code."""
    code = 0
    for name, machine in _MACHINES.items():
        with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
            for lock in ("runtime", "build"):
                path = ROOT / "requirements" / f"{lock}.txt"
                done = subprocess.run(
                    [
                        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                        *("--require-hashes", "-r", str(path), "--dest", folder),
                        *pip_arguments(machine),
                    ],
                    check=False,
                )
                code = code or done.returncode
            print(f"{name}: {len(list(Path(folder).iterdir()))} wheels")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
