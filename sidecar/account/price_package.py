"""Prices that come with the sidecar: the `genai-prices` package, without any look-up.

The package matches names loosely, by how they begin or what they contain. Here a model is taken
only if its name, without region, date and version, is the name of what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal

import genai_prices
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

from sidecar.account.model_names import plain_name
from sidecar.account.rates import STANDARD, RateClass, RateKey, SourceCard

__all__ = ["VERSION", "load_package", "package_card"]

VERSION: str = genai_prices.__version__

_PROVIDERS = {
    "anthropic": "anthropic",
    "azure": "azure",
    "bedrock": "aws",
    "openai": "openai",
    "vertex_ai": "google",
}
_MILLION = Decimal(1_000_000)
_THOUSAND = Decimal(1_000)
_FIELDS: dict[str, tuple[RateClass, Decimal]] = {
    "input_mtok": (RateClass.UNCACHED, _MILLION),
    "output_mtok": (RateClass.OUTPUT, _MILLION),
    "cache_read_mtok": (RateClass.READ, _MILLION),
    "cache_write_mtok": (RateClass.WRITE_5M, _MILLION),
    "cache_write_1h_mtok": (RateClass.WRITE_1H, _MILLION),
    "web_searches_kcount": (RateClass.SERVER_TOOL, _THOUSAND),
}
_TIERS = {"batch": ("processing", "batch"), "fast": ("speed", "fast")}
"""What the package calls the tiers: the key and value of a variant's condition."""


def load_package() -> None:
    """Load the prices, which takes 20 ms: at start, not when an answer waits to be counted."""
    get_snapshot()


def package_card(name: str, provider: str, at: datetime) -> SourceCard | None:
    """Find what the package says of a model.

    Args:
        name: the model's id at its provider.
        provider: as LiteLLM calls it.
        at: when; some prices have a date.
    """
    known = _PROVIDERS.get(provider)
    if known is None:
        return None
    try:
        found, model = get_snapshot().find_provider_model(name, None, known, None)
    except LookupError:
        return None
    if not any(own is model for own in found.models) or plain_name(name) != plain_name(model.id):
        # The prices of another provider, or of a model whose name begins alike.
        return None
    return SourceCard(dict(_rates(model, at)), name=f"{found.id}/{model.id}")


def _rates(model: ModelInfo, at: datetime) -> Iterator[tuple[RateKey, Decimal]]:
    yield from _tier_rates(model.get_prices(at), STANDARD)
    for tier, condition in _TIERS.items():
        # The package fills what a variant does not price from the standard prices: that is
        # asked of the variant alone here.
        for variant in reversed(model.price_variants or ()):
            active = variant.constraint is None or variant.constraint.active(at)
            if active and tuple(variant.when.items()) == (condition,):
                yield from _tier_rates(variant.prices, tier)


def _tier_rates(prices: ModelPrice, tier: str) -> Iterator[tuple[RateKey, Decimal]]:
    for field, (what, unit) in _FIELDS.items():
        price = getattr(prices, field)
        if isinstance(price, TieredPrices):
            yield RateKey(what, tier), price.base / unit
            for step in price.tiers:
                yield RateKey(what, tier, step.start), step.price / unit
        elif price is not None:
            yield RateKey(what, tier), price / unit
