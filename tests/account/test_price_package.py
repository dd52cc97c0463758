"""The prices that come with the sidecar."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from sidecar.account.price_package import package_card
from sidecar.account.rates import RateClass, RateKey

NOW = datetime(2026, 11, 24, tzinfo=UTC)
CLASSES = (
    RateClass.UNCACHED,
    RateClass.READ,
    RateClass.WRITE_5M,
    RateClass.WRITE_1H,
    RateClass.OUTPUT,
)


@pytest.mark.parametrize(
    ("name", "provider", "prices"),
    [
        ("claude-sonnet-4-5", "anthropic", "3 0.3 3.75 6 15"),
        ("claude-sonnet-4-5-20250929", "anthropic", "3 0.3 3.75 6 15"),
        ("claude-haiku-4-5-20251001", "anthropic", "1 0.1 1.25 2 5"),
        ("claude-opus-4-20250514", "anthropic", "15 1.5 18.75 30 75"),
        ("claude-3-5-haiku-20241022", "anthropic", "0.8 0.08 1 1.6 4"),
        ("claude-sonnet-4-5@20250929", "vertex_ai", "3 0.3 3.75 6 15"),
        # A regional endpoint costs a tenth more than the global one.
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "bedrock", "3.3 0.33 4.125 6.6 16.5"),
        ("global.anthropic.claude-sonnet-4-5-20250929-v1:0", "bedrock", "3 0.3 3.75 6 15"),
    ],
)
def test_prices_by_provider(name: str, provider: str, prices: str) -> None:
    """The list prices of each provider, under its own spelling, in USD per million tokens."""
    card = package_card(name, provider, NOW)
    assert card is not None
    rates = [card.rate(what, "standard", 0) for what in CLASSES]
    assert [rate and rate * 1_000_000 for rate in rates] == list(map(Decimal, prices.split()))


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("claude-sonnet-4-5-cheap", "anthropic"),  # an alias that begins like a model
        ("claude-sonnet-4-50", "anthropic"),
        ("claude-direct", "anthropic"),
        ("gpt-4o", "anthropic"),
        ("claude-sonnet-4-5", "azure_ai"),
        ("claude-opus-5-9@20990101", "vertex_ai"),
    ],
)
def test_a_name_that_only_begins_alike_has_no_price(name: str, provider: str) -> None:
    """The package would find something for some of these."""
    assert package_card(name, provider, NOW) is None


def test_long_context_batch_and_fast() -> None:
    """Tiers are taken from where the package has them, and from nowhere else."""
    sonnet = package_card("claude-sonnet-4-5", "anthropic", NOW)
    opus = package_card("claude-opus-5", "anthropic", NOW)
    assert sonnet is not None
    assert opus is not None
    million = 1_000_000
    assert sonnet.rates[RateKey(RateClass.WRITE_1H, above=200_000)] * million == 12
    assert sonnet.rates[RateKey(RateClass.WRITE_1H, "batch")] * million == 3
    assert sonnet.rates[RateKey(RateClass.SERVER_TOOL)] * 1000 == 10
    assert sonnet.rate(RateClass.UNCACHED, "fast", 0) is None
    assert opus.rate(RateClass.UNCACHED, "fast", 0) == 2 * opus.rates[RateKey(RateClass.UNCACHED)]
    assert opus.thresholds == frozenset()


def test_a_price_has_a_day_from_which_it_holds() -> None:
    """Opus 4.6 had long-context prices until March 2026."""
    before = package_card("claude-opus-4-6", "anthropic", datetime(2026, 3, 12, tzinfo=UTC))
    after = package_card("claude-opus-4-6", "anthropic", datetime(2026, 3, 13, tzinfo=UTC))
    assert before is not None
    assert after is not None
    assert before.thresholds == {200_000}
    assert after.thresholds == frozenset()


def test_the_package_asks_nobody() -> None:
    """It could fetch newer prices; it is not asked to, and starts neither thread nor socket."""
    script = """
import sys, threading

def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "_thread.start", "urllib.")):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(watch)
from datetime import datetime, timezone
from sidecar.account.price_package import package_card
assert package_card("claude-sonnet-4-5", "anthropic", datetime.now(timezone.utc)).rates
assert threading.active_count() == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
