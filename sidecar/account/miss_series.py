"""The series of what caching missed of one label set; all exist from its first sight on."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.account.metrics import Misses
from sidecar.exchange import MissReason

__all__ = ["TTLS", "MissSeries"]

TTLS = ("5m", "1h")
"""The `ttl` label."""


class MissSeries:
    """Adds up misses, and what was written and never read.

    Args:
        values: of the labels that token series carry.
    """

    __slots__ = ("_never_read", "_premiums", "reasons")

    def __init__(self, families: Misses, values: Sequence[str]) -> None:
        self.reasons = {reason: families.reasons.child(*values, reason) for reason in MissReason}
        self._never_read = [families.never_read.child(*values, ttl) for ttl in TTLS]
        money = families.never_read_premium
        self._premiums = [money.child(*values, ttl) for ttl in TTLS] if money is not None else None

    def lose(self, ttl: str, tokens: int, premium: int) -> None:
        """Count tokens that were written and never read.

        Args:
            premium: what each had cost more than ordinary input, in attodollars.
        """
        at = TTLS.index(ttl)
        self._never_read[at].value += tokens
        if self._premiums is not None:
            self._premiums[at].atto += tokens * premium

    @staticmethod
    def count(families: Misses) -> int:
        """Say how many series a label set has."""
        each = len(TTLS) if families.never_read_premium is None else 2 * len(TTLS)
        return len(MissReason) + each
