"""The sidecar's arithmetic beside LiteLLM's own `completion_cost`, on usages that providers sent.

Both price by the cost map of that LiteLLM. Where they differ, each row says why.
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from sidecar.account.price_litellm import CostMap, deployments_in
from sidecar.account.pricing import Asked, Card, Pricing, asked_of
from sidecar.account.rates import ATTO, Cost, RateClass, Rates, Unpriced, cost_of
from sidecar.exchange import Observation, Status, Terms, Usage
from tests.account.test_ledger import exchange
from tests.support.bodies import observe
from tests.support.litellm import VERSIONS, find_litellm
from tests.support.requirements import require, require_corpus

NUMBER = 200
MODEL = "claude-sonnet-4-5"
EXPLAINED = {
    "1.83.10": {"written without a split": 12, "no price of an hour": 2},
    "1.100.5": {"written without a split": 12},
}
"""Rows that differ, by the reason."""
ONE_NANO = Decimal("1e-9")

# Asked of LiteLLM's interpreter: how LiteLLM itself prices an answer of `/v1/messages`.
SCRIPT = """
import json, sys
import litellm
from litellm.llms.anthropic.chat.transformation import AnthropicConfig

given = json.load(sys.stdin)
costs = []
for each in given:
    usage = AnthropicConfig().calculate_usage(usage_object=each["usage"], reasoning_content=None)
    answer = litellm.ModelResponse(model=each["model"])
    answer.usage = usage
    costs.append(litellm.completion_cost(
        completion_response=answer, model=each["model"], custom_llm_provider=each["provider"]
    ))
json.dump({"costs": costs, "map": litellm.model_cost}, sys.stdout)
"""


@functools.cache
def asked_of_litellm(version: str, given: str) -> dict[str, Any]:
    """Ask a LiteLLM for its map, and what answers cost."""
    program = require(find_litellm(version), f"LiteLLM {version}")
    done = subprocess.run(
        [str(program.with_name("python")), "-c", SCRIPT],
        input=given,
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def drawn() -> list[Observation]:
    """Draw distinct usages from the recorded answers, at random but the same each time; those with
    written tokens or searches all, because there are few."""
    folder = require_corpus()
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    found: dict[tuple[Usage, Terms], Observation] = {}
    for row in rows:
        if row["kind"].startswith("anthropic-") and row["expected"]:
            body = (folder / row["file"]).read_bytes()
            seen = observe(body, [(b"content-type", row["content_type"].encode())])
            found.setdefault((seen.usage, seen.terms), seen)
    everything = list(found.values())
    random.Random(1).shuffle(everything)
    everything.sort(
        key=lambda seen: not (seen.usage.write_tokens or seen.terms.web_search_requests)
    )
    return everything[:NUMBER]


def as_usage(seen: Observation) -> dict[str, Any]:
    """Write a usage as the wire has it."""
    usage, terms = seen.usage, seen.terms
    written = {
        "ephemeral_5m_input_tokens": usage.ephemeral_5m_input_tokens,
        "ephemeral_1h_input_tokens": usage.ephemeral_1h_input_tokens,
    }
    whole = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_input_tokens": usage.cache_read_input_tokens,
        "cache_creation_input_tokens": usage.cache_creation_input_tokens,
        "cache_creation": {k: v for k, v in written.items() if v is not None} or None,
        "service_tier": terms.service_tier,
        "inference_geo": terms.inference_geo,
        "speed": terms.speed,
    }
    if terms.web_search_requests is not None:
        whole["server_tool_use"] = {"web_search_requests": terms.web_search_requests}
    return {name: value for name, value in whole.items() if value is not None}


@pytest.mark.parametrize("version", VERSIONS)
def test_equal_to_litellm_or_explained(version: str) -> None:
    """Two hundred usages of recorded answers, priced as Claude Sonnet 4.5 by the cost map of that
    LiteLLM. Every row is equal to a billionth of a dollar, or differs by just what is named."""
    usages = drawn()
    assert len(usages) == NUMBER
    given = [{"model": MODEL, "provider": "anthropic", "usage": as_usage(seen)} for seen in usages]
    answer = asked_of_litellm(version, json.dumps(given))
    pricing = Pricing(file=None, package=False, clock=lambda: 0.0)
    pricing.cost_map = CostMap(json.dumps(answer["map"]).encode())
    card = pricing.card(Asked(MODEL))
    assert isinstance(card, Card)

    explained: Counter[str] = Counter()
    for seen, theirs in zip(usages, answer["costs"], strict=True):
        tokens = seen.usage.input_classes()
        searches = seen.terms.web_search_requests or 0
        output = seen.usage.output_tokens or 0
        ours = cost_of(card.brackets, tokens, output, searches, only_5m=True)
        if ours is Unpriced.NO_WRITE_1H_RATE:
            # 1.83.10's map has no such rate; LiteLLM then writes for an hour at nothing.
            explained["no price of an hour"] += 1
            tokens = (*tokens[:3], 0, tokens[4])
            ours = cost_of(card.brackets, tokens, output, searches, only_5m=True)
        assert isinstance(ours, Cost)
        difference = Decimal(ours.total) / ATTO - Decimal(str(theirs))
        split = as_usage(seen).get("cache_creation")
        if tokens[4] and split:
            # A server tool's own writes come without a split. LiteLLM bills the split alone.
            explained["written without a split"] += 1
            difference -= Decimal(ours.kinds[4]) / ATTO
        assert abs(difference) <= ONE_NANO, (seen, theirs)
    assert explained == EXPLAINED[version]


BEDROCK_ID = "anthropic.claude-sonnet-4-5-20250929-v1:0"
DEPLOYED = (
    "anthropic/claude-sonnet-4-5-20250929",
    "anthropic/claude-haiku-4-5",
    "anthropic/claude-opus-4-6",
    "vertex_ai/claude-sonnet-4-5@20250929",
    f"bedrock/{BEDROCK_ID}",
    f"bedrock/us.{BEDROCK_ID}",
    f"bedrock/jp.{BEDROCK_ID}",
    f"bedrock/global.{BEDROCK_ID}",
    f"bedrock/us-east-1/{BEDROCK_ID}",
    f"bedrock/converse/us.{BEDROCK_ID}",
    "bedrock/us.anthropic.claude-opus-4-6-v1",
)
REGIONLESS = (f"bedrock/{BEDROCK_ID}", f"bedrock/us-east-1/{BEDROCK_ID}")
"""The package has another price for these than LiteLLM, and its hour goes with that."""
EACH = 40


def made() -> list[tuple[str, Observation]]:
    """Make up usages of each deployment, at random but the same each time: every class of tokens
    is in some and not in others, and half of the prompts are long."""
    chance = random.Random(2)

    def tokens(most: int) -> int:
        return chance.randrange(most) if chance.random() < 0.6 else 0

    found = []
    for model in DEPLOYED:
        for number in range(EACH):
            most = 300_000 if number % 2 else 20_000
            write_5m, write_1h = tokens(most), tokens(most)
            usage = Usage(
                tokens(most),
                tokens(5_000) + 1,
                tokens(most),
                write_5m + write_1h,
                write_5m,
                write_1h,
            )
            place = "us" if model == "anthropic/claude-opus-4-6" and number % 3 == 0 else None
            found.append(
                (model, Observation(Status.COMPLETE, usage, terms=Terms(None, None, place)))
            )
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_true_or_not_priced(version: str) -> None:
    """Through the sources as they are by default, of models at three providers, long prompts and
    writes for an hour: what has a price has the one that LiteLLM 1.100.5 bills. With 1.83.10's
    map, which has no price of an hour, what the package does not know either has none."""
    given = made()
    rows = []
    for model, seen in given:
        provider, _, name = model.partition("/")
        rows.append({"model": name, "provider": provider, "usage": as_usage(seen)})
    true = asked_of_litellm("1.100.5", json.dumps(rows))["costs"]
    pricing = Pricing(file=None, package=True, clock=lambda: 1_795_500_000.0)
    entries = asked_of_litellm(version, json.dumps(rows if version == "1.100.5" else []))["map"]
    pricing.cost_map = CostMap(json.dumps(entries).encode())
    listed = [
        {
            "model_name": "alias",
            "litellm_params": {"model": model, "vertex_location": "global"},
            "model_info": {"id": model},
        }
        for model in DEPLOYED
    ]
    pricing.take_deployments(deployments_in(json.dumps({"data": listed}).encode()))

    for (model, seen), theirs in zip(given, true, strict=True):
        headers = [(b"x-litellm-model-id", model.encode())]
        asked = asked_of(exchange(model="alias", response_headers=headers), seen)
        ours = pricing.price_as(asked, exchange().facts, seen)
        hour = seen.usage.ephemeral_1h_input_tokens or 0
        long = sum(seen.usage.input_classes()) > 200_000
        if version == "1.83.10" and hour and BEDROCK_ID in model and (long or model in REGIONLESS):
            assert ours is Unpriced.NO_WRITE_1H_RATE, (model, seen)
            continue
        assert isinstance(ours, Cost), (model, seen)
        difference = Decimal(ours.total) / ATTO - Decimal(str(theirs))
        if model.startswith("vertex_ai/") and long:
            # For want of the long price of an hour in its map, LiteLLM bills the short one.
            difference -= hour * Decimal("6e-6")
        assert abs(difference) <= ONE_NANO, (model, seen)


def cards_of(entries: dict[str, Any], names: list[str], *, package: bool) -> list[Card | Unpriced]:
    """Put the card of each model together, as that of a deployment of it."""
    pricing = Pricing(file=None, package=package, clock=lambda: 1_795_500_000.0)
    pricing.cost_map = CostMap(json.dumps(entries).encode())
    listed = [
        {
            "litellm_params": {"model": name, "vertex_location": "global"},
            "model_info": {"id": name, "litellm_provider": entries[name]["litellm_provider"]},
        }
        for name in names
    ]
    pricing.take_deployments(deployments_in(json.dumps({"data": listed}).encode()))
    return [pricing.card(Asked("alias", model_id=name)) for name in names]


def rates_for(card: Card | Unpriced, size: int) -> Rates:
    assert isinstance(card, Card)
    return next(rates for above, rates in card.brackets if size > above)


def test_what_the_package_adds_is_true() -> None:
    """To every Claude in 1.83.10's map the package adds nothing but what 1.100.5's map has: the
    price of an hour, for short prompts and long ones."""
    old, new = (asked_of_litellm(version, "[]")["map"] for version in ("1.83.10", "1.100.5"))
    names = [
        name
        for name, entry in old.items()
        if "claude" in name
        # Where its own price is another, the map is wrong, or was by then.
        and "input_cost_per_token" in entry
        and entry["input_cost_per_token"] == new.get(name, {}).get("input_cost_per_token")
    ]
    each = zip(
        names,
        cards_of(old, names, package=False),
        cards_of(old, names, package=True),
        cards_of(new, names, package=False),
        strict=True,
    )
    added: Counter[tuple[RateClass, int]] = Counter()
    for name, alone, together, true in each:
        for size in (1_000, 300_000):
            found = zip(
                list(RateClass)[:5],
                *(rates_for(card, size) for card in (alone, together, true)),
                strict=False,
            )
            for what, before, rate, expected in found:
                if before is None and rate is not None and expected is not None:
                    assert rate == expected, (name, what, size)
                    added[what, size] += 1
    assert set(added) == {(RateClass.WRITE_1H, 1_000), (RateClass.WRITE_1H, 300_000)}
    assert min(added.values()) >= 10
