"""How tests are shared out between the processes of `pytest --numprocesses`.

What shares a rig runs in one process, one test after the other: so a rig is started once, and
what its books and series count is the test's own. The tests of one file share its fixtures, and
those that use a rig of the whole session are together, whatever file they are in: their names
have the rig's, as `test_it[litellm-1.83.10-json]` has.

Contract: only the order and the process of a test depend on this, never what it finds. Any file
runs by itself, and all of them in one process, without it.
"""

from __future__ import annotations

import re

from xdist.scheduler import LoadScopeScheduling

__all__ = ["RigScheduling", "place_of", "rig_id", "unit_of"]

_RIG = re.compile(r"\[(?:.*-)?((?:litellm|keyed)-\d+\.\d+\.\d+)(?:-.*)?\]$", re.DOTALL)


def rig_id(rig: str, version: str) -> str:
    """What stands for a rig in the name of each test that uses it."""
    return f"{rig}-{version}"


def unit_of(nodeid: str) -> str:
    """The rig that a test uses, else its file."""
    file, _, test = nodeid.partition("::")
    found = _RIG.search(test)
    return found[1] if found else file


# Where the long files are. What takes longest goes first, else one process ends with it alone:
# the rigs, then these, then all the others.
_LONG = ("tests/e2e/", "tests/observe/", "tests/faults/", "tests/proxy/", "tests/test_")


def place_of(nodeid: str) -> int:
    """When a test's turn comes, among those of other rigs and files."""
    unit = unit_of(nodeid)
    if not unit.endswith(".py"):
        return 0
    places = (place for place, long in enumerate(_LONG, start=1) if unit.startswith(long))
    return next(places, len(_LONG) + 1)


class RigScheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Gives a process the tests of a rig, or of a file, at a time, in the order of `place_of`."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
