"""Which source prices what: their order, rate by rate, and how models are found in them."""

from __future__ import annotations

import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sidecar.account.price_file import PriceFile
from sidecar.account.price_litellm import CostMap, deployments_in
from sidecar.account.pricing import Asked, Card, Pricing, asked_of
from sidecar.account.rates import ATTO, Cost, RateClass, Unpriced
from sidecar.exchange import Observation, Status, Usage
from tests.account.test_ledger import exchange

NOW = 1_795_500_000.0  # 2026-11-24

# As LiteLLM 1.83.10 has them: without a price of the 1-hour write.
SONNET = {
    "input_cost_per_token": 3e-06,
    "output_cost_per_token": 1.5e-05,
    "cache_creation_input_token_cost": 3.75e-06,
    "cache_read_input_token_cost": 3e-07,
    "input_cost_per_token_above_200k_tokens": 6e-06,
    "output_cost_per_token_above_200k_tokens": 2.25e-05,
    "cache_creation_input_token_cost_above_200k_tokens": 7.5e-06,
    "cache_read_input_token_cost_above_200k_tokens": 6e-07,
    "search_context_cost_per_query": {"search_context_size_medium": 0.01},
    "litellm_provider": "anthropic",
    "supports_vision": True,
}
HOUR = {"cache_creation_input_token_cost_above_1hr": 6e-06}
MAP: dict[str, dict[str, Any]] = {
    "claude-sonnet-4-5": SONNET,
    "claude-own-1-20250101": SONNET | HOUR,
    "claude-own-2": SONNET | {"provider_specific_entry": {"us": 1.1, "fast": 6.0}},
    "vertex_ai/claude-own-3@20250101": SONNET | {"regional_endpoint_uplift_multiplier": 1.1},
    "anthropic.claude-own-4-20250101-v1:0": {"input_cost_per_token": 3e-06},
    "us.anthropic.claude-own-4-20250101-v1:0": {"input_cost_per_token": 3.3e-06},
    "gpt-own": {
        "input_cost_per_token": "2e-06",
        "input_cost_per_token_priority": 4e-06,
        "input_cost_per_token_batches": 1e-06,
        "input_cost_per_token_flex": 5e-07,
        "input_cost_per_token_above_128k_tokens_priority": 9e-06,
        "output_cost_per_token": True,
        "output_cost_per_token_batches": None,
        "cache_read_input_token_cost": "x",
        "cache_creation_input_token_cost": 3000.0,
        "cache_read_input_token_cost_above_what": 1.0,
    },
}


def cost_map(entries: Any = MAP) -> CostMap:
    return CostMap(json.dumps(entries).encode())


def pricing(
    *, file: PriceFile | None = None, entries: Any = MAP, info: Any = None, package: bool = False
) -> Pricing:
    made = Pricing(file=file, package=package, clock=lambda: NOW)
    made.cost_map = cost_map(entries) if entries is not None else None
    if info is not None:
        made.deployments = deployments_in(json.dumps({"data": info}).encode())
    return made


def deployment(model: str, prices: Any = None, **params: str) -> dict[str, Any]:
    return {
        "model_name": "alias",
        "litellm_params": {"model": model, **params},
        "model_info": {"id": "d1", **(prices or {})},
    }


D1 = deployment("claude-own-2")


def usd(given: Pricing, asked: Asked, what: RateClass = RateClass.UNCACHED) -> Decimal | None:
    """The rate for a short prompt, in USD per million tokens."""
    card = given.card(asked)
    assert isinstance(card, Card), card
    atto = card.brackets[-1][1][list(RateClass).index(what)]
    return None if atto is None else Decimal(atto) * 1_000_000 / ATTO


def own_file(tmp_path: Path, text: str) -> PriceFile:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    return PriceFile(path)


def test_the_order_of_the_sources_rate_by_rate(tmp_path: Path) -> None:
    """Each rate comes from the first source that has it."""
    file = own_file(tmp_path, "claude-sonnet-4-5: {input: 1}\n")
    info = [deployment("anthropic/claude-sonnet-4-5-20250929", {"output_cost_per_token": 2e-06})]
    given = pricing(file=file, info=info, package=True)
    asked = Asked("alias", model_id="d1")
    card = given.card(asked)
    assert isinstance(card, Card)
    assert {what.value: origin.partition(":")[0] for what, origin in card.origins.items()} == {
        "uncached": "file",
        "output": "model_info",
        "read": "cost_map",
        "write_5m": "cost_map",
        "write_1h": "package",
        "server_tool": "cost_map",
    }
    assert [usd(given, asked, what) for what in RateClass] == [
        1,
        Decimal("0.3"),
        Decimal("3.75"),
        6,
        2,
        10_000,
    ]


def test_a_missing_hour_is_not_the_price_of_five_minutes() -> None:
    """Where no source has it, what was written for an hour has no price, and the rest neither."""
    given = pricing()
    asked = exchange(model="claude-sonnet-4-5", usage=Usage(7, 16, 0, 300, 0, 300))
    assert asked.observation is not None
    assert given.price(asked, asked.observation) is Unpriced.NO_WRITE_1H_RATE
    short = exchange(model="claude-sonnet-4-5", usage=Usage(7, 16, 0, 300, 300, 0))
    assert short.observation is not None
    found = given.price(short, short.observation)
    assert isinstance(found, Cost)
    # 7 x 3 + 300 x 3.75 + 16 x 15 USD per million
    assert Decimal(found.total) / ATTO == Decimal("0.001386")


def test_a_long_prompt_takes_each_rate_from_whoever_has_the_long_one() -> None:
    """The map has no long-context price of the hour; the package has."""
    given = pricing(package=True)
    card = given.card(Asked("claude-sonnet-4-5"))
    assert isinstance(card, Card)
    (above, long), (last, short) = card.brackets
    assert (above, last) == (200_000, -1)
    assert [rate and rate * 1_000_000 // ATTO for rate in (long.uncached, long.write_1h)] == [6, 12]
    assert [rate and rate * 1_000_000 // ATTO for rate in (short.uncached, short.write_1h)] == [
        3,
        6,
    ]


@pytest.mark.parametrize(
    ("asked", "rate"),
    [
        pytest.param(Asked("claude-own-1-20250101"), 3, id="as-it-is"),
        pytest.param(Asked("anthropic/claude-own-1-20250101"), 3, id="provider"),
        pytest.param(Asked("claude-sonnet-4-5-20250929"), 3, id="date"),
        pytest.param(Asked("claude-sonnet-4-5-latest"), 3, id="latest"),
        pytest.param(Asked("alias", "claude-sonnet-4-5-20250929"), 3, id="response-model"),
        pytest.param(Asked("alias", model_name="anthropic/claude-own-2"), 3, id="model-name"),
        pytest.param(
            Asked("us.anthropic.claude-own-4-20250101-v1:0", kind="bedrock"),
            Decimal("3.3"),
            id="region",
        ),
        pytest.param(
            Asked("bedrock/converse/us.anthropic.claude-own-4-20250101-v1"),
            Decimal("3.3"),
            id="converse-no-version",
        ),
        pytest.param(Asked("global.anthropic.claude-own-4-20250101-v1:0"), 3, id="global"),
        pytest.param(
            Asked(
                "arn:aws:bedrock:us-east-1:123456789012:inference-profile/"
                "us.anthropic.claude-own-4-20250101-v1:0"
            ),
            Decimal("3.3"),
            id="profile-arn",
        ),
        pytest.param(
            Asked(
                "bedrock/arn:aws:bedrock:us-east-1::foundation-model/"
                "anthropic.claude-own-4-20250101-v1:0"
            ),
            3,
            id="model-arn",
        ),
        pytest.param(Asked("gpt-own"), 2, id="another-provider"),
        pytest.param(Asked("openai/gpt-own", model_name="gpt-own"), 2, id="model-name-first"),
    ],
)
def test_the_spellings_of_a_model(asked: Asked, rate: Decimal | int) -> None:
    """Dates, `@`, regions, versions, ARNs and LiteLLM's prefixes lead to the entry of the map."""
    assert usd(pricing(), asked) == rate


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(Asked("alias"), id="alias"),
        pytest.param(Asked(""), id="nothing"),
        # It was Bedrock that answered: at which of its prices, no other name tells.
        pytest.param(Asked("claude-sonnet-4-5", kind="bedrock"), id="bedrock-by-alias"),
        pytest.param(Asked("claude-sonnet-4-5", kind="vertex_ai"), id="vertex-by-alias"),
        pytest.param(Asked("eu.anthropic.claude-own-4-20250101-v1:0"), id="other-region"),
        pytest.param(
            Asked("arn:aws:bedrock:us-east-1:1:application-inference-profile/x1"), id="own-profile"
        ),
        pytest.param(Asked("claude-sonnet-4-5", model_id="d1"), id="deployment-of-another-model"),
    ],
)
def test_what_is_not_known_has_no_price(asked: Asked) -> None:
    """A name is not guessed at."""
    given = pricing(info=[deployment("openai/strange")])
    assert given.card(asked) is Unpriced.UNKNOWN_MODEL


def test_a_deployment_says_what_an_alias_is() -> None:
    """Its own prices go first, and a price of 0, which LiteLLM writes for a model that it does not
    know, is none."""
    prices = {"input_cost_per_token": 9e-06, "output_cost_per_token": 0}
    given = pricing(info=[deployment("bedrock/us.anthropic.claude-own-4-20250101-v1:0", prices)])
    assert usd(given, Asked("alias", model_id="d1", kind="bedrock")) == 9
    assert usd(given, Asked("alias", model_id="d1"), RateClass.OUTPUT) is None
    given = pricing(info=[deployment("azure/x", base_model="claude-sonnet-4-5")])
    assert usd(given, Asked("alias", model_id="d1")) == 3


def test_a_deployment_that_litellm_filled_in_from_another_region() -> None:
    """LiteLLM 1.83 does so with Bedrock's regions. What the operator wrote is kept: it is what
    differs from that entry."""
    model = "bedrock/us.anthropic.claude-own-4-20250101-v1:0"
    filled = {"key": "anthropic.claude-own-4-20250101-v1:0", "input_cost_per_token": 3e-06}
    asked = Asked("alias", model_id="d1")
    given = pricing(info=[deployment(model, filled)])
    assert usd(given, asked) == Decimal("3.3")
    given = pricing(info=[deployment(model, filled | {"output_cost_per_token": 7e-06})])
    assert usd(given, asked) == Decimal("3.3")
    assert usd(given, asked, RateClass.OUTPUT) == 7
    given = pricing(info=[deployment(model, filled | {"input_cost_per_token": 5e-06})])
    assert usd(given, asked) == 5
    given = pricing(entries=None, info=[deployment(model, filled)])
    assert given.card(asked) is Unpriced.UNKNOWN_MODEL
    right = filled | {"key": "us.anthropic.claude-own-4-20250101-v1:0"}
    assert usd(pricing(entries=None, info=[deployment(model, right)]), asked) == 3


def test_the_uplift_of_a_region() -> None:
    """It multiplies every token rate where a source names it, and no web search."""
    given = pricing()
    asked = Asked("claude-own-2", geo="us")
    assert usd(given, asked) == Decimal("3.3")
    assert usd(given, asked, RateClass.READ) == Decimal("0.33")
    assert usd(given, asked, RateClass.SERVER_TOOL) == 10_000


def test_a_place_without_a_factor_is_not_priced(tmp_path: Path) -> None:
    """Who says a place takes more for it, and how much is not guessed: Opus 4.6 costs 5.5 in the
    US, and the package does not say so. Bedrock's and Vertex AI's places are priced otherwise, and
    the operator's own prices are final."""
    given = pricing()
    assert given.card(Asked("claude-own-2", geo="eu")) is Unpriced.UNKNOWN_REGION
    assert given.card(Asked("claude-own-1-20250101", geo="us")) is Unpriced.UNKNOWN_REGION
    opus = Asked("claude-opus-4-6", geo="us")
    assert pricing(entries=None, package=True).card(opus) is Unpriced.UNKNOWN_REGION
    bedrock = Asked("us.anthropic.claude-own-4-20250101-v1:0", geo="us")
    assert usd(given, bedrock) == Decimal("3.3")
    file = own_file(tmp_path, "claude-opus-4-6: {input: 5, output: 25, geo: {us: 1.1}}\n")
    given = pricing(file=file, entries=None, package=True)
    assert usd(given, opus) == Decimal("5.5")
    assert usd(given, opus, RateClass.READ) is None


REGIONAL = {
    name: value * 1.1 if isinstance(value, float) else value for name, value in SONNET.items()
}
LONG_HOUR = {"cache_creation_input_token_cost_above_1hr_above_200k_tokens": 1.2e-05}


@pytest.mark.parametrize(
    ("region", "entry", "hour"),
    [("us.", REGIONAL, "6.6"), ("jp.", REGIONAL, "6.6"), ("global.", SONNET, "6")],
)
def test_a_long_prompt_takes_no_short_rate_of_a_later_source(
    region: str, entry: dict[str, Any], hour: str
) -> None:
    """Bedrock's hour is in the package, without its long-context price: a short prompt has that
    price, a long one none."""
    name = f"{region}anthropic.claude-sonnet-4-5-20250929-v1:0"
    given = pricing(entries={name: entry}, package=True)
    assert usd(given, Asked(name), RateClass.WRITE_1H) == Decimal(hour)

    def cost(tokens: int) -> Cost | Unpriced | None:
        asked = exchange(model=name, response_model=name, usage=Usage(0, 0, 0, tokens, 0, tokens))
        assert asked.observation is not None
        return given.price(asked, asked.observation)

    short = cost(200_000)
    assert isinstance(short, Cost)
    assert Decimal(short.total) / ATTO == Decimal(hour) / 5
    assert cost(250_000) is Unpriced.NO_WRITE_1H_RATE
    given = pricing(entries={name: entry | HOUR | LONG_HOUR}, package=True)
    long = cost(250_000)
    assert isinstance(long, Cost)
    assert Decimal(long.total) / ATTO == 3


def test_a_long_price_of_the_operators_stands_for_itself(tmp_path: Path) -> None:
    """Who sets one says that long prompts cost something else: no short rate joins it there."""
    file = own_file(tmp_path, "claude-flat: {above: {200000: {input: 9}}}\n")
    flat = {"input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05}
    flat["search_context_cost_per_query"] = {"search_context_size_medium": 0.01}  # type: ignore[assignment]
    card = pricing(file=file, entries={"claude-flat": flat}).card(Asked("claude-flat"))
    assert isinstance(card, Card)
    (_, long), (_, short) = card.brackets
    assert (long.uncached, long.output) == (9 * ATTO // 1_000_000, None)
    assert (short.uncached, short.output) == (3 * ATTO // 1_000_000, 15 * ATTO // 1_000_000)
    assert long.server_tool == short.server_tool == ATTO // 100


def test_the_package_adds_to_no_card_of_another_base() -> None:
    """1.83.10 has 3 USD for `anthropic.…`, and the package the price of its region, 3.3: an hour
    of it beside that would be the price of neither."""
    name = "anthropic.claude-sonnet-4-5-20250929-v1:0"
    given = pricing(entries={name: SONNET}, package=True)
    asked = Asked(name, kind="bedrock")
    assert usd(given, asked) == 3
    assert usd(given, asked, RateClass.WRITE_1H) is None
    assert usd(pricing(entries=None, package=True), asked, RateClass.WRITE_1H) == Decimal("6.6")
    info = [deployment("anthropic/claude-sonnet-4-5", {"input_cost_per_token": 2e-06})]
    given = pricing(entries=None, info=info, package=True)
    assert usd(given, Asked("alias", model_id="d1")) == 2
    assert usd(given, Asked("alias", model_id="d1"), RateClass.WRITE_1H) is None


@pytest.mark.parametrize("way", ["", "us-east-1/", "converse/", "converse/eu-west-1/", "invoke/"])
@pytest.mark.parametrize(
    "arn", ["", "arn:aws:bedrock:us-east-1::foundation-model/"], ids=["id", "arn"]
)
def test_a_way_to_bedrock_is_no_part_of_the_model(way: str, arn: str) -> None:
    """What LiteLLM filled in is believed, and the map is found, with its long-context price."""
    name = "anthropic.claude-sonnet-4-5-20250929-v1:0"
    for key, base, long in ((name, 6e-06, 12), (f"eu.{name}", 3e-06, 6)):
        # The other key is that of another model: what comes from it is not believed.
        prices = SONNET | {"input_cost_per_token": base, "key": key}
        prices["input_cost_per_token_above_200k_tokens"] = 2 * base
        given = pricing(
            entries={name: SONNET, f"eu.{name}": prices},
            info=[deployment(f"bedrock/{way}{arn}{name}", prices)],
            package=True,
        )
        card = given.card(Asked("alias", model_id="d1"))
        assert isinstance(card, Card)
        assert [above for above, _ in card.brackets] == [200_000, -1]
        assert card.brackets[0][1].uncached == long * ATTO // 1_000_000
    profile = f"arn:aws:bedrock:us-east-1:1:inference-profile/us.{name}"
    given = pricing(entries={f"us.{name}": REGIONAL}, info=[deployment(f"bedrock/{way}{profile}")])
    assert usd(given, Asked("alias", model_id="d1")) == Decimal("3.3")


def test_a_region_with_a_price_of_its_own() -> None:
    """It goes first, also behind a route; another region has the price of all."""
    name = "anthropic.claude-own-4-20250101-v1:0"
    own = {"input_cost_per_token": 3.6e-06}
    given = pricing(entries=MAP | {f"bedrock/us-gov-west-1/{name}": own})
    for way in ("us-gov-west-1/", "converse/us-gov-west-1/"):
        assert usd(given, Asked(f"bedrock/{way}{name}")) == Decimal("3.6")
    assert usd(given, Asked(f"bedrock/us-west-1/{name}")) == 3


@pytest.mark.parametrize(
    "name",
    [
        "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
        "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-sonnet-4-5-20250929-v1:0",
        "bedrock/converse/us.anthropic.claude-sonnet-4-5-20250929-v1:0",
    ],
)
def test_the_package_prices_the_ids_of_bedrock(name: str) -> None:
    """However the model is written, asked for or deployed, it is one of Bedrock's."""
    given = pricing(entries=None, info=[deployment(name)], package=True)
    for asked in (Asked(name), Asked("alias", model_id="d1")):
        assert usd(given, asked) == Decimal("3.3")


def test_the_first_value_of_a_repeated_header_counts() -> None:
    """As everywhere else: what an answer is counted under is what it is priced by."""
    headers = [
        (b"x-litellm-model-id", b"d1"),
        (b"x-litellm-model-id", b"d2"),
        (b"x-litellm-model-name", b"anthropic/a"),
        (b"x-litellm-model-name", b"anthropic/b"),
    ]
    given = exchange(response_headers=headers)
    assert given.observation is not None
    asked = asked_of(given, given.observation)
    assert (asked.model_id, asked.model_name) == ("d1", "anthropic/a")


def test_a_deployment_is_missed_until_litellm_tells_of_it() -> None:
    """LiteLLM's replicas learn of one in turn: it is asked again, but not for ever."""
    given = pricing()
    nothing, known = (deployments_in(json.dumps({"data": rows}).encode()) for rows in ([], [D1]))
    asked = Asked("alias", model_id="d1")
    tries = 0
    while given.card(asked) is Unpriced.UNKNOWN_MODEL and given.missed_deployment:
        given.card(asked._replace(tier="batch"))  # the same miss
        given.take_deployments(nothing)
        tries += 1
    assert tries == 10
    given.take_deployments(known)
    assert usd(given, asked) == 3
    given.take_deployments(nothing)
    given.card(asked)
    assert given.missed_deployment
    given.card(Asked("alias"))
    for number in range(5000):
        given.card(Asked("alias", model_id=str(number)))
    assert len(given._missed) <= 1000


def test_a_vertex_price_depends_on_the_location() -> None:
    """Only a location that is known gives it: it is the deployment that says it."""
    model = "vertex_ai/claude-own-3@20250101"
    asked = Asked("alias", model_id="d1")
    for location, rate in {"us-east5": Decimal("3.3"), "global": Decimal(3)}.items():
        given = pricing(info=[deployment(model, vertex_location=location)])
        assert usd(given, asked) == rate
    given = pricing(info=[deployment(model)])
    assert given.card(asked) is Unpriced.UNKNOWN_REGION
    assert given.card(Asked("claude-own-3@20250101", kind="vertex_ai")) is Unpriced.UNKNOWN_REGION


def test_the_package_has_vertex_prices_of_the_global_endpoint() -> None:
    """They are not taken for another location."""
    model = "vertex_ai/claude-sonnet-4-5@20250929"
    asked = Asked("alias", model_id="d1")
    for location, known in {"us-east5": False, "global": True}.items():
        info = [deployment(model, vertex_location=location)]
        card = pricing(entries=None, info=info, package=True).card(asked)
        assert isinstance(card, Card) == known


def test_an_operator_can_name_the_uplift_of_vertex(tmp_path: Path) -> None:
    """LiteLLM 1.83 does not know it. The factor is on the prices of the other sources, at Vertex AI
    alone; with it the package's prices of the global endpoint do for another location."""
    file = own_file(tmp_path, "claude-sonnet-4-5: {regional: 1.1, output: 20}\n")
    entries = {"vertex_ai/claude-sonnet-4-5@20250929": SONNET, "claude-sonnet-4-5": SONNET}
    vertex = [deployment("vertex_ai/claude-sonnet-4-5@20250929", vertex_location="us-east5")]
    given = pricing(file=file, entries=entries, info=vertex, package=True)
    asked = Asked("alias", model_id="d1")
    assert [usd(given, asked, what) for what in list(RateClass)[:5]] == [
        Decimal("3.3"),
        Decimal("0.33"),
        Decimal("4.125"),
        Decimal("6.6"),
        20,
    ]
    direct = pricing(file=file, entries=entries, info=[deployment("anthropic/claude-sonnet-4-5")])
    assert usd(direct, asked) == 3
    nothing_else = pricing(file=own_file(tmp_path, "alias: {regional: 1.1}"), entries=None)
    assert nothing_else.card(Asked("alias")) is Unpriced.UNKNOWN_MODEL


def test_tiers() -> None:
    """A tier has the rates that a source gives for it, and none of another."""
    given = pricing()
    for tier, rate in {"standard": 2, "priority": 4, "batch": 1, "flex": Decimal("0.5")}.items():
        assert usd(given, Asked("gpt-own", tier=tier)) == rate
    assert usd(given, Asked("claude-own-2", tier="fast")) == 18
    assert usd(given, Asked("claude-own-2", tier="fast"), RateClass.READ) == Decimal("1.8")
    assert given.card(Asked("claude-own-2", tier="priority")) is Unpriced.UNKNOWN_TIER
    card = given.card(Asked("gpt-own", tier="priority"))
    assert isinstance(card, Card)
    assert [size for size, _ in card.brackets] == [128_000, -1]


def test_what_is_no_price_is_passed_over() -> None:
    """True, null, words and a thousand dollars a token."""
    card = pricing().card(Asked("gpt-own"))
    assert isinstance(card, Card)
    rates = card.brackets[-1][1]
    assert (rates.output, rates.read, rates.write_5m) == (None, None, None)


def test_an_operator_names_a_model_as_exactly_as_need_be(tmp_path: Path) -> None:
    """The most exact name goes first: the deployment, the alias, the model, the model without
    region, version and date. The operator's prices are final: no uplift is put on them."""
    lines = ["d1: {input: 1}", "alias: {input: 2}"]
    lines += ["us.anthropic.claude-own-4-20250101-v1:0: {input: 3}"]
    lines += ["anthropic.claude-own-4-20250101: {input: 4}", "claude-own-4: {input: 5}"]
    info = [deployment("bedrock/us.anthropic.claude-own-4-20250101-v1:0")]
    asked = Asked("Alias", model_id="d1")
    for number in range(len(lines)):
        file = own_file(tmp_path, "\n".join(lines[number:]))
        assert usd(pricing(file=file, info=info), asked) == number + 1
    file = own_file(tmp_path, "claude-own-2: {input: 5}\n")
    assert usd(pricing(file=file), Asked("claude-own-2", geo="us")) == 5
    file = own_file(tmp_path, "claude-own-2: {input: 5, geo: {us: 2}}\n")
    assert usd(pricing(file=file), Asked("claude-own-2", geo="us")) == 10
    assert usd(pricing(file=file), Asked("claude-own-2", geo="us"), RateClass.READ) == Decimal(
        "0.33"
    )


def test_a_model_without_price_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One line names it and says what to do; each further reason has one of its own."""
    given = pricing()
    unknown = exchange(model="alias", response_model="alias")
    hour = exchange(model="claude-sonnet-4-5", usage=Usage(7, 16, 0, 300, 0, 300))
    open_ = exchange(model="claude-own-2", usage=Usage(7, 16, 0, 300), hour=None)
    with caplog.at_level(logging.WARNING):
        for each in (unknown, unknown, hour, hour, open_):
            assert each.observation is not None
            assert isinstance(given.price(each, each.observation), Unpriced)
    assert [(r.msg, r.__dict__["reason"], r.__dict__["model"]) for r in caplog.records] == [
        ("response_unpriced", "unknown_model", "alias"),
        ("response_unpriced", "no_write_1h_rate", "claude-sonnet-4-5"),
        ("response_unpriced", "unknown_ttl", "claude-own-2"),
    ]
    # No price file helps the last one.
    assert ["SIDECAR_PRICE_FILE" in r.__dict__["hint"] for r in caplog.records] == [1, 1, 0]


def test_ttls_are_wanted_once_an_answer_leaves_them_open() -> None:
    """To learn them from requests costs a search of each: nobody pays it who needs it not."""
    given = pricing(entries={"claude-sonnet-4-5": SONNET | HOUR})
    split = exchange(model="claude-sonnet-4-5", usage=Usage(7, 16, 0, 300, 200, 100), hour=None)
    total = exchange(model="claude-sonnet-4-5", usage=Usage(7, 16, 0, 300), hour=None)
    assert total.observation is not None
    wanted = []
    for each, kind in ((split, Cost), (total, Unpriced)):
        assert isinstance(given.price(each, each.observation or Observation(Status.MISSING)), kind)
        wanted.append(given.ttls_wanted)
    assert wanted == [False, True]
    known = total._replace(facts=total.facts._replace(hour_asked=False))
    assert isinstance(given.price(known, total.observation), Cost)
    own_account = known._replace(facts=known.facts._replace(caching_asked=False))
    assert given.price(own_account, total.observation) is Unpriced.UNKNOWN_TTL


def test_an_answer_without_usage_is_neither_priced_nor_unpriced() -> None:
    """It is missing from the tokens, too."""
    given = pricing()
    for usage in (Usage(), Usage(0, 0, 0, 0)):
        empty = exchange(model="alias", usage=usage)
        assert empty.observation is not None
        assert given.price(empty, empty.observation) is None


def test_cards_are_kept_until_a_source_changes() -> None:
    """Resolving takes a hundred times as long as pricing. A client can ask for anything: what is
    kept has a bound."""
    given = pricing()
    asked = exchange(model="claude-sonnet-4-5", usage=Usage(7, 16))
    assert asked.observation is not None
    first = given.price(asked, asked.observation)
    given.cost_map = cost_map({"claude-sonnet-4-5": {**SONNET, "output_cost_per_token": 1}})
    assert given.price(asked, asked.observation) == first
    given.changed()
    assert given.price(asked, asked.observation) != first
    for number in range(5000):
        each = exchange(model=f"m{number}")
        assert each.observation is not None
        given.price(each, each.observation)
    assert len(given._cards) <= 4096


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"m": {"input_cost_per_token": 1}',
        b'{"error": {"message": "no"}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_no_cost_map(body: bytes) -> None:
    """It is refused whole."""
    with pytest.raises(ValueError, match="not a"):
        CostMap(body)


def test_an_entry_that_is_no_object_is_passed_over() -> None:
    """One bad entry spoils no other."""
    entries = {"claude-own-9": 3, "m": ["x"], "claude-sonnet-4-5": SONNET}
    given = pricing(entries=entries)
    assert given.card(Asked("claude-own-9")) is Unpriced.UNKNOWN_MODEL
    assert usd(given, Asked("claude-sonnet-4-5")) == 3


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": {}}', b"[" * 100_000])
def test_an_answer_that_is_no_list_of_deployments(body: bytes) -> None:
    """It is refused whole."""
    with pytest.raises(ValueError, match="not a list of deployments"):
        deployments_in(body)


def test_a_deployment_without_id_or_model_is_passed_over() -> None:
    """Another is not."""
    listed = [{"model_name": "a"}, {"litellm_params": {"model": "m"}, "model_info": {"id": "d1"}}]
    found = deployments_in(json.dumps({"data": listed}).encode())
    assert (len(found), "d1" in found) == (1, True)


def test_a_wildcard_deployment_stands_for_what_was_asked_for() -> None:
    """LiteLLM 1.100 writes a row for each model it knows, all with one id; 1.83 the wildcard."""
    row = deployment("anthropic/*") | {"model_name": "anthropic/*"}
    rows = [
        deployment(name, {"input_cost_per_token": rate}) | {"model_name": name}
        for name, rate in (("anthropic/a", 1e-06), ("anthropic/b", 2e-06))
    ]
    asked = Asked("anthropic/b", model_id="d1")
    given = pricing(entries=None, info=rows)
    assert usd(given, asked) == 2
    assert given.card(asked._replace(requested="anthropic/c")) is Unpriced.UNKNOWN_MODEL
    given = pricing(info=[row])
    assert usd(given, asked._replace(requested="anthropic/claude-own-2")) == 3
    assert not given.missed_deployment


def test_a_deployment_with_two_names_is_one() -> None:
    """Each name leads to it, also one that is asked for and not listed."""
    rows = [deployment("claude-own-2") | {"model_name": name} for name in ("a", "b")]
    given = pricing(info=rows)
    for name in ("a", "b", "c"):
        assert usd(given, Asked(name, model_id="d1")) == 3


def test_the_provider_of_a_deployment_that_names_none() -> None:
    """LiteLLM says it beside the prices."""
    info = {"litellm_provider": "vertex_ai-anthropic_models"}
    given = pricing(info=[deployment("claude-own-3@20250101", info, vertex_location="global")])
    assert usd(given, Asked("alias", model_id="d1")) == 3


@pytest.mark.parametrize(
    ("response_model", "requested"),
    [
        ("gpt-4o-2024-08-06", "our-model"),
        (None, "gpt-4o"),
        ("o3-mini-2025-01-31", "our-model"),
    ],
)
def test_openai_model_has_a_price(response_model: str | None, requested: str) -> None:
    """Named by the answer, or else by the request; reads have a rate of their own."""
    given = exchange(
        model=requested,
        message_id="chatcmpl-1",
        response_model=response_model,
        response_headers=[],
        usage=Usage(53, 16, 2048),
    )
    assert given.observation is not None
    cost = pricing(entries=None, package=True).price(given, given.observation)
    assert isinstance(cost, Cost)
    assert asked_of(given, given.observation).kind == "openai"
