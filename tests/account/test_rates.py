"""What a usage costs: every figure here is worked by hand, in USD."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from sidecar.account.rates import (
    ATTO,
    Cost,
    RateClass,
    RateKey,
    Rates,
    SourceCard,
    Unpriced,
    cost_of,
)

# USD per million tokens of Claude Sonnet 4.5, and per thousand searches, as Anthropic lists them.
SONNET = Rates(*(round(usd * ATTO) for usd in (3e-6, 3e-7, 3.75e-6, 6e-6, 15e-6, 0.01)))
LONG = Rates(*(round(usd * ATTO) for usd in (6e-6, 6e-7, 7.5e-6, 12e-6, 22.5e-6, 0.01)))
BRACKETS = ((200_000, LONG), (-1, SONNET))


def cost(tokens: tuple[int, int, int, int, int], output: int = 0, searches: int = 0) -> Cost:
    found = cost_of(BRACKETS, tokens, output, searches, only_5m=False)
    assert isinstance(found, Cost)
    return found


def usd(atto: int) -> Decimal:
    return Decimal(atto) / ATTO


@pytest.mark.parametrize(
    ("tokens", "output", "searches", "total"),
    [
        # 7 x 3 + 2101 x 3.75 + 16 x 15 = 21 + 7878.75 + 240 USD per million
        pytest.param((7, 0, 2101, 0, 0), 16, 0, "0.00813975", id="write-5m"),
        # 21 + 2101 x 6 + 240 = 21 + 12606 + 240
        pytest.param((7, 0, 0, 2101, 0), 16, 0, "0.012867", id="write-1h"),
        # 21 + 2101 x 0.3 + 240 = 21 + 630.3 + 240
        pytest.param((7, 2101, 0, 0, 0), 16, 0, "0.0008913", id="read"),
        # 21 + 1000 x 0.3 + 500 x 3.75 + 300 x 6 + 240 = 21 + 300 + 1875 + 1800 + 240
        pytest.param((7, 1000, 500, 300, 0), 16, 0, "0.004236", id="all"),
        # 240 + 3 searches at 10 per thousand
        pytest.param((0, 0, 0, 0, 0), 16, 3, "0.03024", id="searches"),
        # at the threshold the short prices hold: 200000 x 3 + 240
        pytest.param((200_000, 0, 0, 0, 0), 16, 0, "0.60024", id="at-200k"),
        # above it the long ones, for every token: 200001 x 6 + 16 x 22.5
        pytest.param((200_001, 0, 0, 0, 0), 16, 0, "1.200366", id="above-200k"),
        # what was read and written counts to the size: 1 x 6 + 150000 x 0.6 + 50000 x 12 + 0
        pytest.param((1, 150_000, 0, 50_000, 0), 0, 0, "0.690006", id="above-200k-cached"),
    ],
)
def test_hand_worked(
    tokens: tuple[int, int, int, int, int], output: int, searches: int, total: str
) -> None:
    """The cost is what a person works out from the list prices, to the last digit."""
    assert usd(cost(tokens, output, searches).total) == Decimal(total)


def test_each_kind_is_its_tokens() -> None:
    """The parts stand in the order of `CostKind`, and are the tokens at their rate."""
    kinds = cost((7, 1000, 500, 300, 0), 16, 3).kinds
    assert [str(usd(atto).normalize()) for atto in kinds] == [
        "0.000021",
        "0.0003",
        "0.001875",
        "0.0018",
        "0",
        "0.00024",
        "0.03",
    ]


def test_savings_and_premiums_are_differences_from_ordinary_input() -> None:
    """1000 read at 0.3 instead of 3 save 0.0027; 500 written at 3.75 cost 0.000375 more, and 300
    at 6 cost 0.0009 more."""
    found = cost((7, 1000, 500, 300, 0))
    assert usd(found.read_savings) == Decimal("0.0027")
    assert list(map(usd, found.write_premiums)) == [Decimal("0.000375"), Decimal("0.0009"), 0]


def test_nothing_falls_where_a_read_is_dearer_or_a_write_cheaper() -> None:
    """Counters only rise, whatever prices are given."""
    odd = Rates(10, 11, 9, 8, 1, 1)
    found = cost_of([(-1, odd)], (1, 1, 1, 1, 0), 1, 1, only_5m=False)
    assert found == Cost((10, 11, 9, 8, 0, 1, 1), 0, (0, 0, 0))


@pytest.mark.parametrize(
    ("missing", "tokens", "reason"),
    [
        ("uncached", (0, 1, 0, 0, 0), Unpriced.NO_UNCACHED_RATE),
        ("read", (1, 1, 0, 0, 0), Unpriced.NO_READ_RATE),
        ("write_5m", (1, 0, 1, 0, 0), Unpriced.NO_WRITE_5M_RATE),
        ("write_1h", (1, 0, 0, 1, 0), Unpriced.NO_WRITE_1H_RATE),
        ("output", (1, 0, 0, 0, 0), Unpriced.NO_OUTPUT_RATE),
        ("server_tool", (1, 0, 0, 0, 0), Unpriced.NO_SERVER_TOOL_RATE),
    ],
)
def test_a_rate_that_is_not_known_prices_nothing(
    missing: str, tokens: tuple[int, int, int, int, int], reason: Unpriced
) -> None:
    """No part of such a response is priced, and no other rate stands in."""
    rates = SONNET._replace(**{missing: None})
    assert cost_of([(-1, rates)], tokens, 1, 1, only_5m=True) is reason


@pytest.mark.parametrize("missing", ["read", "write_5m", "write_1h", "output", "server_tool"])
def test_a_rate_that_is_not_needed_may_be_unknown(missing: str) -> None:
    """What was not used needs no price."""
    rates = SONNET._replace(**{missing: None})
    found = cost_of([(-1, rates)], (7, 0, 0, 0, 0), 0, 0, only_5m=False)
    assert isinstance(found, Cost)
    assert usd(found.total) == Decimal("0.000021")


def test_written_tokens_of_unknown_ttl() -> None:
    """They have a price if the request can have written for five minutes alone, or if both TTLs
    cost the same."""
    tokens = (0, 0, 0, 0, 1000)
    assert cost_of([(-1, SONNET)], tokens, 0, 0, only_5m=False) is Unpriced.UNKNOWN_TTL
    known = cost_of([(-1, SONNET)], tokens, 0, 0, only_5m=True)
    assert isinstance(known, Cost)
    assert usd(known.kinds[4]) == Decimal("0.00375")
    assert usd(known.write_premiums[2]) == Decimal("0.00075")
    same = cost_of([(-1, SONNET._replace(write_1h=SONNET.write_5m))], tokens, 0, 0, only_5m=False)
    assert same == known
    neither = SONNET._replace(write_5m=None, write_1h=None)
    assert cost_of([(-1, neither)], tokens, 0, 0, only_5m=False) is Unpriced.NO_WRITE_5M_RATE


def test_a_sum_of_a_million_is_exact() -> None:
    """Floats would be off by then; a counter that is read as a float is off by its last bit."""
    each = cost((7, 2101, 11, 13, 0), 16)
    assert Fraction(sum(each.total for _ in range(1_000_000)), ATTO) == Fraction("1010.55")


def test_a_source_with_long_prices_does_not_know_the_one_it_leaves_out() -> None:
    """A rate without its long-context form is not taken for a long prompt."""
    card = SourceCard(
        {
            RateKey(RateClass.UNCACHED): Decimal(1),
            RateKey(RateClass.WRITE_1H): Decimal(2),
            RateKey(RateClass.UNCACHED, above=200_000): Decimal(3),
            RateKey(RateClass.SERVER_TOOL): Decimal(4),
        }
    )
    assert card.rate(RateClass.UNCACHED, "standard", 0) == 1
    assert card.rate(RateClass.UNCACHED, "standard", 200_000) == 3
    assert card.rate(RateClass.UNCACHED, "standard", 500_000) == 3
    assert card.rate(RateClass.WRITE_1H, "standard", 0) == 2
    assert card.rate(RateClass.WRITE_1H, "standard", 200_000) is None
    assert card.rate(RateClass.UNCACHED, "batch", 0) is None
    assert card.rate(RateClass.SERVER_TOOL, "batch", 200_000) == 4
