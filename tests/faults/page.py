"""What `docs/faults.md` says of the lab's cases, in words."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.cases import CASES
from tests.faults.model import MEMORY_BYTES, Case

__all__ = ["MEMORY", "ROWS"]


def _rows() -> Iterator[tuple[str, str, str]]:
    for chapter, cases in CASES.items():
        yield f"**{chapter}**", "", ""
        for case in cases:
            yield _what(case), str(case.gets), str(case.counts)


def _what(case: Case) -> str:
    name = case.name[0].upper() + case.name[1:]
    return name if case.settings == "default" else f"{name} †"


ROWS = list(_rows())
"""What happens, what the client gets and what is counted; a chapter is a row, too."""

MEMORY = (
    f"In none of them had the process more than {MEMORY_BYTES >> 20} MiB above what it had before "
    "the first."
)
