"""The dashboard as Grafana asks it: its panels, its queries, and what Grafana puts for variables.

Knows Grafana's JSON and the spelling of a choice in a query; judges nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.dashboard import PAGE

__all__ = ["Query", "interpolated", "load", "panels", "queries", "variable_queries", "variables"]

Json = dict[str, Any]

# Those that are not the dashboard's own.
BUILT_IN = {"__rate_interval", "__range", "__interval", "__interval_ms", "__from"}
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Query:
    """One query, and where it stands."""

    where: str
    expr: str
    instant: bool
    legend: str = ""


def load() -> Json:
    """Read the dashboard."""
    board: Json = json.loads(PAGE.read_text())
    return board


def panels(board: Json) -> Iterator[Json]:
    """All panels but rows, also those within a row that is folded."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def queries(board: Json) -> list[Query]:
    """What panels and annotations ask."""
    found = [
        Query(panel["title"], target["expr"], target["instant"], target.get("legendFormat", ""))
        for panel in panels(board)
        for target in panel["targets"]
    ]
    return found + [
        Query(note["name"], note["expr"], instant=False) for note in board["annotations"]["list"]
    ]


def variables(board: Json) -> dict[str, Json]:
    """The dashboard's own variables, by name."""
    return {variable["name"]: variable for variable in board["templating"]["list"]}


def variable_queries(board: Json) -> dict[str, tuple[str, str]]:
    """Metric and label from which each choice is made."""
    found = {}
    for name, variable in variables(board).items():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert match is not None, variable["query"]
            found[name] = match[1], match[2]
    return found


def used(text: str) -> set[str]:
    """The variables that a text names."""
    return {plain or braced for plain, braced in _VARIABLE.findall(text)}


def interpolated(expr: str, values: Mapping[str, str | Sequence[str]]) -> str:
    """Put values for variables as Grafana's Prometheus source does.

    Args:
        values: by name; a list is a choice of several, whose values are escaped and joined.

    Raises:
        KeyError: there is no such variable.
    """

    def put(match: re.Match[str]) -> str:
        value = values[match[1] or match[2]]
        if isinstance(value, str):
            return value
        # Escaped for the regular expression, and that for the string around it.
        escaped = [re.sub(r"""[\\$^*{}\[\]'+?.()|"]""", r"\\\\\g<0>", text) for text in value]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return _VARIABLE.sub(put, expr)
