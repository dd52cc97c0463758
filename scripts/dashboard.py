"""Writes the Grafana dashboard, of which this is the source.

It knows what is asked of Prometheus and how Grafana shows it. Its queries lean on the sidecar's own
metrics alone, not on recording rules, so that it can be imported anywhere; the one exception is
LiteLLM's spend, beside which the sidecar's cost is shown. With `--check` it writes nothing, and
ends with 1 and a diff where the file differs from what it would write.

    python scripts/dashboard.py [--check]
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from grafana_foundation_sdk.builders import bargauge, stat, table, timeseries
from grafana_foundation_sdk.builders import common as visual
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus as query
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

__all__ = ["ALERT_NAMES", "PAGE", "UID", "main", "rendered"]

ROOT = Path(__file__).resolve().parents[1]
UID = "litellm-cache-sidecar"
PAGE = ROOT / "deploy" / "grafana" / "dashboards" / f"{UID}.json"

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
ALERT_NAMES = "PromptCache.+|Sidecar.+"
"""Every alert of `deploy/prometheus/alerts.yml`."""

# `All` is `.*` in these and not a list of names, so that it also matches a series without the
# label: SIDECAR_LABELS may leave any of the three out, and outside of Kubernetes there is no
# namespace.
_PLACE = 'namespace=~"$namespace"'
_PROCESS = f'{_PLACE},instance=~"$instance"'
_MODEL = f'{_PROCESS},model=~"$model"'
_USAGE = f'{_MODEL},team_alias=~"$team_alias",provider=~"$provider"'

# What a process says of itself bears names that others use, too: those of the sidecars are the
# ones beside their build_info. That is grouped, because clusters may share addresses.
_OURS = (
    "* on (job, instance) group_left (version) "
    f"group by (job, instance, version) (litellm_sidecar_build_info{{{_PROCESS}}})"
)

_QUIET = "No traffic"
_UNPRICED = "No answer with a price"
_NONE = "None"

_STEP = "$__rate_interval"
_RANGE = "$__range"


def _rate(metric: str, matchers: str = _USAGE, *, by: str = "", window: str = _STEP) -> str:
    return _summed("rate", metric, matchers, by, window)


def _increase(metric: str, matchers: str = _USAGE, *, by: str = "", window: str = _RANGE) -> str:
    return _summed("increase", metric, matchers, by, window)


def _summed(function: str, metric: str, matchers: str, by: str, window: str) -> str:
    grouping = f" by ({by}) " if by else ""
    return f"sum{grouping}({function}(litellm_sidecar_{metric}{{{matchers}}}[{window}]))"


def _ratio(part: str, whole: str) -> str:
    """Divide, where there is something to divide by."""
    return f"{part} / ({whole} > 0)"


_ASKED = _USAGE + ',outcome=~"hit|write|not_cached"'
_WRITTEN = _USAGE + ',cache=~"write_.+"'


def _by_tokens(window: str, by: str = "") -> str:
    read, whole = _USAGE + ',cache="read"', _USAGE
    return _ratio(
        _rate("input_tokens_total", read, by=by, window=window),
        _rate("input_tokens_total", whole, by=by, window=window),
    )


def _by_requests(window: str, by: str = "") -> str:
    return _ratio(
        _rate("responses_total", _USAGE + ',outcome="hit"', by=by, window=window),
        _rate("responses_total", _ASKED, by=by, window=window),
    )


def _net(window: str, *, by: str = "") -> str:
    """What reads saved less what writes cost more: both exist for every label set."""
    return " - ".join(
        _increase(metric, by=by, window=window)
        for metric in ("cache_read_savings_usd_total", "cache_write_premium_usd_total")
    )


def _quantile(share: float, histogram: str) -> str:
    # The comparison drops routes without traffic, whose quantile is not a number.
    buckets = _rate(f"{histogram}_bucket", _PROCESS, by="le, route")
    return f"histogram_quantile({share:g}, {buckets}) >= 0"


@dataclass(frozen=True, slots=True)
class Ask:
    """One query of a panel."""

    expr: str
    legend: str = ""
    """Grafana's template of a series' name; of a column of a table its heading."""
    unit: str = ""
    """Of a column of a table."""


def _target(ask: Ask, number: int, how: Literal["range", "now", "table"]) -> query.Dataquery:
    target = query.Dataquery().expr(ask.expr).ref_id(chr(ord("A") + number)).datasource(SOURCE)
    if how == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    target.legend_format(ask.legend).format(PromQueryFormat.TIME_SERIES)
    return target.instant() if how == "now" else target.range()


def _thresholds(*steps: tuple[float | None, str]) -> build.ThresholdsConfig:
    return (
        build.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value=value, color=color) for value, color in steps])
    )


_PLAIN = ((None, "text"),)
_ANY_IS_BAD = ((None, "green"), (1e-9, "red"))


Panel = TypeVar("Panel", stat.Panel, bargauge.Panel, timeseries.Panel, table.Panel)


class Layout:
    """Puts panels on the grid from left to right, and gives them their numbers."""

    def __init__(self) -> None:
        self.page = build.Dashboard("LiteLLM: provider prompt cache")
        self._number = 0
        self._x = self._y = self._height = 0

    def row(self, title: str) -> None:
        """Begin a row."""
        self._y += self._height
        place = dashboard.GridPos(h=1, w=24, x=0, y=self._y)
        self._x, self._height, self._y = 0, 0, self._y + 1
        self._number += 1
        self.page.with_row(build.Row(title).id(self._number).grid_pos(place))

    def _begin(
        self, panel: Panel, size: tuple[int, int], title: str, text: str, unit: str, quiet: str
    ) -> Panel:
        """Give a panel what every panel has, and the next place of that width and height."""
        width, height = size
        if self._x + width > 24:
            self._x, self._y, self._height = 0, self._y + self._height, 0
        place = dashboard.GridPos(h=height, w=width, x=self._x, y=self._y)
        self._x, self._height = self._x + width, max(self._height, height)
        self._number += 1
        panel.id(self._number).grid_pos(place).title(title).description(text)
        return panel.datasource(SOURCE).unit(unit).no_value(quiet)

    def number(
        self,
        title: str,
        text: str,
        unit: str,
        *asks: Ask,
        width: int = 4,
        steps: Sequence[tuple[float | None, str]] = _PLAIN,
        quiet: str = _QUIET,
        names: bool = False,
        decimals: int | None = None,
    ) -> None:
        """Add one number, or one for each series where they are named."""
        panel = (
            self._begin(stat.Panel(), (width, 4), title, text, unit, quiet)
            .thresholds(_thresholds(*steps))
            .graph_mode(common.BigValueGraphMode.NONE)
            .color_mode(common.BigValueColorMode.VALUE)
            .text_mode(
                common.BigValueTextMode.VALUE_AND_NAME if names else common.BigValueTextMode.AUTO
            )
            .reduce_options(visual.ReduceDataOptions().calcs(["lastNotNull"]))
        )
        if decimals is not None:
            panel.decimals(decimals)
        for at, ask in enumerate(asks):
            panel.with_target(_target(ask, at, "now"))
        self.page.with_panel(panel)

    def bars(self, title: str, text: str, unit: str, ask: Ask, *, quiet: str = _QUIET) -> None:
        """Add sums over the range as bars."""
        panel = (
            self._begin(bargauge.Panel(), (8, 8), title, text, unit, quiet)
            .min(0)
            .thresholds(_thresholds((None, "blue")))
            .display_mode(common.BarGaugeDisplayMode.BASIC)
            .orientation(common.VizOrientation.HORIZONTAL)
            .reduce_options(visual.ReduceDataOptions().calcs(["lastNotNull"]))
            .with_target(_target(ask, 0, "now"))
        )
        self.page.with_panel(panel)

    def lines(
        self,
        title: str,
        text: str,
        unit: str,
        *asks: Ask,
        width: int = 8,
        stacked: bool = False,
        share: bool = False,
        calcs: Sequence[str] = ("mean", "max", "lastNotNull"),
        quiet: str = _QUIET,
        running_totals: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Add lines over time.

        Args:
            share: the values lie between 0 and 1.
            running_totals: series that are to be added up from left to right, and what the sum
                is called; the series themselves are then not shown.
        """
        panel = (
            self._begin(timeseries.Panel(), (width, 8), title, text, unit, quiet)
            .thresholds(_thresholds(*_PLAIN))
            .draw_style(common.GraphDrawStyle.LINE)
            .line_width(1)
            .fill_opacity(40 if stacked else 8)
            .show_points(common.VisibilityMode.AUTO)
            .stacking(
                visual.StackingConfig()
                .mode(common.StackingMode.NORMAL if stacked else common.StackingMode.NONE)
                .group("A")
            )
            .legend(
                visual.VizLegendOptions()
                .display_mode(common.LegendDisplayMode.TABLE)
                .placement(common.LegendPlacement.BOTTOM)
                .show_legend(True)
                .calcs(list(calcs))
            )
            .tooltip(
                visual.VizTooltipOptions()
                .mode(common.TooltipDisplayMode.MULTI)
                .sort(common.SortOrder.DESCENDING)
            )
        )
        if share:
            panel.min(0).max(1)
        elif stacked:
            panel.min(0)
        for at, ask in enumerate(asks):
            panel.with_target(_target(ask, at, "range"))
        for field, total in running_totals:
            panel.with_transformation(
                dashboard.DataTransformerConfig(
                    id_val="calculateField",
                    options={
                        "mode": "cumulativeFunctions",
                        "cumulative": {"field": field, "reducer": "sum"},
                        "reduce": {"reducer": "sum"},
                        "alias": total,
                        "replaceFields": False,
                    },
                )
            )
            hidden = {"legend": True, "tooltip": True, "viz": True}
            panel.override_by_name(
                field, [dashboard.DynamicConfigValue(id_val="custom.hideFrom", value=hidden)]
            )
        self.page.with_panel(panel)

    def rows(self, title: str, text: str, labels: Sequence[str], *asks: Ask) -> None:
        """Add a table with a line for each set of labels and a column for each query."""
        values = [f"Value #{chr(ord('A') + at)}" for at in range(len(asks))]
        # A ratio of nothing is not zero.
        panel = (
            self._begin(table.Panel(), (24, 9), title, text, "short", "–")
            .thresholds(_thresholds(*_PLAIN))
            .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
            .with_transformation(
                dashboard.DataTransformerConfig(
                    id_val="organize",
                    options={
                        "excludeByName": {"Time": True},
                        "includeByName": {},
                        "indexByName": {
                            name: at for at, name in enumerate(("Time", *labels, *values))
                        },
                        "renameByName": {
                            value: ask.legend for value, ask in zip(values, asks, strict=True)
                        },
                    },
                )
            )
            .sort_by([visual.TableSortByFieldState().display_name(asks[0].legend).desc(True)])
        )
        for at, ask in enumerate(asks):
            panel.with_target(_target(ask, at, "table"))
            panel.override_by_name(
                ask.legend, [dashboard.DynamicConfigValue(id_val="unit", value=ask.unit)]
            )
        self.page.with_panel(panel)


def _at_a_glance(page: Layout) -> None:
    page.row("At a glance: the whole range that is chosen above")
    page.number(
        "Hit ratio by tokens",
        "Of all prompt tokens, the part that was read from the provider's cache. What is not read "
        "costs ten times as much. Below what is usual: see Miss reasons, and docs/alerts.md, "
        "PromptCacheHitRatioFell.",
        "percentunit",
        Ask(_by_tokens(_RANGE)),
        decimals=1,
    )
    page.number(
        "Hit ratio by requests",
        "Of the answers to requests that asked for caching, the part that read something. The "
        "first call of a conversation always writes: short conversations have a low ratio and are "
        "well. See docs/metrics.md, Hit ratios.",
        "percentunit",
        Ask(_by_requests(_RANGE)),
        decimals=1,
    )
    page.number(
        "Spent",
        "What answers cost, by the sidecar's own arithmetic. Answers without a price are not in "
        "it: see Unpriced answers.",
        "currencyUSD",
        Ask(_increase("cost_usd_total")),
        quiet=_UNPRICED,
        decimals=2,
    )
    page.number(
        "Saved by reads",
        "What tokens read from the cache would have cost more as ordinary input.",
        "currencyUSD",
        Ask(_increase("cache_read_savings_usd_total")),
        quiet=_UNPRICED,
        decimals=2,
    )
    page.number(
        "Net",
        "What reads saved less what writes cost more. Below zero caching costs more than it saves: "
        "find the team in the table, then see docs/alerts.md, PromptCacheWritesWithoutReads.",
        "currencyUSD",
        Ask(_net(_RANGE)),
        quiet=_UNPRICED,
        steps=((None, "red"), (0, "green")),
        decimals=2,
    )
    page.number(
        "Lost to writes never read",
        "The premium paid for writes whose time ran out before anybody read them, as far as the "
        "sidecar saw. It is part of what Net takes off. See docs/misses.md.",
        "currencyUSD",
        Ask(_increase("cache_write_premium_never_read_usd_total")),
        quiet=_UNPRICED,
        decimals=2,
    )
    page.number(
        "Answers",
        "2xx answers of models, over the range. The panels about the cache count these.",
        "short",
        Ask(_increase("responses_total")),
    )
    page.number(
        "Prompt tokens",
        "All prompt tokens, read, written or neither.",
        "short",
        Ask(_increase("input_tokens_total")),
    )
    page.number(
        "Requests per second",
        "All that is relayed now, on every route, whatever became of it; model, team and provider "
        "do not select here.",
        "reqps",
        Ask(_rate("http_requests_total", _PROCESS)),
    )
    page.number(
        "In flight",
        "Requests being relayed now. What only grows is a LiteLLM that does not answer: see "
        "Upstream failures, and docs/operating.md, Limits under load.",
        "short",
        Ask(f"sum(litellm_sidecar_http_requests_in_flight{{{_PROCESS}}})"),
    )
    page.number(
        "Failed upstream",
        "Of all requests of the range, the part to which LiteLLM gave no answer, or broke off. "
        "See docs/alerts.md, SidecarUpstreamFailures.",
        "percentunit",
        Ask(
            _ratio(
                _increase("upstream_failures_total", _PROCESS),
                _increase("http_requests_total", _PROCESS),
            )
        ),
        steps=((None, "green"), (0.01, "orange"), (0.05, "red")),
        decimals=2,
    )
    page.number(
        "Not read",
        "Of the answers of models that were no errors, the part whose usage was absent or "
        "contradicted itself. Their tokens are in no number here. See docs/alerts.md, "
        "SidecarUsageNotRead.",
        "percentunit",
        Ask(
            _ratio(
                _increase("observations_total", _MODEL + ',status=~"missing|invalid"'),
                _increase("observations_total", _MODEL + ',status!="error"'),
            )
        ),
        steps=((None, "green"), (0.05, "red")),
        decimals=2,
    )


def _cache(page: Layout) -> None:
    page.row("Cache health")
    page.lines(
        "Prompt tokens by class",
        "Prompt tokens per second. The classes are disjoint and stacked they are the whole "
        "prompt: read is what the cache is for. `write_unknown` was written, and the answer does "
        "not say for how long.",
        "short",
        Ask(_rate("input_tokens_total", by="cache"), "{{cache}}"),
        stacked=True,
        width=12,
    )
    page.lines(
        "Hit ratio",
        "Both ratios over time. By tokens falls and by requests does not: long prompts are no "
        "longer read whole. Both fall: see Miss reasons. docs/cookbook.md, question 1.",
        "percentunit",
        Ask(_by_tokens(_STEP), "by tokens"),
        Ask(_by_requests(_STEP), "by requests"),
        share=True,
        width=12,
    )
    for label, text in (
        ("model", "A model that falls alone: its prompts, or its deployments."),
        ("team_alias", "A team that falls alone: a release of its client. `None` is no team."),
        ("provider", "A provider that falls alone: its affair, or that of the way to it."),
    ):
        page.lines(
            f"Hit ratio by {label.partition('_')[0]}",
            f"By tokens. {text} `other` is what SIDECAR_MAX_LABEL_VALUES left no room for. Where "
            f"SIDECAR_LABELS leaves `{label}` out there is one line without a name. "
            "docs/cookbook.md, questions 2 and 3.",
            "percentunit",
            Ask(_by_tokens(_STEP, label), f"{{{{{label}}}}}"),
            share=True,
        )
    page.lines(
        "Answers by outcome",
        "hit read something; write only wrote; not_cached asked, and got neither; not_asked did "
        "not ask. More not_asked and fewer hits: a client stopped asking. docs/cookbook.md, "
        "question 4.",
        "short",
        Ask(_rate("responses_total", by="outcome"), "{{outcome}}"),
        stacked=True,
    )
    page.lines(
        "Miss reasons",
        "Why requests that asked read nothing, as far as one sidecar can know. changed_system, "
        "changed_tools, changed_messages: the client; other_deployment: routing; expired: pauses; "
        "not_seen_here: new conversations, or another replica. See docs/misses.md.",
        "short",
        Ask(_rate("cache_misses_total", by="reason"), "{{reason}}"),
        stacked=True,
        quiet="No misses told (SIDECAR_MISS_REASONS)",
    )
    page.lines(
        "Miss reasons by the provider",
        "What the provider itself says, where clients ask it for a diagnosis. Empty of lines above "
        "zero where none does; model, team and provider do not select here.",
        "short",
        Ask(_rate("provider_cache_miss_reasons_total", _PROCESS, by="reason"), "{{reason}}"),
        stacked=True,
    )
    page.lines(
        "Writes by how long they are kept",
        "Tokens written per second. An hour costs 2 times the price of input, 5 minutes 1.25 "
        "times. write_1h turns into write_5m: see docs/alerts.md, PromptCache1hShareLostTo5m.",
        "short",
        Ask(_rate("input_tokens_total", _WRITTEN, by="cache"), "{{cache}}"),
        stacked=True,
    )
    page.lines(
        "Tokens written and never read",
        "Tokens per second whose time ran out without a read that the sidecar saw, counted when it "
        "ran out: 5 minutes or an hour after the write. They cost more and saved nothing. "
        "docs/cookbook.md, question 6.",
        "short",
        Ask(_rate("cache_write_tokens_never_read_total", by="ttl"), "{{ttl}}"),
        stacked=True,
        quiet="None told (SIDECAR_MISS_REASONS)",
    )
    page.lines(
        "Written and never read, of all written",
        "The part of what was written that ran out unread. It lags behind the writes by as long as "
        "they are kept, so that it may be above 1 where traffic falls. Above a half for a day: "
        "caching does not pay for somebody in the table.",
        "percentunit",
        Ask(
            _ratio(
                _rate("cache_write_tokens_never_read_total"),
                _rate("input_tokens_total", _WRITTEN),
            ),
            "never read",
        ),
        quiet="Nothing written",
    )
    labels = "model, team_alias"
    page.rows(
        "By model and team",
        "Over the whole range, the dearest first. A team with a low ratio and a net below zero is "
        "the first to talk to: docs/cookbook.md, question 2. `None` is a key without a team, "
        "`unknown` one that could not be found out.",
        ("model", "team_alias"),
        Ask(_increase("cost_usd_total", by=labels), "Spent", "currencyUSD"),
        Ask(_net(_RANGE, by=labels), "Net savings", "currencyUSD"),
        Ask(_by_tokens(_RANGE, labels), "Hit ratio by tokens", "percentunit"),
        Ask(_by_requests(_RANGE, labels), "Hit ratio by requests", "percentunit"),
        Ask(_increase("responses_total", by=labels), "Answers", "short"),
        Ask(_increase("input_tokens_total", by=labels), "Prompt tokens", "short"),
        Ask(_increase("output_tokens_total", by=labels), "Output tokens", "short"),
        Ask(
            _increase("cache_write_premium_never_read_usd_total", by=labels),
            "Lost to writes never read",
            "currencyUSD",
        ),
    )


def _money(page: Layout) -> None:
    page.row("Money")
    page.bars(
        "Cost by kind",
        "Over the range, and only what cost something. What reads of the cache cost is in `read`; "
        "`server_tool` is web searches. docs/cookbook.md, question 7.",
        "currencyUSD",
        Ask(f"{_increase('cost_usd_total', by='kind')} > 0", "{{kind}}"),
        quiet=_UNPRICED,
    )
    page.bars(
        "Cost by team",
        "Over the range, the twenty dearest.",
        "currencyUSD",
        Ask(f"topk(20, {_increase('cost_usd_total', by='team_alias')} > 0)", "{{team_alias}}"),
        quiet=_UNPRICED,
    )
    page.bars(
        "Cost by provider",
        "Over the range. Where SIDECAR_LABELS leaves `provider` out it is one bar without a name.",
        "currencyUSD",
        Ask(f"{_increase('cost_usd_total', by='provider')} > 0", "{{provider}}"),
        quiet=_UNPRICED,
    )
    hourly = "3600 * "
    page.lines(
        "Cost per hour by kind",
        "USD an hour at the pace of the moment. A step without more answers is a change of price, "
        "of model or of caching.",
        "currencyUSD",
        Ask(hourly + _rate("cost_usd_total", by="kind"), "{{kind}}"),
        stacked=True,
        quiet=_UNPRICED,
    )
    step = " * $__interval_ms / 1000"
    saved, paid = "saved in the step", "paid more in the step"
    page.lines(
        "Saved and paid more, since the left edge",
        "What reads saved, and what writes cost more, added up from the left edge of the range. "
        "Caching pays where the first runs away from the second. They are sums of rates, good to "
        "some percent; the numbers at the top are exact.",
        "currencyUSD",
        Ask(_rate("cache_read_savings_usd_total") + step, saved),
        Ask(_rate("cache_write_premium_usd_total") + step, paid),
        calcs=("lastNotNull",),
        quiet=_UNPRICED,
        running_totals=((saved, "saved by reads"), (paid, "paid more for writes")),
    )
    page.lines(
        "Premium of writes per hour",
        "What writes cost more than ordinary input, by how long they are kept, and what of it was "
        "for nothing. docs/cookbook.md, question 6.",
        "currencyUSD",
        Ask(hourly + _rate("cache_write_premium_usd_total", by="ttl"), "{{ttl}}"),
        Ask(
            hourly + _rate("cache_write_premium_never_read_usd_total", by="ttl"),
            "{{ttl}}, never read",
        ),
        quiet=_UNPRICED,
    )
    page.bars(
        "Unpriced answers",
        "Answers of the range that have no cost, because no source knows the model or a rate. All "
        "money here is too low by theirs. See docs/alerts.md, SidecarModelUnpriced.",
        "short",
        Ask(
            f"{_increase('unpriced_responses_total', _MODEL, by='model, reason')} > 0",
            "{{model}}: {{reason}}",
        ),
        quiet=_NONE,
    )
    matchers = f'{_PLACE},team_alias=~"$team_alias"'
    billed = f"increase(litellm_spend_metric_total{{{matchers}}}[{_RANGE}])"
    spend = f"sum by (team_alias) ({billed})"
    ours = _increase("cost_usd_total", matchers, by="team_alias")
    page.bars(
        "LiteLLM's spend beside ours, by team",
        "How much more (10%) or less (-10%) LiteLLM has billed than the sidecar counted, over the "
        "range. Above zero: calls past the sidecar, or unpriced answers. Below: 1.83 bills writes "
        "for an hour at a part of their price. Model, provider and instance do not select here. "
        "docs/prices.md, Drift against LiteLLM's spend.",
        "percentunit",
        Ask(f"{_ratio(spend, ours)} - 1", "{{team_alias}}"),
        quiet="LiteLLM is not scraped, or nothing was spent",
    )
    page.lines(
        "Age of prices",
        "Since a source of prices was last read. It should go back to zero every "
        "SIDECAR_PRICE_REFRESH_S; where it only grows, old prices are in use. See "
        "docs/troubleshooting.md, Prices are absent or old.",
        "s",
        Ask(
            "time() - min by (source) ("
            f"litellm_sidecar_price_source_last_success_timestamp_seconds{{{_PROCESS}}})",
            "{{source}}",
        ),
        quiet="No source that is read again",
    )


def _latency(page: Layout) -> None:
    page.row("Latency, by route")
    for title, histogram, text, upper in (
        (
            "Time to first byte",
            "time_to_first_byte_seconds",
            "To the head of LiteLLM's answer. A prompt that is read from the cache is answered "
            "sooner: it grows when the hit ratio falls.",
            0.95,
        ),
        (
            "Time to first token",
            "time_to_first_token_seconds",
            "To the first content of streamed answers: what people wait for.",
            0.95,
        ),
        (
            "Duration",
            "http_request_duration_seconds",
            "To the end of the answer; it grows with what models write. A WebSocket counts from "
            "its beginning to its end.",
            0.95,
        ),
        (
            "Overhead of the sidecar",
            "overhead_seconds",
            "What the sidecar itself added, waiting left out. Milliseconds mean a processor that "
            "is too busy: see docs/troubleshooting.md, Requests are slow.",
            0.99,
        ),
    ):
        page.lines(
            title,
            f"{text} The median, and what {upper:.0%} stay below.",
            "s",
            Ask(_quantile(0.5, histogram), "{{route}} p50"),
            Ask(_quantile(upper, histogram), f"{{{{route}}}} p{100 * upper:g}"),
            width=12,
        )
    page.lines(
        "Requests by route",
        "All that is relayed, by LiteLLM's path; `other` is everything that is no model's.",
        "reqps",
        Ask(_rate("http_requests_total", _PROCESS, by="route"), "{{route}}"),
        stacked=True,
    )
    page.lines(
        "Requests by status",
        "By the status that was sent; 499 is a client that left first. 502 and 504 are mostly the "
        "sidecar's own, where LiteLLM gave no answer: see Upstream failures.",
        "reqps",
        Ask(_rate("http_requests_total", _PROCESS, by="code"), "{{code}}"),
        stacked=True,
    )
    page.lines(
        "Clients that left",
        "Exchanges that the client closed before their end, per second: impatience, time-outs of "
        "theirs, or a load balancer's. What was said until then is counted.",
        "reqps",
        Ask(_rate("client_disconnects_total", _PROCESS, by="route"), "{{route}}"),
        stacked=True,
    )


def _health(page: Layout) -> None:
    page.row("Health of the sidecars")
    seen = f"last_over_time(litellm_sidecar_build_info{{{_PROCESS}}}[{_RANGE}])"
    page.number(
        "Sidecars that do not answer",
        "Of those that were scraped within the range and are still looked for. What is down relays "
        "nothing: see docs/alerts.md, SidecarDown.",
        "short",
        Ask(f"sum(1 - (up and on (job, instance) {seen}))"),
        steps=_ANY_IS_BAD,
        quiet="No sidecar is scraped",
    )
    page.number(
        "Sidecars by version",
        "How many run which version. Two versions are well during a roll-out alone.",
        "short",
        Ask(
            f"count by (version) (litellm_sidecar_build_info{{{_PROCESS}}})",
            "{{version}}",
        ),
        names=True,
        quiet="No sidecar is scraped",
    )
    page.number(
        "LiteLLM by version",
        "Before how many sidecars which LiteLLM answered last. What changed on the day the ratio "
        "fell? See docs/migration.md.",
        "short",
        Ask(
            f"count by (version) (litellm_sidecar_upstream_info{{{_PROCESS}}} == 1)",
            "{{version}}",
        ),
        names=True,
        quiet="No answer named its version",
    )
    page.number(
        "Counted under other",
        "Exchanges of the range whose model, team or other label had no room of its own. See "
        "docs/alerts.md, SidecarLabelOverflow.",
        "short",
        Ask(_increase("label_overflows_total", _PROCESS)),
        steps=((None, "green"), (1e-9, "orange")),
        quiet=_NONE,
    )
    page.number(
        "Faults within",
        "Faults of the sidecar that were kept from reaching an answer, over the range. Any is a "
        "bug: its log line internal_error says which.",
        "short",
        Ask(_increase("internal_errors_total", _PROCESS)),
        steps=_ANY_IS_BAD,
        quiet=_NONE,
    )
    page.number(
        "Log lines lost",
        "Lines of either log that could not be written, over the range. See docs/usage-log.md.",
        "short",
        Ask(_increase("log_failures_total", _PROCESS)),
        steps=_ANY_IS_BAD,
        quiet=_NONE,
    )
    for title, metric, matchers, by, legend, text in (
        (
            "Upstream failures",
            "upstream_failures_total",
            _PROCESS,
            "reason",
            "{{reason}}",
            "By why LiteLLM gave no answer, or broke off. connect_failed: is it there? See "
            "docs/alerts.md, SidecarUpstreamFailures.",
        ),
        (
            "Refusals",
            "refusals_total",
            _PROCESS,
            "reason",
            "{{reason}}",
            "What the sidecar turned away itself. too_many_requests: a limit is reached; most "
            "others are clients that speak no proper HTTP. See docs/troubleshooting.md, Requests "
            "that are refused.",
        ),
        (
            "Observations",
            "observations_total",
            _MODEL,
            "status",
            "{{status}}",
            "Exchanges with models by what could be read of the answer. partial: a stream that "
            "broke; missing, invalid: see docs/alerts.md, SidecarUsageNotRead.",
        ),
        (
            "Label overflow",
            "label_overflows_total",
            _PROCESS,
            "label",
            "{{label}}",
            "By the label that had reached its limit; `series` is all together. See "
            "docs/operating.md, Cardinality budget.",
        ),
        (
            "Faults within, by where",
            "internal_errors_total",
            _PROCESS,
            "room",
            "{{room}}",
            "Faults that were kept from reaching an answer. Any is a bug.",
        ),
        (
            "Log lines lost, by why",
            "log_failures_total",
            _PROCESS,
            "log, reason",
            "{{log}}: {{reason}}",
            "Lines of the usage log and of the process's own that could not be written. no_space: "
            "the disk is full. See docs/usage-log.md.",
        ),
        (
            "Cut by a drain",
            "drain_aborts_total",
            _PROCESS,
            "instance",
            "{{instance}}",
            "Exchanges that were cut because the time to drain was over. See docs/alerts.md, "
            "SidecarDrainAborts.",
        ),
        (
            "Readings of prices",
            "price_refreshes_total",
            _PROCESS,
            "source, result",
            "{{source}}: {{result}}",
            "A failed one keeps the old prices. See docs/prices.md, Sources.",
        ),
        (
            "Look-ups of owners",
            "identity_lookups_total",
            _PROCESS,
            "source, result",
            "{{source}}: {{result}}",
            "How keys found their team. Other results than found mean team_alias=unknown: see "
            "docs/teams.md.",
        ),
    ):
        page.lines(
            title,
            f"{text} A point counts what happened in the {_STEP} before it.",
            "short",
            Ask(_increase(metric, matchers, by=by, window=_STEP), legend),
            calcs=("max", "lastNotNull"),
            quiet=_NONE,
        )
    page.lines(
        "Memory",
        "Resident memory of each sidecar. It follows connections and series, and is flat under "
        "the same load: see docs/operating.md, Sizing.",
        "bytes",
        Ask(f"process_resident_memory_bytes {_OURS}", "{{instance}}"),
        width=6,
        quiet="No sidecar is scraped",
    )
    page.lines(
        "Processor",
        "Processors in use. A sidecar is one process with one loop: near 1 it is full, and "
        "everything waits. More pods, not more processors: docs/operating.md, Scaling.",
        "percentunit",
        Ask(f"rate(process_cpu_seconds_total[{_STEP}]) {_OURS}", "{{instance}}"),
        width=6,
        quiet="No sidecar is scraped",
    )
    page.lines(
        "File descriptors",
        "The part of the limit that is in use. Near 1 clients are turned away: see "
        "docs/operating.md, File descriptors.",
        "percentunit",
        Ask(
            f"process_open_fds / process_max_fds {_OURS}",
            "{{instance}}",
        ),
        width=6,
        share=True,
        quiet="No sidecar is scraped",
    )
    page.lines(
        "In flight by sidecar",
        "Requests being relayed. One that has far more than the others: connections are kept, and "
        "load is not shared.",
        "short",
        Ask(
            f"sum by (instance) (litellm_sidecar_http_requests_in_flight{{{_PROCESS}}})",
            "{{instance}}",
        ),
        width=6,
    )


class _Annotation(dashboard.AnnotationQuery):
    """With the fields that Grafana's Prometheus source reads, and the SDK does not know."""

    def __init__(
        self,
        name: str,
        expr: str,
        color: str,
        *,
        title: str,
        text: str,
        tags: str,
        value_is_time: bool = False,
    ) -> None:
        super().__init__(
            name=name, datasource=SOURCE, enable=True, icon_color=color, expr=expr, hide=False
        )
        self._more: dict[str, object] = {
            "titleFormat": title,
            "textFormat": text,
            "tagKeys": tags,
            "useValueForTime": value_is_time,
            "step": "",
        }

    def to_json(self) -> dict[str, object]:
        """Write all of it."""
        # Zero would be right as well, and is not what Grafana writes.
        fields = {name: value for name, value in super().to_json().items() if name != "builtIn"}
        return fields | self._more


def _new_version(metric: str) -> str:
    """A version that was not there within the hour before: not the same one after a gap."""
    series = f"litellm_sidecar_{metric}{{{_PROCESS}}}"
    before = f"max_over_time({series}[1h] offset $__interval)"
    return f"group by (version) ({series} == 1) unless on (version) ({before} == 1)"


def _annotations() -> list[_Annotation]:
    return [
        _Annotation(
            "Sidecar started",
            # In milliseconds: Grafana takes the value for the time.
            f"1000 * process_start_time_seconds {_OURS} > $__from",
            "blue",
            title="Sidecar started",
            text="{{instance}}, version {{version}}",
            tags="job,instance",
            value_is_time=True,
        ),
        _Annotation(
            "Sidecar version",
            _new_version("build_info"),
            "purple",
            title="Sidecar {{version}}",
            text="The first sidecar of this version",
            tags="version",
        ),
        _Annotation(
            "LiteLLM version",
            _new_version("upstream_info"),
            "orange",
            title="LiteLLM {{version}}",
            text="The first answer of this version",
            tags="version",
        ),
        _Annotation(
            "Alerts",
            f'ALERTS{{alertstate="firing",alertname=~"{ALERT_NAMES}"}}',
            "red",
            title="{{alertname}}",
            text="{{model}} {{team_alias}} {{instance}}; what to do: docs/alerts.md",
            tags="severity",
        ),
    ]


def _choice(name: str, label: str, metric: str, text: str) -> build.QueryVariable:
    return (
        build.QueryVariable(name)
        .label(label)
        .description(text)
        .datasource(SOURCE)
        .query(
            {
                "qryType": 1,
                "query": f"label_values(litellm_sidecar_{metric}, {name})",
                "refId": "PrometheusVariableQueryEditor-VariableQuery",
            }
        )
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _dashboard() -> dashboard.Dashboard:
    page = Layout()
    (
        page.page.uid(UID)
        .description(
            "How the provider's prompt cache is used, what it saves and costs, and how the "
            "sidecars are that count it. Made by scripts/dashboard.py; docs/dashboard.md says "
            "where to look first."
        )
        .tags(["litellm", "prompt-cache"])
        .timezone("browser")
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("1m")
        .with_variable(build.DatasourceVariable("datasource").label("Source").type("prometheus"))
        .with_variable(
            _choice("namespace", "Namespace", "build_info", "Of the pods, if Prometheus keeps it")
        )
        .with_variable(_choice("model", "Model", "observations_total", "What clients ask for"))
        .with_variable(_choice("team_alias", "Team", "responses_total", "`None`: no team"))
        .with_variable(_choice("provider", "Provider", "responses_total", "As LiteLLM calls it"))
        .with_variable(_choice("instance", "Sidecar", "build_info", "As Prometheus calls it"))
    )
    for add in (_at_a_glance, _cache, _money, _latency, _health):
        add(page)
    built = page.page.build()
    built.annotations = dashboard.AnnotationContainer(list_val=list(_annotations()))
    return built


def rendered() -> str:
    """The dashboard as Grafana imports it."""
    return json.dumps(_dashboard(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dashboard, or compare it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the Grafana dashboard.")
    parser.add_argument("--check", action="store_true", help="compare only; 1 where it differs")
    check = parser.parse_args(arguments).check
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    after = rendered()
    if before == after:
        return 0
    if not check:
        PAGE.write_text(after, encoding="utf-8")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(
            before.splitlines(keepends=True),
            after.splitlines(keepends=True),
            PAGE.name,
            f"{PAGE.name} as generated",
        )
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
