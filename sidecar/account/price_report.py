"""Saying in words where prices come from, and what a model would cost; for the command line."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from sidecar.account.pricing import Asked, Card, Pricing
from sidecar.account.rates import ATTO, STANDARD, RateClass, Rates, Unpriced

__all__ = ["price_lines"]

_NAMES = {
    RateClass.UNCACHED: "input",
    RateClass.READ: "cache_read",
    RateClass.WRITE_5M: "cache_write_5m",
    RateClass.WRITE_1H: "cache_write_1h",
    RateClass.OUTPUT: "output",
    RateClass.SERVER_TOOL: "web_search_per_1k",
}


def price_lines(
    pricing: Pricing, model: str, *, tier: str = STANDARD, geo: str = ""
) -> Iterator[str]:
    """Say what a model would cost under each deployment that answers to its name.

    Args:
        model: what a client would ask for, or a model's name.
    """
    found = list(pricing.deployments.named(model))
    for model_id, deployment in found:
        yield f"{model}: deployment {model_id}, {deployment.model}"
        yield from _card_lines(pricing.card(Asked(model, model_id=model_id, tier=tier, geo=geo)))
    if not found:
        yield f"{model}: no deployment of this name is known"
        yield from _card_lines(pricing.card(Asked(model, tier=tier, geo=geo)))


def _card_lines(card: Card | Unpriced) -> Iterator[str]:
    if isinstance(card, Unpriced):
        yield f"  not priced: {card}"
        return
    for above, rates in reversed(card.brackets):
        if above > 0:
            yield f"  prompts of more than {above} tokens:"
        yield from _rate_lines(rates, card if above < 0 else None)


def _rate_lines(rates: Rates, card: Card | None) -> Iterator[str]:
    for what, atto in zip(RateClass, rates, strict=True):
        if card is None and what is RateClass.SERVER_TOOL:
            continue  # the same whatever the prompt
        per = 1_000 if what is RateClass.SERVER_TOOL else 1_000_000
        price = "not known" if atto is None else f"{(Decimal(atto * per) / ATTO).normalize():f} USD"
        origin = card.origins.get(what, "") if card is not None else ""
        yield f"  {_NAMES[what]:<18} {price:<16} {origin}".rstrip()
