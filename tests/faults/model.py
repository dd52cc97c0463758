"""What a row of the table is made of: what happens, what the client gets, what is counted.

Each part says itself in words, for the page, and is what the lab compares with: there is no
second place where a claim could stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tests.faults.answers import INPUT
from tests.faults.script import Step

__all__ = [
    "MEMORY_BYTES",
    "Case",
    "Counts",
    "Cut",
    "Gets",
    "Left",
    "Listening",
    "Reaches",
    "Refused",
    "Same",
    "Script",
    "Scripts",
    "Series",
    "Whole",
]

MEMORY_BYTES = 64 << 20
"""How much the process may grow in a case, at its highest. A JSON answer is kept up to 4 MiB, an
event up to 1 MiB, and JSON that msgspec refuses is read by the standard library's decoder, which
makes up to ten times its size of it."""

Script = Sequence[Step]
Series = Counter[tuple[str, str]]
"""How much was counted, by family and by the value of the label that is looked at."""


class Scripts(NamedTuple):
    """What both ends of a play do."""

    upstream: Sequence[Script]
    """From the end of a request's head on: the first time it is asked, the second, and so on."""
    client: Script


@dataclass(frozen=True, slots=True)
class Same:
    """What a client gets that asks the upstream itself, to the byte."""

    complete: bool = True

    def __str__(self) -> str:
        return "the same answer" if self.complete else "the same bytes, then a cut"


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer of status 200 with this body, to its end."""

    body: bytes

    def __str__(self) -> str:
        return "the answer"


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer of the sidecar's own."""

    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.status} `{self.reason}`"


@dataclass(frozen=True, slots=True)
class Cut:
    """An answer of status 200 that is visibly short of its end, and nothing behind it."""

    body: bytes
    """All that comes of it."""

    def __str__(self) -> str:
        return "what came before the fault, then a cut"


@dataclass(frozen=True, slots=True)
class Left:
    """Whatever it is, the client did not wait for it."""

    def __str__(self) -> str:
        return "it has left"


Gets = Same | Whole | Refused | Cut | Left


class Listening(Enum):
    """What becomes of a connection to the upstream's port."""

    YES = "taken"
    NO = "refused"
    FULL = "left to wait"


class Reaches(Enum):
    """What the upstream sees of the request."""

    NOTHING = "nothing"
    PART = "part"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Counts:
    """What one play adds to the counters; what is not said stays as it was."""

    code: int | None = 200
    status: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    """By cache class; `output` among them."""
    failure: str | None = None
    left: bool = False
    refused: str | None = None
    before: Counts | None = None
    """Of the request before it, where there is one."""

    def series(self) -> Series:
        """Say it as the lab sums the exposition."""
        said: Series = Counter() if self.before is None else self.before.series()
        if self.code is not None:
            said["http_requests", str(self.code)] += 1
        if self.status is not None:
            said["observations", self.status] += 1
        for kind, tokens in self.tokens.items():
            key = ("output_tokens", "") if kind == "output" else ("input_tokens", kind)
            said[key] += tokens
        if self.failure is not None:
            said["upstream_failures", self.failure] += 1
        if self.refused is not None:
            said["refusals", self.refused] += 1
        if self.left:
            said["client_disconnects", ""] += 1
        return said

    def __str__(self) -> str:
        parts = []
        if self.code is not None:
            parts.append(f"code {self.code}")
        if self.status is not None:
            parts.append(f"`{self.status}`")
        tokens = dict(self.tokens)
        if tokens.items() >= INPUT.items():
            parts.append("input")
            tokens = {kind: count for kind, count in tokens.items() if kind not in INPUT}
        parts += [f"{kind} {count}" for kind, count in tokens.items()]
        if self.failure is not None:
            parts.append(f"failure `{self.failure}`")
        if self.refused is not None:
            parts.append(f"refusal `{self.refused}`")
        if self.left:
            parts.append("a client left")
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True, slots=True)
class Case:
    """A row: what happens, in words and as scripts, and what is to come of it."""

    name: str
    plays: Callable[[], Iterable[Scripts]]
    gets: Gets
    counts: Counts
    more: Callable[[], Iterable[Scripts]] | None = None
    """Further plays of the same row, for the long run."""
    settings: str = "default"
    listening: Listening = Listening.YES
    reaches: Reaches | None = None
    """None where it does not matter, or depends on time."""
