"""The series of money of one label set; all of them exist from its first sight on."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.account.metrics import Costs
from sidecar.account.rates import Cost, CostKind

__all__ = ["Money"]

_TTLS = ("5m", "1h", "unknown")
"""The `ttl` label, in the order of `Cost.write_premiums`."""
_NO_PREMIUMS = (0, 0, 0)


class Money:
    """Adds up what answers cost.

    Args:
        values: of the labels that token series carry.
    """

    __slots__ = ("_kinds", "_premiums", "_savings")

    SERIES = len(CostKind) + 1 + len(_TTLS)
    """How many series a label set has."""

    def __init__(self, costs: Costs, values: Sequence[str]) -> None:
        self._kinds = [costs.cost.child(*values, kind) for kind in CostKind]
        self._savings = costs.savings.child(*values)
        self._premiums = [costs.premium.child(*values, ttl) for ttl in _TTLS]

    def add(self, cost: Cost) -> None:
        """Count a response."""
        for child, atto in zip(self._kinds, cost.kinds, strict=True):
            if atto:
                child.atto += atto
        self._savings.atto += cost.read_savings
        if cost.write_premiums != _NO_PREMIUMS:
            for child, atto in zip(self._premiums, cost.write_premiums, strict=True):
                child.atto += atto
