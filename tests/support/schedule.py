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
from xdist.workermanage import WorkerController

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

    def remove_node(self, node: WorkerController) -> str | None:
        """Take back what a process that has ended leaves undone.

        The base hands on the test that ended it, to end the next one as well, and what has run
        to its last test, for the end of which xdist then waits without end.

        Returns:
            the test that it died of; None if it had none left.
        """
        crashed: str | None = None
        units = self.assigned_work[node]
        for unit, tests in list(units.items()):
            left = [nodeid for nodeid, ended in tests.items() if not ended]
            if left and crashed is None:
                crashed = left.pop(0)
            if left:
                units[unit] = dict.fromkeys(left, False)
            else:
                del units[unit]
        super().remove_node(node)
        return crashed

    def schedule(self) -> None:
        """Share the tests out, or see that a process that came later has work.

        It runs a test when it knows what follows: the first unit may be a single test.
        """
        super().schedule()
        for node in self.nodes:
            self._reschedule(node)
