"""From figures to the report: what must hold first, then every figure with its ratio.

A ratio is taken within a round, where both runs were minutes apart at most, and the median of
the rounds is shown; so are the figures themselves.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bench import proxies
from bench.measures import MEASURES, Figures, Latency, Paced

__all__ = ["Results", "render"]

_BASE = "envoy-lua"
"""What ratios are of, where it was measured."""
_QUIET = 0.95
"""Share of its core that a busy proxy gets where nothing else wants it."""


@dataclass
class Results:
    """The figures of all runs."""

    measures: Sequence[str]
    peers: Sequence[str]
    absent: dict[str, list[str]]
    """Peers that could not run, and for want of what."""
    rounds: int
    tap: dict[str, float] = field(default_factory=dict)
    """What `microbench` measured of the tap; empty if it did not run."""
    runs: dict[tuple[str, str, int], Figures] = field(default_factory=dict)
    """By measure, peer and round."""
    failures: list[str] = field(default_factory=list)

    def value(self, measure: str, peer: str, figure: str) -> float | None:
        """Median of the rounds."""
        return _median(
            self.runs.get((measure, peer, number), {}).get(figure)
            for number in range(1, self.rounds + 1)
        )

    def ratio(
        self, over: tuple[str, str], under: tuple[str, str], figure: str = "us"
    ) -> float | None:
        """Median of the ratios within each round; `over` and `under` are measure and peer."""
        ratios = []
        for number in range(1, self.rounds + 1):
            above = self.runs.get((*over, number), {}).get(figure)
            below = self.runs.get((*under, number), {}).get(figure)
            ratios.append(above / below if above and below else None)
        return _median(ratios)


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


# What must hold


@dataclass(frozen=True, slots=True)
class _Target:
    title: str
    measured: Callable[[Results], float | None]
    limit: float
    stretch: Callable[[Results], float | None]
    """What is compared with `stretch_limit`; often another ratio than `measured`."""
    stretch_limit: float | None
    unit: str
    of: str = ""
    stretch_of: str = ""
    at_least: bool = False


def _cpu(measure: str, *, to: str, other: str = "") -> Callable[[Results], float | None]:
    return lambda results: results.ratio((measure, "sidecar"), (other or measure, to))


def _peak(to: str) -> Callable[[Results], float | None]:
    return lambda results: results.ratio(("paced500", "sidecar"), ("paced500", to), "peak_mb")


def _figure(name: str) -> Callable[[Results], float | None]:
    return lambda results: results.value("latency", "sidecar", name)


def _tap(name: str) -> Callable[[Results], float | None]:
    return lambda results: results.tap.get(name)


def _nothing(_: Results) -> float | None:
    return None


def _same(
    title: str,
    measured: Callable[[Results], float | None],
    limit: float,
    stretch_limit: float,
    unit: str = "×",
    of: str = "",
) -> _Target:
    """A target whose stretch is of the same figure."""
    return _Target(title, measured, limit, measured, stretch_limit, unit, of, of)


_TARGETS = (
    _Target(
        "JSON, 32 connections, CPU per request",
        _cpu("json32", to="envoy-lua"),
        1.0,
        _cpu("json32", to="envoy"),
        1.3,
        "×",
        "Envoy + Lua",
        "Envoy",
    ),
    _same(
        "JSON, 1,000 connections, CPU per request",
        _cpu("json1000", to="sidecar", other="json32"),
        1.3,
        1.1,
        of="its own at 32",
    ),
    _Target(
        "SSE burst of 300 events, CPU per request",
        _cpu("burst", to="envoy-lua"),
        0.5,
        _cpu("burst", to="envoy"),
        1.3,
        "×",
        "Envoy + Lua",
        "Envoy",
    ),
    _Target(
        "SSE paced, 500 streams, CPU per event",
        _cpu("paced500", to="envoy-lua"),
        1.0,
        _cpu("paced500", to="envoy"),
        0.9,
        "×",
        "Envoy + Lua",
        "Envoy",
    ),
    _same("Peak memory, 500 paced streams", _peak("envoy-lua"), 0.7, 0.6, of="Envoy + Lua"),
    _same(
        "Observation on against off, JSON, 32 connections, CPU",
        _cpu("json32", to="sidecar-off"),
        1.25,
        1.15,
        of="off",
    ),
    _same(
        "Observation on against off, 500 paced streams, CPU",
        _cpu("paced500", to="sidecar-off"),
        1.1,
        1.05,
        of="off",
    ),
    _same(
        "JSON, CPU per request, against LiteLLM itself",
        _cpu("json32", to="litellm"),
        1 / 60,
        1 / 80,
        of="LiteLLM",
    ),
    _same("Added latency at 200 requests/s, p50", _figure("added_p50_ms"), 0.5, 0.3, " ms"),
    _same("Added latency at 200 requests/s, p99", _figure("added_p99_ms"), 2.0, 1.0, " ms"),
    _Target(
        "Tap, delta-heavy SSE in chunks of 64 KiB",
        _tap("sse_gb_s"),
        1.0,
        _nothing,
        None,
        " GB/s",
        at_least=True,
    ),
    _same("Tap, one chunk of one event", _tap("event_us"), 1.0, 0.5, " µs"),
)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    if unit == "×" and value < 0.1:
        return f"1/{1 / value:.0f}"
    return f"{value:.2f}{unit}"


def _verdict(value: float | None, limit: float | None, *, at_least: bool) -> str:
    if value is None or limit is None:
        return "–"
    return "**met**" if (value >= limit if at_least else value <= limit) else "missed"


def _targets(results: Results) -> list[list[str]]:
    rows = [["measure", "target", "measured", "", "stretch", "measured", ""]]
    for target in _TARGETS:
        sign = "≥" if target.at_least else "≤"
        measured, stretch = target.measured(results), target.stretch(results)
        row = [target.title]
        for limit, of, value in (
            (target.limit, target.of, measured),
            (target.stretch_limit, target.stretch_of, stretch),
        ):
            if limit is None:
                row += ["", "", ""]
                continue
            row += [
                f"{sign} {_shown(limit, target.unit)} {of}".strip(),
                _shown(value, target.unit),
                _verdict(value, limit, at_least=target.at_least),
            ]
        rows.append(row)
    return rows


# Every figure


def _cell(results: Results, measure: str, peer: str) -> str:
    spec = MEASURES[measure]
    if isinstance(spec, Latency):
        p50, p99 = (results.value(measure, peer, f"added_{q}_ms") for q in ("p50", "p99"))
        return f"{p50:.2f} / {p99:.2f} ms" if p50 is not None and p99 is not None else ""
    us = results.value(measure, peer, "us")
    if us is None:
        return ""
    if peer == "direct":
        rate = results.value(measure, peer, "rps")
        return f"{rate:,.0f}/s" if rate else ""
    ratio = results.ratio((measure, peer), (measure, _BASE))
    parts = [f"{us:,.0f} µs" if us >= 100 else f"{us:.1f} µs"]
    if isinstance(spec, Paced):
        memory = results.value(measure, peer, "peak_mb")
        pace = results.value(measure, peer, "pace") or 0.0
        parts.append(f"{memory:.0f} MB")
        if pace < 0.99:
            parts.append(f"kept {100 * pace:.0f}% of the pace")
    else:
        parts.append(f"{results.value(measure, peer, 'rps'):,.0f}/s")
    return (f"**{ratio:.2f}×** " if ratio is not None else "") + f"({', '.join(parts)})"


def _figures(results: Results) -> list[list[str]]:
    rows = [["", *(MEASURES[measure].title for measure in results.measures)]]
    for peer in results.peers:
        title = "no proxy" if peer == "direct" else proxies.PEERS[peer].title
        rows.append([title, *(_cell(results, measure, peer) for measure in results.measures)])
    return rows


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _machine() -> str:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    name = model[1] if model else platform.machine()
    size = f", {int(memory[1]) / 1e6:.0f} GB" if memory else ""
    return f"{os.cpu_count()} cores ({name}){size}, Linux {platform.release()}"


def _versions(results: Results) -> str:
    names = {
        "nginx": "nginx",
        "envoy": "Envoy",
        "sidecar": "sidecar",
        "mitmproxy": "mitmproxy",
        "portkey": "Portkey gateway",
        "litellm": "LiteLLM",
    }
    found = [
        f"{title} {proxies.version_of(proxies.PEERS[name])}"
        for name, title in names.items()
        if name in results.peers
    ]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def render(results: Results) -> str:
    """Write the report, in Markdown."""
    parts = [
        "# Side by side",
        "Written by `make bench`; how it is measured and how to read it is in "
        "[README.md](README.md).",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {_machine()}; {_versions(results)}. "
        f"Medians of {results.rounds} interleaved rounds, one process and one core for each proxy.",
        "## What must hold",
        _table(_targets(results)),
        "## Every figure",
        f"In bold: CPU as a multiple of {proxies.PEERS[_BASE].title}. In brackets: CPU of the "
        "proxy per request, or per event where events are paced, and requests per second or "
        "peak memory.",
        _table(_figures(results)),
    ]
    share = results.value("json32", "sidecar", "busy")
    if share is not None and share < _QUIET:
        parts.append(
            f"The machine had other work: with 32 connections the sidecar got {share:.0%} of its "
            "core. CPU figures are then too high by up to a quarter, ratios less."
        )
    for name, lacking in results.absent.items():
        parts.append(f"{proxies.PEERS[name].title} was left out for want of {', '.join(lacking)}.")
    if results.failures:
        parts.append("Runs that failed and count for nothing:")
        parts.append("\n".join(f"- {text}" for text in results.failures))
    return "\n\n".join(parts) + "\n"
