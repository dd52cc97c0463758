"""Checks what is installed by name: the lock files, and the licences of what ships.

    python scripts/locks.py

Works without a network, and ends with 1 where something is wrong: a requirement that is not
pinned by version and hash, or that says where it comes from; a dependency of the project that no
lock has; a package of the image whose licence is not among those below, or that is installed here
in another version. Whether a version has known vulnerabilities nobody can tell offline: that is
`make audit`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["faults_of_image", "faults_of_lock", "licence_of", "main"]

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "requirements" / "runtime.txt"

_PIN = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]*)==(\S+)(?: ; [^\\]+)?((?: --hash=sha256:[0-9a-f]{64})+)"
)
# Permissive, and MPL-2.0, whose terms end at its own files, which are not changed.
_LICENCES = frozenset(
    {"MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC", "PSF-2.0", "MPL-2.0"}
)
# What packages wrote before there were licence expressions (PEP 639).
_OLD_NAMES = {
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def pins_of(text: str) -> tuple[dict[str, str], list[str]]:
    """Read a lock file: the version of each package, and what is no pin."""
    pins: dict[str, str] = {}
    faults = []
    lines = re.sub(r"\s*#.*", "", text.replace("\\\n", " ")).splitlines()
    for line in (re.sub(r"\s+", " ", line).strip() for line in lines):
        match = _PIN.fullmatch(line)
        if match:
            pins[match[1].lower().replace("_", "-")] = match[2]
        elif line:
            faults.append(f"not pinned by version and hash: {line[:60]}")
    return pins, faults


def faults_of_lock(path: Path) -> list[str]:
    """Say what is wrong with a lock file."""
    pins, faults = pins_of(path.read_text(encoding="utf-8"))
    if not pins:
        faults.append("there is nothing in it")
    return [f"{path.name}: {fault}" for fault in faults]


def licence_of(package: Distribution) -> set[str]:
    """Name the licences of an installed package; all of them have to be allowed."""
    metadata = package.metadata
    expression = (metadata.get_all("License-Expression") or [""])[0]
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License ::") and not text.endswith("OSI Approved")
    ]
    if not expression:
        expression = " AND ".join(_OLD_NAMES.get(text, text) for text in classifiers)
    if not expression:
        expression = (metadata.get_all("License") or ["unknown"])[0].strip().partition("\n")[0]
    return {_OLD_NAMES.get(part, part) for part in re.split(r" AND | OR |[()]", expression) if part}


def faults_of_image() -> list[str]:
    """Say what is wrong with what the image installs."""
    pins, _ = pins_of(IMAGE.read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^A-Za-z0-9._-]", text)[0] for text in project["dependencies"]]
    faults = [f"{name} is not locked" for name in names if name.lower() not in pins]
    for name, version in pins.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # it is for another platform
        if package.version != version:
            faults.append(f"{name} {package.version} is installed, and {version} locked")
        if strange := licence_of(package) - _LICENCES:
            faults.append(f"{name} has the licence {', '.join(sorted(strange))}")
    return [f"{IMAGE.name}: {fault}" for fault in faults]


def main() -> int:
    """Check all; return the exit code."""
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    faults = [fault for path in locks for fault in faults_of_lock(path)] + faults_of_image()
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
