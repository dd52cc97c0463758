"""What a response costs: the sources of prices, their order, and one card for each model.

The order, rate by rate: the operator's file, LiteLLM's `/v1/model/info` for the deployment that
answered, LiteLLM's cost map, the `genai-prices` package. A rate that a source does not have is
looked for in the next; if none has it, the response has no cost, and the reason is counted.

Cards are resolved once for each way to name a model and kept until a source changes: what is
left for each response are a look-up and a handful of integer multiplications.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import NamedTuple

from sidecar.account.model_names import general_names, provider_in
from sidecar.account.price_file import PriceFile
from sidecar.account.price_litellm import CostMap, Deployment, Deployments
from sidecar.account.price_package import package_card
from sidecar.account.rates import (
    ATTO,
    STANDARD,
    Cost,
    RateClass,
    Rates,
    SourceCard,
    Unpriced,
    cost_of,
)
from sidecar.exchange import NO_TERMS, Exchange, Observation, RequestFacts, first_values

__all__ = ["Asked", "Card", "Pricing", "asked_of"]

logger = logging.getLogger("sidecar.account")

_MAX_CARDS = 4096
_MAX_TOLD = 1000
"""Models without a price that are told of in the log, each once; and deployments missed."""
_MAX_TRIES = 10
"""How often LiteLLM is asked out of turn for a deployment: its replicas learn of one in turn."""
_MODEL_ID = b"x-litellm-model-id"
_MODEL_NAME = b"x-litellm-model-name"
_KINDS = {"msg_bdrk_": "bedrock", "msg_vrtx_": "vertex_ai"}
_OPENAI_MODEL = re.compile(r"(?:gpt-|chatgpt-|o\d)")
_STANDARD_TIERS = (None, "standard", "default")
"""Bedrock calls its standard tier `default`."""
_NO_GEOS = (None, "global", "not_available")
_HINT = "give its price in SIDECAR_PRICE_FILE, or set SIDECAR_LITELLM_KEY"
_HINTS = {
    Unpriced.UNKNOWN_TIER: "give its prices under tiers in SIDECAR_PRICE_FILE",
    Unpriced.UNKNOWN_TTL: "from now on requests are searched for it; not known where they do not "
    "ask for caching themselves, or ask for an hour somewhere",
    Unpriced.UNKNOWN_REGION: "give its prices, and geo, in SIDECAR_PRICE_FILE; on Vertex AI set "
    "SIDECAR_LITELLM_KEY and the deployment's vertex_location",
}
_RATE_CLASSES = tuple(RateClass)


class Asked(NamedTuple):
    """All that is known of the model that answered; what is not known is empty."""

    requested: str
    """What the client asked for."""
    response_model: str = ""
    """What the answer calls it. LiteLLM writes the requested name there, but for streams."""
    model_id: str = ""
    """The deployment: `x-litellm-model-id`."""
    model_name: str = ""
    """`x-litellm-model-name`, which newer versions send."""
    kind: str = ""
    """Who answered, where id or model tell: `bedrock`, `vertex_ai`, `openai`, or nothing."""
    tier: str = STANDARD
    geo: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """The rates of one model, put together from the sources."""

    brackets: tuple[tuple[int, Rates], ...]
    """By the prompt size above which they hold, the largest first; the last one's is -1."""
    origins: Mapping[RateClass, str] = field(default_factory=dict)
    """Which source had the rate of a short prompt, and under which name."""


class Pricing:
    """Prices responses.

    Args:
        file: the operator's prices; None without.
        package: whether the package is a source.
        clock: Unix time in seconds.
    """

    def __init__(
        self, *, file: PriceFile | None, package: bool, clock: Callable[[], float]
    ) -> None:
        self.file = file
        self.cost_map: CostMap | None = None
        self.deployments = Deployments()
        self.ttls_wanted = False
        """Whether a response could not be priced for want of what its request asked for."""
        self._package = package
        self._clock = clock
        self._cards: dict[Asked, Card | Unpriced] = {}
        self._missed: set[str] = set()
        """Deployments that have answered since LiteLLM was asked, and are not among them."""
        self._missed_often: Counter[str] = Counter()
        self._told: set[tuple[str, Unpriced]] = set()

    @property
    def missed_deployment(self) -> bool:
        """Whether a deployment has answered that LiteLLM is to be asked for."""
        return bool(self._missed)

    def take_deployments(self, deployments: Deployments) -> None:
        """Take what LiteLLM says of its deployments.

        It can have been too early for one that was missed; that is asked for again, some times.
        """
        self.deployments = deployments
        self._missed_often.update(self._missed)
        for model_id in [each for each in self._missed_often if each in deployments]:
            del self._missed_often[model_id]
        self._missed.clear()
        self.changed()

    def changed(self) -> None:
        """Forget the cards, because a source has changed, or the day."""
        self._cards.clear()

    def price(self, exchange: Exchange, observation: Observation) -> Cost | Unpriced | None:
        """Price a response.

        Returns:
            The cost, or why there is none; None for a response that reports no usage.
        """
        return self.price_as(asked_of(exchange, observation), exchange.facts, observation)

    def price_as(
        self, asked: Asked, facts: RequestFacts, observation: Observation
    ) -> Cost | Unpriced | None:
        """Price a response of which it is known by whom it is; the same as `price`."""
        usage = observation.usage
        tokens = usage.input_classes()
        output = usage.output_tokens or 0
        if not (output or any(tokens)):
            return None
        card = self._cards.get(asked)
        if card is None:
            if len(self._cards) >= _MAX_CARDS:
                self._cards.clear()
            card = self._cards[asked] = self.card(asked)
        if isinstance(card, Unpriced):
            result: Cost | Unpriced = card
        else:
            result = cost_of(
                card.brackets,
                tokens,
                output,
                observation.terms.web_search_requests or 0,
                # LiteLLM can write to the cache on its own account, for how long it likes: what
                # the request says holds if it asked for caching itself.
                only_5m=facts.caching_asked is True and facts.hour_asked is False,
            )
        if isinstance(result, Unpriced):
            self.ttls_wanted = self.ttls_wanted or result is Unpriced.UNKNOWN_TTL
            self._tell(asked, result)
        return result

    def card(self, asked: Asked) -> Card | Unpriced:
        """Put the card of a model together from all sources."""
        deployment = self.deployments.find(asked.model_id, asked.requested)
        if asked.model_id and asked.model_id not in self.deployments:
            self._miss(asked.model_id)
        names = list(_names(asked, deployment))
        location = None
        if any(provider == "vertex_ai" for _, provider in names):
            location = deployment.location.lower() if deployment is not None else ""
        found = list(self._source_cards(asked, deployment, names, location))
        if not any(card.rates for _, card in found):
            return Unpriced.UNKNOWN_MODEL
        # What these serve from is in the id of the model, or in the location.
        placed = any(provider.startswith(("bedrock", "vertex_ai")) for _, provider in names)
        factor = _factor(found, asked.geo, location, placed=placed)
        if factor is None:
            # The operator's prices depend on nothing else.
            factor, found = Decimal(1), [each for each in found if each[0] == "file"]
            if not any(card.rates for _, card in found):
                return Unpriced.UNKNOWN_REGION
        sizes = {size for _, card in found for size in card.thresholds}
        brackets = []
        origins: dict[RateClass, str] = {}
        for size in [*sorted(sizes, reverse=True), 0]:
            rates: list[int | None] = []
            knowing = list(_knowing(found, size))
            for what in _RATE_CLASSES:
                atto = None
                # A search costs the same whatever the prompt.
                for source, card in found if what is RateClass.SERVER_TOOL else knowing:
                    rate = card.rate(what, asked.tier, size)
                    if rate is not None:
                        if what is not RateClass.SERVER_TOOL:
                            # The operator's prices are final, but for their own factors.
                            rate *= card.geo.get(asked.geo, 1) if source == "file" else factor
                        atto = _atto(rate)
                        origins[what] = f"{source}: {card.name}"
                        break
                rates.append(atto)
            brackets.append((size or -1, Rates(*rates)))
        short = brackets[-1][1]
        if asked.tier != STANDARD and all(rate is None for rate in short[:-1]):
            return Unpriced.UNKNOWN_TIER
        return Card(tuple(brackets), origins)

    def _miss(self, model_id: str) -> None:
        known = len(self._missed) + len(self._missed_often)
        if self._missed_often[model_id] < _MAX_TRIES and known < _MAX_TOLD:
            self._missed.add(model_id)

    def _source_cards(
        self,
        asked: Asked,
        deployment: Deployment | None,
        names: list[tuple[str, str]],
        location: str | None,
    ) -> Iterator[tuple[str, SourceCard]]:
        """Name each source that knows the model, in their order, with what it says."""
        uplift_known = False
        # Once: a thread that has read the file puts others in their place.
        cards = self.file.cards if self.file is not None else {}
        if cards:
            own = [asked.model_id, asked.requested, *(name for name, _ in names)]
            for name in (spelling for each in own for spelling in general_names(each)):
                if name in cards:
                    uplift_known = cards[name].regional_factor is not None
                    yield "file", cards[name]
                    break
        if deployment is not None:
            card = self._deployment_card(deployment)
            if card.rates:
                uplift_known = uplift_known or card.regional_factor is not None
                yield "model_info", card
        if self.cost_map is not None:
            for name, provider in names:
                entry = self.cost_map.card(name, provider)
                if entry is not None and entry.rates:
                    uplift_known = uplift_known or entry.regional_factor is not None
                    yield "cost_map", entry
                    break
        # Of Vertex AI the package has the prices of the global endpoint.
        if self._package and (location in (None, "global") or uplift_known):
            at = datetime.fromtimestamp(self._clock(), UTC)
            for name, provider in names:
                found = package_card(name.rpartition("/")[2], provider or "anthropic", at)
                if found is not None:
                    yield "package", found
                    break

    def _deployment_card(self, deployment: Deployment) -> SourceCard:
        """Take what LiteLLM says of a deployment, but for what it filled in from a wrong entry."""
        card = deployment.card
        if not deployment.strayed:
            return card
        filled = self.cost_map.card(deployment.key, "") if self.cost_map is not None else None
        if filled is None:
            # What was filled in, and what the operator wrote, cannot be told apart.
            return SourceCard({})
        own = {key: rate for key, rate in card.rates.items() if filled.rates.get(key) != rate}
        return SourceCard(own, name=card.name)

    def _tell(self, asked: Asked, reason: Unpriced) -> None:
        """Log a model that has no price, once for each reason."""
        told = (asked.requested, reason)
        if told not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(told)
            logger.warning(
                "response_unpriced",
                extra={
                    "reason": reason.value,
                    "model": asked.requested,
                    "response_model": asked.response_model,
                    "model_id": asked.model_id,
                    "tier": asked.tier,
                    "hint": _HINTS.get(reason, _HINT),
                },
            )


def asked_of(exchange: Exchange, observation: Observation) -> Asked:
    """Gather what is known of the model that answered: from the names and terms of the answer,
    and the headers `x-litellm-model-id` and `x-litellm-model-name`."""
    headers = first_values(exchange.response_headers)
    message_id = observation.message_id
    kind = _KINDS.get(message_id[:9], "") if message_id is not None else ""
    if not kind and _OPENAI_MODEL.match(observation.response_model or exchange.facts.model or ""):
        kind = "openai"
    tier, geo = STANDARD, ""
    terms = observation.terms
    if terms is not NO_TERMS:
        if terms.service_tier not in _STANDARD_TIERS:
            tier = terms.service_tier or tier
        if terms.speed not in _STANDARD_TIERS:
            # No source prices both together; such a tier is then not known.
            tier = f"{tier}+{terms.speed}" if tier != STANDARD else terms.speed or tier
        if terms.inference_geo not in _NO_GEOS:
            geo = (terms.inference_geo or "").lower()
    return Asked(
        exchange.facts.model or "",
        observation.response_model or "",
        headers.get(_MODEL_ID, b"").decode("latin-1"),
        headers.get(_MODEL_NAME, b"").decode("latin-1"),
        kind,
        tier,
        geo,
    )


def _names(asked: Asked, deployment: Deployment | None) -> Iterator[tuple[str, str]]:
    """Name the model at its provider, and the provider, the surest first.

    What a client asks for may be any alias. It is believed if LiteLLM tells of no deployment.
    """
    if deployment is not None:
        yield deployment.model, deployment.provider
        return
    for name in dict.fromkeys((asked.model_name, asked.response_model, asked.requested)):
        provider = provider_in(name) or asked.kind
        # Which of Bedrock's ids it was decides the price, and no other name tells.
        if name and (asked.kind != "bedrock" or "anthropic." in name):
            yield name, provider


def _knowing(found: list[tuple[str, SourceCard]], size: int) -> Iterator[tuple[str, SourceCard]]:
    """Pick the sources whose rates go together for prompts of just more than `size` tokens.

    Left out is one without long-context rates, where one before it has some; and the package,
    where its ordinary input has another price than at LiteLLM: it speaks of another card then,
    such as that of a region.
    """
    long = False
    base: Decimal | None = None
    for source, card in found:
        reached = card.reached(size) > 0
        own = card.rate(RateClass.UNCACHED, STANDARD, size)
        if (long and not reached) or (source == "package" and base is not None and own != base):
            continue
        yield source, card
        long = long or reached
        if source != "file" and base is None:
            base = own


def _factor(
    found: list[tuple[str, SourceCard]], geo: str, location: str | None, *, placed: bool
) -> Decimal | None:
    """Find the regional uplift on the rates that are not the operator's own.

    Args:
        location: of Vertex AI, empty if it is not known; None for another provider.
        placed: whether the rates are those of a place already.

    Returns:
        A factor; None where it depends on a location that is not known, or the answer says a
        place and no source names its factor: who says a place takes more for it.
    """
    cards = [card for source, card in found if source != "file"]
    factor = next((card.geo[geo] for card in cards if geo in card.geo), Decimal(1))
    if geo and not placed and not any(geo in card.geo for card in cards):
        return None
    if location is not None and location != "global":
        factors = [card.regional_factor for _, card in found]
        regional = next((each for each in factors if each is not None), Decimal(1))
        if regional != 1 and not location:
            return None
        factor *= regional
    return factor


def _atto(rate: Decimal) -> int:
    return int((rate * ATTO).to_integral_value(ROUND_HALF_EVEN))
