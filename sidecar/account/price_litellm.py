"""LiteLLM's own prices: its cost map, and what it says of its deployments.

Both have the same fields for a model (LiteLLM 1.100.5 `model_prices_and_context_window.json`,
`litellm_core_utils/llm_cost_calc/utils.py`): USD for a token, in names such as
`cache_creation_input_token_cost_above_1hr_above_200k_tokens_priority`.

An entry of the map is decoded when it is asked for: the map has thousands, a sidecar needs a few.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from sidecar.account.model_names import provider_in, same_price_names
from sidecar.account.rates import STANDARD, RateClass, RateKey, SourceCard

__all__ = ["CostMap", "Deployment", "Deployments", "deployments_in", "litellm_card"]

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


class Deployments:
    """What `/v1/model/info` says of all deployments.

    One deployment has several rows where LiteLLM knows it by several names, and where it is a
    wildcard (`anthropic/*`): LiteLLM 1.100 writes a row for each model that it can stand for.
    """

    def __init__(self, rows: Sequence[tuple[str, Deployment]] = ()) -> None:
        self._rows: dict[str, list[Deployment]] = {}
        for model_id, deployment in rows:
            self._rows.setdefault(model_id, []).append(deployment)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._rows

    def find(self, model_id: str, requested: str) -> Deployment | None:
        """Find the deployment that answered; None where it can have been several models."""
        rows = self._rows.get(model_id, [])
        if len({row.model for row in rows}) > 1:
            rows = [row for row in rows if row.alias == requested]
        return rows[0] if rows and "*" not in rows[0].model else None

    def named(self, alias: str) -> Iterator[tuple[str, Deployment]]:
        """Name the deployments that clients reach under a name, by their id."""
        for model_id, rows in self._rows.items():
            for row in rows:
                if row.alias == alias:
                    yield model_id, row


def deployments_in(body: bytes) -> Deployments:
    """Read the answer of `/v1/model/info`.

    Raises:
        ValueError: it is no such answer.
    """
    try:
        listed = msgspec.json.decode(body, type=_ModelInfos).data
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("not a list of deployments") from None
    rows = []
    for each in listed:
        params, info = each.litellm_params, each.model_info
        model_id, model = info.get("id"), params.get("model")
        if isinstance(model_id, str) and isinstance(model, str):
            rows.append((model_id, _deployment(each.model_name, model, params, info)))
    return Deployments(rows)


def _deployment(alias: str, model: str, params: dict[str, Any], info: dict[str, Any]) -> Deployment:
    def said(value: object) -> str:
        return value if isinstance(value, str) else ""

    provider = provider_in(model)
    if not provider:
        # `vertex_ai-anthropic_models` and the like
        provider = said(info.get("litellm_provider")).partition("-")[0]
    model = said(info.get("base_model")) or said(params.get("base_model")) or model
    return Deployment(
        alias,
        model,
        said(params.get("custom_llm_provider")) or provider,
        said(params.get("vertex_location")) or said(params.get("vertex_ai_location")),
        said(info.get("key")),
        # LiteLLM writes 0 for the price of a model that it does not know.
        litellm_card({field: value for field, value in info.items() if value}, model),
    )


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
