"""The rooms of the house, and who may know whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sidecar"
ROOMS = ("proxy", "observe", "account", "admin")
# What each room may import of the package, besides itself.
ALLOWED = {
    "exchange.py": set(),
    "errors.py": {"sidecar.exchange"},
    "config.py": {"sidecar.exchange", "sidecar.errors"},
    "proxy": {"sidecar.exchange", "sidecar.errors"},
    "observe": {"sidecar.exchange"},
    "lines.py": {"sidecar.exchange"},
    "account": {"sidecar", "sidecar.exchange", "sidecar.errors", "sidecar.lines"},
    "admin": {"sidecar", "sidecar.exchange"},
}
# No I/O, clock, logger, metrics or settings in the pure room.
IMPURE = {"asyncio", "logging", "os", "socket", "time", "httpx", "prometheus_client", "starlette"}


def imports(path: Path) -> set[str]:
    """Name the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_know_only_what_they_may(room: str) -> None:
    """Data moves one way: no room imports another."""
    place = PACKAGE / room
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        own = {name for name in imports(path) if name.split(".")[0] == "sidecar"}
        strangers = {name for name in own - ALLOWED[room] if not name.startswith(f"sidecar.{room}")}
        assert not strangers, path


def test_observation_is_pure() -> None:
    """Nothing in `observe` can do I/O, read a clock or log."""
    for path in sorted((PACKAGE / "observe").rglob("*.py")):
        assert not {name.split(".")[0] for name in imports(path)} & IMPURE, path


def test_every_room_is_checked() -> None:
    """A new room has to be entered here."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert rooms - {"demo"} == set(ROOMS)
