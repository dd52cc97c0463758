"""Counts of tokens as they stand on the wire, and what a reading of them comes to.

Every dialect shares this: what is believed to be a count, and how the ends of a response map to
the status of its observation.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from sidecar.exchange import End, Observation, Status

__all__ = ["Count", "count_of", "status_of", "unreadable"]

_MAX_COUNT = 2**53
"""Largest count believed: above it a JSON number need not be the number that was meant
(RFC 8259 section 6)."""

Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]
"""What a decoder takes for a count, where no other number is among the members."""


def count_of(value: object) -> int | None:
    """Read a count: an integer, or a float that is one, from 0 to 2^53; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # Not `isinstance`: to Python, true and false are integers.
    return value if type(value) is int and 0 <= value <= _MAX_COUNT else None


def status_of(
    end: End,
    *,
    faults: list[str],
    oversized: bool,
    failed: bool,
    reported: bool,
    stopped: bool,
    stop: str,
) -> tuple[Status, str]:
    """Say what could be read of an answer, and why it was not all.

    Args:
        faults: what was wrong in it, in words.
        oversized: whether a part had to be skipped that may have held a usage.
        failed: whether it says that it is an error.
        reported: whether any count was seen.
        stopped: whether what closes an answer of its kind was seen.
        stop: the name of that.
    """
    if oversized:
        # First, for what is missing with it makes faults of its own.
        return Status.OVERSIZED, "an event with usage is larger than the bound"
    if faults:
        return Status.INVALID, faults[0]
    if failed:
        return Status.PARTIAL if reported else Status.ERROR, "an error event"
    if stopped and reported:
        return Status.COMPLETE, ""
    if not reported and (stopped or end is End.COMPLETE):
        return Status.MISSING, "no usage was sent"
    return Status.PARTIAL, f"the stream ended without {stop}"


def unreadable(body: bytes, end: End) -> Observation:
    """Say what a body is that is no JSON object."""
    if end is End.COMPLETE and body.strip():
        return Observation(Status.INVALID, fault="the body is not a JSON object")
    status = Status.MISSING if end is End.COMPLETE else Status.PARTIAL
    return Observation(status, fault="the body ended early" if body else "the body is empty")
