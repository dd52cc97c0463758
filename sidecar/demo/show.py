"""What the demo prints. It works on a terminal and in a pipe: there without colours, at least
100 columns wide, and in ASCII where the encoding has no more."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.demo.comparison import (
    BY_MODEL,
    BY_ROUTE,
    BY_TEAM,
    Played,
    Sums,
    Tally,
)
from sidecar.demo.traffic import SEARCH

__all__ = [
    "make_console",
    "show_litellm_series",
    "show_page",
    "show_played",
    "show_tables",
    "show_verdict",
    "show_where_to_look",
]

_MIN_WIDTH = 100
_BAD = "bold white on red"


def make_console() -> Console:
    """Make a console for standard output."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    return console


def show_played(console: Console, played: Sequence[Played]) -> None:
    """Say what the clients did and saw."""
    endings = Counter(one.ending for one in played)
    seen = ", ".join(f"{number} {ending}" for ending, number in endings.items())
    console.print(f"{len(played)} calls were made; the clients saw {seen}.")


def show_tables(console: Console, count: Tally, true: Tally) -> None:
    """Print both sides, one above the other, and whether they agree."""
    console.print("Each first line is what /metrics says, the line below it what is true.")
    models = sorted({row[0] for row in count.by_team.keys() | true.by_team.keys()})
    for model in models:
        console.print(f"\n{model}", style="bold")
        table = _table("team", BY_TEAM)
        _add_rows(console, table, BY_TEAM, _of_model(count, model), _of_model(true, model))
        console.print(table)
    for first, columns, left, right in (
        ("how answers ended", BY_MODEL, count.by_model, true.by_model),
        ("requests", BY_ROUTE, count.by_route, true.by_route),
    ):
        console.print()
        table = _table(first, columns)
        _add_rows(console, table, columns, left, right)
        console.print(table)


def _of_model(tally: Tally, model: str) -> Sums:
    return {row[1:]: sums for row, sums in tally.by_team.items() if row[0] == model}


def _table(first: str, columns: Sequence[str]) -> Table:
    # Fits a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column(f"  {first}", min_width=14, overflow="fold")
    for column in columns:
        table.add_column(column.replace("_", "\n"), justify="right", min_width=6, overflow="fold")
    return table


def _add_rows(
    console: Console, table: Table, columns: Sequence[str], left: Sums, right: Sums
) -> None:
    for row in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(row, Counter()), right.get(row, Counter())
        if not any(ours.values()) and not any(theirs.values()):
            continue
        wrong = {name for name in ours.keys() | theirs.keys() if ours[name] != theirs[name]}
        table.add_row(
            Text.assemble(_mark(console, ok=not wrong), " ", ", ".join(row)),
            *[Text(f"{ours[name]:,}", style=_BAD if name in wrong else "") for name in columns],
        )
        table.add_row("  is true", *[f"{theirs[name]:,}" for name in columns], style="dim")


def _mark(console: Console, *, ok: bool) -> Text:
    good, bad = ("+", "!") if console.options.ascii_only else ("✓", "✗")
    return Text(good, style="bold green") if ok else Text(bad, style=_BAD)


def show_verdict(console: Console, faults: Sequence[str]) -> None:
    """Say that all is true, or what is not."""
    if not faults:
        console.print("\nEvery count equals the truth.", style="bold green")
        return
    console.print("\nTHE COUNTS DIFFER FROM THE TRUTH:", style=_BAD)
    for fault in faults:
        console.print(f"  {fault}", soft_wrap=True)


def show_litellm_series(console: Console, exposition: str) -> None:
    """Print the series that carry LiteLLM's own names, as they are served."""
    console.print("\nThe series under LiteLLM's own names, as /metrics serves them:", style="bold")
    for line in exposition.splitlines():
        if line.startswith("litellm_") and not line.startswith("litellm_sidecar_"):
            console.print(line, soft_wrap=True)


def show_page(console: Console, admin_port: int) -> None:
    """Say where everything can be watched from now on."""
    console.print("The live page, while this runs:", style="bold")
    console.print(f"  http://127.0.0.1:{admin_port}/\n", soft_wrap=True)


def show_where_to_look(console: Console, port: int, admin_port: int, usage_log: Path) -> None:
    """Say where the running sidecar can be looked at, and how to ask it something."""
    admin = f"http://127.0.0.1:{admin_port}"
    console.print("\nWhere to look while this runs:", style="bold")
    for what, path in (("page", "/"), ("metrics", "/metrics"), ("readiness", "/readyz")):
        console.print(f"  {what:<10} {admin}{path}", soft_wrap=True)
    console.print(f"  {'usage log':<10} {usage_log}", soft_wrap=True)
    console.print("Sum its usage log up, one line an exchange:", style="bold")
    python = shlex.quote(sys.executable)
    console.print(f"{python} -m sidecar report {shlex.quote(str(usage_log))}", soft_wrap=True)
    console.print(
        "Ask something: the first time the prompt is written to the cache, then it is read.",
        style="bold",
    )
    # The provider does not keep a prompt of less than 1,024 tokens; the shell makes a long one.
    call = f"""\
curl -s http://127.0.0.1:{port}/v1/messages -H 'x-api-key: {SEARCH.secret}' \\
  -H 'anthropic-version: 2023-06-01' -H 'content-type: application/json' -d '
  {{"model": "claude-sonnet-4-5", "max_tokens": 64, "system": [{{"type": "text",
  "text": "'"$(printf 'All of it matters. %.0s' $(seq 300))"'",
  "cache_control": {{"type": "ephemeral"}}}}],
  "messages": [{{"role": "user", "content": "What is new?"}}]}}'; echo
curl -s {admin}/metrics | grep ^litellm_cache"""
    console.print(call, soft_wrap=True)
