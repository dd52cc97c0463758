"""What LiteLLM says that a call cost, what the sidecar says, and what is true.

Real LiteLLMs with stand-ins for three providers: a read, a 5-minute write and a 1-hour write, as
JSON and as a stream, on each. What is true is worked out from the tokens in the stand-ins' books
and the list prices below. It needs `make litellm`, and nothing from the network.

    python -m bench.costs [--write docs/prices.md]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from tests.support.calls import ask_now, body_for, post, request, samples
from tests.support.clouds import Clouds, run_clouds
from tests.support.litellm import MASTER_KEY, RED, VERSIONS, LiteLLM
from tests.support.running import SidecarProcess, sidecar_process

__all__ = ["SETTINGS", "Figure", "figures", "rewritten", "table"]

SETTINGS = {
    "SIDECAR_PRICE_SOURCES": "file,model_info,cost_map,package",
    "SIDECAR_LITELLM_KEY": MASTER_KEY,
}
"""Of the sidecar whose figures are shown: as it is by default, with a key for LiteLLM."""

# USD per million tokens of Claude Sonnet 4.5: platform.claude.com/docs/en/about-claude/pricing,
# aws.amazon.com/bedrock/pricing and cloud.google.com/vertex-ai/generative-ai/pricing, as
# LiteLLM 1.100.5 and genai-prices 0.2.3 have them. A regional endpoint costs a tenth more than
# the global one; the stand-ins of Bedrock (`us.…`) and Vertex AI (us-east5) are such.
_LIST = {
    "input_tokens": Decimal(3),
    "output_tokens": Decimal(15),
    "cache_read_input_tokens": Decimal("0.3"),
    "ephemeral_5m_input_tokens": Decimal("3.75"),
    "ephemeral_1h_input_tokens": Decimal(6),
}
_FACTORS = {
    "claude-direct": Decimal(1),
    "claude-vertex": Decimal("1.1"),
    "claude-bedrock": Decimal("1.1"),
}
_PROVIDERS = {
    "claude-direct": "Anthropic",
    "claude-vertex": "Vertex AI, us-east5",
    "claude-bedrock": "Bedrock, `us.`",
}
_KINDS = ("read", "5m write", "1h write")
_HEADERS = (b"x-litellm-response-cost", b"x-litellm-response-cost-original")
_SPEND = "litellm_spend_metric_total"
_COST = "litellm_sidecar_cost_usd_total"
_UNPRICED = "litellm_sidecar_unpriced_responses_total"
_WAIT_S = 30.0
_SAME_USD = Decimal("1e-9")


@dataclass(frozen=True)
class Figure:
    """One call, in USD; None where nothing was said."""

    version: str
    model: str
    mode: str
    kind: str
    true: Decimal
    header: Decimal | None
    spend: Decimal
    sidecar: Decimal | None


def figures(
    litellm: LiteLLM, clouds: Clouds, front: SidecarProcess, models: Sequence[str] = tuple(_FACTORS)
) -> Iterator[Figure]:
    """Make all calls through a sidecar with these `SETTINGS`, and say what was said of each."""
    _wait(lambda: _sources(front) >= {"model_info", "cost_map"})
    number = 0
    for model in models:
        for mode in ("JSON", "SSE"):
            for kind in _KINDS:
                number += 1
                body = body_for(
                    model,
                    f"costs {litellm.version} {mode} {model} {kind}",
                    tokens=1500 + 31 * number,
                    stream=mode == "SSE",
                    ttl="1h" if kind == "1h write" else "5m",
                )
                if kind == "read":
                    _call(litellm, front, body)
                before = len(clouds.books.entries)
                header, spend, sidecar = _call(litellm, front, body)
                (entry,) = clouds.books.entries[before:]
                tokens = {name: getattr(entry, name) for name in _LIST}
                true = sum((_LIST[name] * count for name, count in tokens.items()), Decimal(0))
                true *= _FACTORS[model] / 1_000_000
                yield Figure(litellm.version, model, mode, kind, true, header, spend, sidecar)


def _call(
    litellm: LiteLLM, front: SidecarProcess, body: dict[str, object]
) -> tuple[Decimal | None, Decimal, Decimal | None]:
    spent = _spend(litellm)
    cost, unpriced = _sidecar(front)
    answer = ask_now(front.url, post(body, RED.key))
    assert (answer.status, answer.complete) == (200, True), answer.body
    now_cost, now_unpriced = _sidecar(front)
    named = dict(answer.headers)
    header = next((Decimal(named[name].decode()) for name in _HEADERS if name in named), None)
    # LiteLLM counts after it has answered. No call is free: its spend always rises.
    _wait(lambda: _spend(litellm) > spent)
    sidecar = None if now_unpriced > unpriced else now_cost - cost
    return header, _spend(litellm) - spent, sidecar


def _spend(litellm: LiteLLM) -> Decimal:
    return sum(
        (Decimal(str(value)) for name, _, value in samples(litellm.metrics()) if name == _SPEND),
        Decimal(0),
    )


def _sidecar(front: SidecarProcess) -> tuple[Decimal, Decimal]:
    sums = {_COST: Decimal(0), _UNPRICED: Decimal(0)}
    for name, _, value in _rows(front):
        if name in sums:
            sums[name] += Decimal(str(value))
    return sums[_COST], sums[_UNPRICED]


def _sources(front: SidecarProcess) -> set[str]:
    """Name the sources that were read."""
    name = "litellm_sidecar_price_refreshes_total"
    return {
        labels["source"]
        for found, labels, value in _rows(front)
        if found == name and labels["result"] == "success" and value
    }


def _rows(front: SidecarProcess) -> list[tuple[str, dict[str, str], float]]:
    return samples(ask_now(front.admin_url, request("GET", "/metrics")).body.decode())


def _wait(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("LiteLLM did not say what was waited for")
        time.sleep(0.05)


def table(rows: Sequence[Figure]) -> str:
    """Write a Markdown table; what is not true is set in bold, with how far it is off."""
    lines = [
        "| LiteLLM | provider | mode | what | true, USD | LiteLLM's header | LiteLLM's spend "
        "metric | sidecar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.version, _PROVIDERS[row.model], row.mode, row.kind, f"{row.true:.7f}"]
        cells += [_cell(row.true, said) for said in (row.header, row.spend, row.sidecar)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(true: Decimal, said: Decimal | None) -> str:
    if said is None:
        return "not priced"
    if abs(said - true) <= _SAME_USD:
        return "true"
    return f"**{said:.7f}** ({(said / true - 1) * 100:+.0f}%)"


def rewritten(text: str, rows: Sequence[Figure]) -> str:
    """Put the table between its markers."""
    head, _, rest = text.partition("<!-- costs:begin -->\n")
    _, _, tail = rest.partition("<!-- costs:end -->")
    return f"{head}<!-- costs:begin -->\n{table(rows)}<!-- costs:end -->{tail}"


def main() -> None:
    """Run both versions and print the table, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file whose table is replaced")
    path = parser.parse_args().write
    rows: list[Figure] = []
    with run_clouds() as clouds, tempfile.TemporaryDirectory() as directory:
        for version in VERSIONS:
            place = Path(directory) / version
            place.mkdir()
            with LiteLLM(version, clouds.url, place) as litellm:
                settings = SETTINGS | {"SIDECAR_UPSTREAM": litellm.url}
                with sidecar_process(place, settings) as front:
                    rows += figures(litellm, clouds, front)
    if path is None:
        print(table(rows), end="")
    else:
        path.write_text(rewritten(path.read_text(), rows))


if __name__ == "__main__":
    main()
