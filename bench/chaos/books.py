"""What both ends of the run know of each exchange, written down as it happens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.chaos.plans import Plan, plan

__all__ = ["Attempt", "Books"]


@dataclass(slots=True)
class Attempt:
    """One exchange, as the client and the stand-in saw it."""

    number: int
    plan: Plan | None
    """None when it is over: it can be made anew."""
    # The client's side.
    head_written: bool = False
    """Whether all of the request's head was sent."""
    status_code: int = 0
    """Of the answer; 0 where no head came."""
    own_error: str = ""
    """Why the sidecar answered itself."""
    received: int = 0
    """Bytes of the answer's body."""
    complete: bool = False
    """Whether the answer came to its end."""
    left: bool = False
    took_s: float = 0.0
    """From the request to the answer's end, where the answer was undisturbed; else 0."""
    fault: str = ""
    """What must not be."""
    # The stand-in's side.
    seen: int = 0
    """How often the request came."""
    sent: int = 0
    """Bytes of the answer, head and framing included, that the kernel took."""
    ending: str = ""
    """How the stand-in ended it: `keep`, `fin`, `rst`, `hold`, `restart`, `gone`."""
    disturbed: bool = False
    """Whether the upstream or the sidecar went away meanwhile."""
    arrival: asyncio.Event | None = None
    """Set at each arrival at the client, while somebody waits for one."""

    def arrived(self) -> None:
        """Tell who waits that there is news."""
        if self.arrival is not None:
            self.arrival.set()


@dataclass
class Books:
    """All exchanges of a run."""

    seed: int
    attempts: list[Attempt] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What must not be and belongs to no exchange."""
    refused: int = 0
    """Connections that the sidecar did not take: no exchange began."""
    restarts: int = 0
    _disturbing: bool = False

    @contextmanager
    def disturbing(self) -> Iterator[None]:
        """Note that the upstream, or the sidecar, is away or about to leave."""
        for attempt in self.attempts:
            if attempt.plan is not None:
                attempt.disturbed = True
        self._disturbing = True
        try:
            yield
        finally:
            self._disturbing = False

    def begin(self) -> tuple[Attempt, Plan]:
        """Open the next exchange."""
        number = len(self.attempts)
        made = plan(self.seed, number)
        attempt = Attempt(number, made, disturbed=self._disturbing)
        self.attempts.append(attempt)
        return attempt, made

    def plan_of(self, attempt: Attempt) -> Plan:
        """Return the plan of an exchange, also when it is over."""
        return attempt.plan or plan(self.seed, attempt.number)
