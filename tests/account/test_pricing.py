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
from sidecar.account.pricing import Asked, Card, Pricing
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
    assert usd(given, asked._replace(geo="eu")) == 3
    assert usd(given, Asked("claude-own-1-20250101", geo="us")) == 3


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
    with caplog.at_level(logging.WARNING):
        for each in (unknown, unknown, hour, hour):
            assert each.observation is not None
            assert isinstance(given.price(each, each.observation), Unpriced)
    assert [(r.msg, r.__dict__["reason"], r.__dict__["model"]) for r in caplog.records] == [
        ("response_unpriced", "unknown_model", "alias"),
        ("response_unpriced", "no_write_1h_rate", "claude-sonnet-4-5"),
    ]


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
