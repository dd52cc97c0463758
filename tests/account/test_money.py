"""What the ledger makes of prices."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from sidecar.account.pricing import Pricing
from sidecar.account.rates import CostKind
from sidecar.account.store import Store
from sidecar.exchange import NO_TERMS, Status, Terms, Usage
from tests.account.test_ledger import TEAM, Books, exchange
from tests.account.test_pricing import HOUR, NOW, SONNET, cost_map

FACTORS = {"provider_specific_entry": {"us": 1.1, "fast": 6.0}}
LABELS = TEAM | {"model": "claude-sonnet-4-5"}


def books(**options: Any) -> Books:
    pricing = Pricing(file=None, package=False, clock=lambda: NOW)
    pricing.cost_map = cost_map({"claude-sonnet-4-5": SONNET | HOUR | FACTORS})
    return Books(costs=True, pricing=pricing, **options)


def answer(usage: Usage, **changes: Any) -> Any:
    return exchange(**{"model": "claude-sonnet-4-5", "usage": usage} | changes)


def test_an_answer_raises_the_counters_of_money() -> None:
    """By kind, and what the cache saved and cost: worked by hand for each."""
    given = books()
    given.submit(answer(Usage(7, 16, 1000, 800, 500, 300)))
    kinds = {kind: given.value("cost_usd_total", kind=kind, **LABELS) for kind in CostKind}
    assert kinds == {
        "uncached": 0.000021,  # 7 x 3 USD per million
        "read": 0.0003,  # 1000 x 0.3
        "write_5m": 0.001875,  # 500 x 3.75
        "write_1h": 0.0018,  # 300 x 6
        "write_unknown": 0,
        "output": 0.00024,  # 16 x 15
        "server_tool": 0,
    }
    assert given.value("cache_read_savings_usd_total", **LABELS) == 0.0027  # 1000 x 2.7
    premiums = {
        ttl: given.value("cache_write_premium_usd_total", ttl=ttl, **LABELS)
        for ttl in ("5m", "1h", "unknown")
    }
    assert premiums == {"5m": 0.000375, "1h": 0.0009, "unknown": 0}  # 500 x 0.75, 300 x 3


def test_an_unpriced_answer_adds_no_money() -> None:
    """It is counted with its reason, and its tokens are counted all the same."""
    given = books()
    given.submit(answer(Usage(7, 16), model="alias", response_model="alias"))
    given.submit(answer(Usage(7, 16, 0, 800)))
    assert given.value("unpriced_responses_total", model="alias", reason="unknown_model") == 1
    assert (
        given.value("unpriced_responses_total", model="claude-sonnet-4-5", reason="unknown_ttl")
        == 1
    )
    for labels in (LABELS, LABELS | {"model": "alias"}):
        costs = [given.value("cost_usd_total", kind=kind, **labels) for kind in CostKind]
        assert costs == [0] * 7
        assert given.value("output_tokens_total", **labels) == 16


def test_answers_without_usage_are_neither() -> None:
    """No answer of status 4xx and none without usage is called unpriced."""
    given = books()
    given.submit(answer(Usage(), status=Status.MISSING))
    given.submit(answer(Usage(7, 16), model="alias", status_code=400))
    assert given.metrics.costs is not None
    assert not given.metrics.costs.unpriced.children


def test_searches_tiers_regions_and_ttls() -> None:
    """What the answer says of itself decides its price, and what the request asked for."""
    given = books()
    given.submit(answer(Usage(0, 1), terms=Terms("standard", "standard", "global", 3)))
    assert given.value("cost_usd_total", kind="server_tool", **LABELS) == 0.03
    given.submit(answer(Usage(1_000, 0), terms=Terms(None, None, "US")))  # 3 x 1.1
    assert given.value("cost_usd_total", kind="uncached", **LABELS) == 0.0033
    given.submit(answer(Usage(0, 0, 0, 1_000), hour=False))
    assert given.value("cost_usd_total", kind="write_unknown", **LABELS) == 0.00375
    unknown = {
        "unknown_tier": [Terms("priority"), Terms("batch"), Terms("priority", "fast")],
        "unknown_ttl": [NO_TERMS],
    }
    for reason, each in unknown.items():
        for terms in each:
            given.submit(answer(Usage(0, 0, 0, 1_000), terms=terms))
        labels = {"model": "claude-sonnet-4-5", "reason": reason}
        assert given.value("unpriced_responses_total", **labels) == len(each)
    given.submit(answer(Usage(1_000, 0), terms=Terms("default", "fast")))  # 3 x 6
    assert given.value("cost_usd_total", kind="uncached", **LABELS) == 0.0213


def test_a_stream_that_broke_costs_what_it_said() -> None:
    """The money follows the tokens."""
    given = books()
    given.submit(answer(Usage(7, 2), status=Status.PARTIAL))
    assert given.value("cost_usd_total", kind="output", **LABELS) == 0.00003


def test_money_counts_to_the_limit_of_series() -> None:
    """A label set has eleven series more; all of them together keep to the limit."""
    given = books(max_series=3 * 26)
    for number in range(5):
        given.submit(answer(Usage(7, 16), model=f"m{number}"))
    families = given.metrics.store.families
    labelled = [family for family in families if "team_alias" in family.labels]
    assert sum(len(family.children) for family in labelled) == 3 * 26


def test_a_sum_stays_exact() -> None:
    """A hundred thousand answers at a third of a cent: a sum of floats would be off by now."""
    given = books()
    each = answer(Usage(7, 16, 2101, 24, 11, 13))
    for _ in range(100_000):
        given.submit(each)
    assert given.value("cost_usd_total", kind="read", **LABELS) == 63.03  # 2101 x 0.3 x 0.1


def test_an_amount_rounds_once() -> None:
    """What a scrape shows is the float that lies nearest to the exact sum."""
    amount = Store(lambda: 0.0).amount("cost_usd", "").child()
    amount.atto += 10**17 + 1
    assert amount.value == float(Fraction(10**17 + 1, 10**18))
    amount.value = 0.5
    assert amount.atto == 5 * 10**17
    amount.atto = 123_456_789 * 10**18 + 123_456_789
    assert amount.value == pytest.approx(123_456_789.000000000123456789, abs=0)
