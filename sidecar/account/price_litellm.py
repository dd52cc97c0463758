"""LiteLLM's own prices: its cost map, and what it says of its deployments.

Both have the same fields for a model (LiteLLM 1.100.5 `model_prices_and_context_window.json`,
`litellm_core_utils/llm_cost_calc/utils.py`): USD for a token, in names such as
`cache_creation_input_token_cost_above_1hr_above_200k_tokens_priority`.

An entry of the map is decoded when it is asked for: the map has thousands, a sidecar needs a few.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from sidecar.account.model_names import same_price_names
from sidecar.account.rates import STANDARD, RateClass, RateKey, SourceCard

__all__ = ["CostMap", "Deployment", "deployments_in", "litellm_card"]

_FIELDS = (
    # The longer name first: one begins with the other.
    ("cache_creation_input_token_cost_above_1hr", RateClass.WRITE_1H),
    ("cache_creation_input_token_cost", RateClass.WRITE_5M),
    ("cache_read_input_token_cost", RateClass.READ),
    ("input_cost_per_token", RateClass.UNCACHED),
    ("output_cost_per_token", RateClass.OUTPUT),
)
_TIERS = {"": STANDARD, "_batches": "batch", "_priority": "priority", "_flex": "flex"}
_REST = re.compile(r"(?:_above_(?P<size>\d+)(?P<k>k?)_tokens)?(?P<tier>_batches|_priority|_flex)?")
_MAX_RATE = Decimal(1)
"""A dollar a token; more is a mistake."""


class CostMap:
    """The cost map: entries by the name that LiteLLM gives a model.

    Args:
        body: JSON, as `/public/litellm_model_cost_map` answers.

    Raises:
        ValueError: it is no such map.
    """

    def __init__(self, body: bytes) -> None:
        try:
            self._entries = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, RecursionError):
            raise ValueError("not a JSON object of objects") from None
        if b'"input_cost_per_token"' not in body:
            raise ValueError("not a map of prices")  # a failure is a JSON object, too

    def __len__(self) -> int:
        return len(self._entries)

    def card(self, name: str, provider: str) -> SourceCard | None:
        """Find what the map says of a model, under any spelling that has the same price."""
        for spelling in same_price_names(name, provider):
            raw = self._entries.get(spelling)
            if raw is not None:
                try:
                    entry = msgspec.json.decode(raw, type=dict[str, Any])
                except (msgspec.MsgspecError, RecursionError):
                    continue
                return litellm_card(entry, spelling)
        return None


@dataclass(frozen=True, slots=True)
class Deployment:
    """What `/v1/model/info` says of one deployment."""

    alias: str
    """`model_name`: what clients ask for."""
    model: str
    """`litellm_params.model`, or `model_info.base_model` where the operator gave one."""
    provider: str
    location: str
    """Of Vertex AI; empty if it is not said."""
    key: str
    """The entry of the cost map from which LiteLLM filled in what it was not told."""
    card: SourceCard

    @property
    def strayed(self) -> bool:
        """Whether that is the entry of a model with another price.

        LiteLLM 1.83 fills in a deployment of `us.anthropic.…` from `anthropic.…`, which is
        cheaper, and bills by the right entry all the same.
        """
        return bool(self.key) and self.key not in same_price_names(self.model, self.provider)


def deployments_in(body: bytes) -> dict[str, Deployment]:
    """Read the answer of `/v1/model/info`: deployments by their id.

    Raises:
        ValueError: it is no such answer.
    """
    try:
        listed = msgspec.json.decode(body, type=_ModelInfos).data
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("not a list of deployments") from None
    deployments = {}
    for each in listed:
        params, info = each.litellm_params, each.model_info
        if not isinstance(info.get("id"), str) or not isinstance(params.get("model"), str):
            continue
        model = info.get("base_model") or params.get("base_model") or params["model"]
        provider = params.get("custom_llm_provider") or params["model"].partition("/")[0]
        location = params.get("vertex_location") or params.get("vertex_ai_location") or ""
        # LiteLLM writes 0 for the price of a model that it does not know.
        card = litellm_card({k: v for k, v in info.items() if v}, str(model))
        deployments[info["id"]] = Deployment(
            each.model_name,
            str(model),
            str(provider),
            str(location),
            str(info.get("key") or ""),
            card,
        )
    return deployments


class _ModelInfo(msgspec.Struct):
    model_name: str = ""
    litellm_params: dict[str, Any] = {}
    model_info: dict[str, Any] = {}


class _ModelInfos(msgspec.Struct):
    data: list[_ModelInfo]


def litellm_card(entry: Mapping[str, Any], name: str) -> SourceCard:
    """Read the rates of one model; what is not a rate is passed over."""
    rates: dict[RateKey, Decimal] = {}
    for field, value in entry.items():
        for prefix, what in _FIELDS:
            if field.startswith(prefix):
                rest = _REST.fullmatch(field, len(prefix))
                rate = _decimal(value)
                if rest is not None and rate is not None and rate <= _MAX_RATE:
                    size = int(rest["size"] or 0) * (1000 if rest["k"] else 1)
                    rates[RateKey(what, _TIERS[rest["tier"] or ""], size)] = rate
                break
    search = entry.get("search_context_cost_per_query")
    if isinstance(search, Mapping):
        # The size is a matter of other providers; LiteLLM takes the medium one, too.
        rate = _decimal(search.get("search_context_size_medium"))
        if rate is not None:
            rates[RateKey(RateClass.SERVER_TOOL)] = rate
    factors = entry.get("provider_specific_entry")
    geo = {}
    if isinstance(factors, Mapping):
        geo = {
            str(region).lower(): factor
            for region, value in factors.items()
            if region != "fast" and (factor := _decimal(value))
        }
        fast = _decimal(factors.get("fast"))
        if fast:
            rates |= {
                RateKey(what, "fast", size): rate * fast
                for (what, tier, size), rate in rates.items()
                if tier == STANDARD and what is not RateClass.SERVER_TOOL
            }
    regional = _decimal(entry.get("regional_endpoint_uplift_multiplier"))
    return SourceCard(rates, geo, regional, name)


def _decimal(value: object) -> Decimal | None:
    """Take a number as it was written; a float's shortest form is that."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 else None
