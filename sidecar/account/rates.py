"""Rates, and what a usage costs at them: exact integers, from the rate to the counter.

Money is counted in attodollars, 10^-18 USD, so that a sum of any length is exact and an addition
costs what one of integers costs. A price page gives USD for a million tokens with up to four
decimals, and uplifts such as 1.1 on top: none of that needs more than 18 decimals a token.

Nothing here knows where a rate comes from. A rate that is not known is None, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "ATTO",
    "STANDARD",
    "Cost",
    "CostKind",
    "RateClass",
    "RateKey",
    "Rates",
    "SourceCard",
    "Unpriced",
    "cost_of",
]

ATTO = 10**18
"""Attodollars in a dollar."""

STANDARD = "standard"
"""The service tier of an answer that names none."""


class CostKind(StrEnum):
    """The `kind` label: the five input classes, in the order of `InputClass`, and the rest."""

    UNCACHED = "uncached"
    READ = "read"
    WRITE_5M = "write_5m"
    WRITE_1H = "write_1h"
    WRITE_UNKNOWN = "write_unknown"
    OUTPUT = "output"
    SERVER_TOOL = "server_tool"


class RateClass(StrEnum):
    """What has a rate: a token of each class, or one use of a server tool (a web search)."""

    UNCACHED = "uncached"
    READ = "read"
    WRITE_5M = "write_5m"
    WRITE_1H = "write_1h"
    OUTPUT = "output"
    SERVER_TOOL = "server_tool"


class Unpriced(StrEnum):
    """The `reason` label: why a response has no cost."""

    UNKNOWN_MODEL = "unknown_model"
    """No source knows the model."""
    NO_UNCACHED_RATE = "no_uncached_rate"
    """The model is known, and no source has this rate of it, for a prompt of this size."""
    NO_READ_RATE = "no_read_rate"
    NO_WRITE_5M_RATE = "no_write_5m_rate"
    NO_WRITE_1H_RATE = "no_write_1h_rate"
    NO_OUTPUT_RATE = "no_output_rate"
    NO_SERVER_TOOL_RATE = "no_server_tool_rate"
    UNKNOWN_TIER = "unknown_tier"
    """No source has prices of this service tier or speed for the model."""
    UNKNOWN_TTL = "unknown_ttl"
    """Tokens were written, and the answer does not say for how long."""
    UNKNOWN_REGION = "unknown_region"
    """The rates depend on the region that served, and it is not known."""


class RateKey(NamedTuple):
    """Which rate: of what, in which service tier, for prompts of more than how many tokens."""

    what: RateClass
    tier: str = STANDARD
    above: int = 0


@dataclass(frozen=True, slots=True)
class SourceCard:
    """What one source says of one model."""

    rates: Mapping[RateKey, Decimal]
    """USD for one token, or for one use."""
    geo: Mapping[str, Decimal] = field(default_factory=dict)
    """Factors on all token rates, by `usage.inference_geo`."""
    regional_factor: Decimal | None = None
    """Factor on all token rates outside the global endpoint; None if the source names none."""
    name: str = ""
    """The source's own name for the model."""

    @property
    def thresholds(self) -> frozenset[int]:
        """The prompt sizes from which other rates hold."""
        return frozenset(key.above for key in self.rates if key.above)

    def rate(self, what: RateClass, tier: str, above: int) -> Decimal | None:
        """Find a rate for prompts of just more than `above` tokens.

        A source that has long-context rates, but not this one, does not know this one.
        """
        if what is RateClass.SERVER_TOOL:
            # A search costs the same whatever the prompt, and no source prices it by tier.
            return self.rates.get(RateKey(what))
        return self.rates.get(RateKey(what, tier, self.reached(above)))

    def reached(self, above: int) -> int:
        """Find the threshold whose rates hold for prompts of just more than `above` tokens."""
        return max((size for size in self.thresholds if size <= above), default=0)


class Rates(NamedTuple):
    """Attodollars for one token of each class, and for one use of a server tool."""

    uncached: int | None
    read: int | None
    write_5m: int | None
    write_1h: int | None
    output: int | None
    server_tool: int | None


class Cost(NamedTuple):
    """What one response cost, in attodollars."""

    kinds: tuple[int, int, int, int, int, int, int]
    """In the order of `CostKind`."""
    read_savings: int
    """What the tokens read would have cost more without the cache."""
    write_premiums: tuple[int, int, int]
    """What the tokens written cost more than without the cache: 5 minutes, 1 hour, unknown."""

    @property
    def total(self) -> int:
        """The whole, in attodollars."""
        return sum(self.kinds)


def cost_of(
    brackets: Sequence[tuple[int, Rates]],
    tokens: tuple[int, int, int, int, int],
    output: int,
    searches: int,
    *,
    only_5m: bool,
) -> Cost | Unpriced:
    """Multiply.

    Args:
        brackets: rates by the prompt size above which they hold, the largest first; the last
            one's is -1.
        tokens: of the prompt, in the order of `InputClass`.
        output: tokens generated.
        searches: uses of server tools that are billed by use.
        only_5m: whether the request can have written for 5 minutes alone, so that written
            tokens of unknown TTL are known all the same.

    Returns:
        The cost, or why there is none: a rate that is needed is not known.
    """
    uncached, read, write_5m, write_1h, write_unknown = tokens
    prompt = uncached + read + write_5m + write_1h + write_unknown
    for above, rates in brackets:  # noqa: B007
        if prompt > above:
            break
    base, read_rate, rate_5m, rate_1h, output_rate, tool_rate = rates
    if base is None:
        # Needed whatever was sent: savings and premiums are differences from it.
        return Unpriced.NO_UNCACHED_RATE
    if read_rate is None:
        if read:
            return Unpriced.NO_READ_RATE
        read_rate = 0
    if write_unknown and not only_5m and rate_5m != rate_1h:
        return Unpriced.UNKNOWN_TTL
    if rate_5m is None:
        if write_5m or write_unknown:
            return Unpriced.NO_WRITE_5M_RATE
        rate_5m = 0
    if rate_1h is None:
        if write_1h:
            return Unpriced.NO_WRITE_1H_RATE
        rate_1h = 0
    if output_rate is None:
        if output:
            return Unpriced.NO_OUTPUT_RATE
        output_rate = 0
    if tool_rate is None:
        if searches:
            return Unpriced.NO_SERVER_TOOL_RATE
        tool_rate = 0
    # Counters only rise: where a source has reading dearer than sending, nothing is saved.
    premium_5m = rate_5m - base if rate_5m > base else 0
    return Cost(
        (
            uncached * base,
            read * read_rate,
            write_5m * rate_5m,
            write_1h * rate_1h,
            write_unknown * rate_5m,
            output * output_rate,
            searches * tool_rate,
        ),
        read * (base - read_rate) if base > read_rate else 0,
        (
            write_5m * premium_5m,
            write_1h * (rate_1h - base) if rate_1h > base else 0,
            write_unknown * premium_5m,
        ),
    )
