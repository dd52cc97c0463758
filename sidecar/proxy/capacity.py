"""How many requests may be under way at once."""

from __future__ import annotations

import sys

__all__ = ["Capacity"]


class Capacity:
    """Counts the requests that are under way, WebSockets among them.

    Whoever begins one adds it to `taken` and takes it off at its end, also one that is refused
    because of `exceeded`: so that the count cannot be wrong, and costs an addition.

    Args:
        limit: None for no limit.
    """

    __slots__ = ("_limit", "taken")

    def __init__(self, limit: int | None = None) -> None:
        self._limit = sys.maxsize if limit is None else limit
        self.taken = 0

    @property
    def exceeded(self) -> bool:
        """Whether the one that was added last is one too many."""
        return self.taken > self._limit
