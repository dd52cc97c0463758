"""The sidecar's arithmetic beside LiteLLM's own `completion_cost`, on usages that providers sent.

Both price by the cost map of that LiteLLM. Where they differ, each row says why.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from sidecar.account.price_litellm import CostMap
from sidecar.account.pricing import Asked, Card, Pricing
from sidecar.account.rates import ATTO, Cost, Unpriced, cost_of
from sidecar.exchange import Observation, Terms, Usage
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
        completion_response=answer, model=each["model"], custom_llm_provider="anthropic"
    ))
models = {each["model"] for each in given}
entries = {name: litellm.model_cost[name] for name in models}
json.dump({"costs": costs, "map": entries}, sys.stdout)
"""


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
    program = require(find_litellm(version), f"LiteLLM {version}")
    usages = drawn()
    assert len(usages) == NUMBER
    given = [{"model": MODEL, "usage": as_usage(seen)} for seen in usages]
    done = subprocess.run(
        [str(program.with_name("python")), "-c", SCRIPT],
        input=json.dumps(given),
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
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
