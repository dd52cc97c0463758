"""Writes the generated tables of the pages: metrics, settings, series, fields of the usage log and
of `/api`, faults, and what was measured.

It knows the pages' markers and how a table looks; what stands in the tables comes from
`Metrics`, `Settings`, `Ledger`, `UsageLine`, `DOCUMENTS`, the cases of `tests/faults` and
`bench/RESULTS.md` alone. With `--check` it writes nothing, and ends with 1 and a diff where a page
differs from what it would write.

    python scripts/docs.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from sidecar.account.ledger import Ledger  # noqa: E402
from sidecar.account.live import DOCUMENTS  # noqa: E402
from sidecar.account.metrics import Metrics  # noqa: E402
from sidecar.account.store import Store  # noqa: E402
from sidecar.account.usage_log import UsageLine  # noqa: E402
from sidecar.config import PREFIX, Settings, allowed  # noqa: E402
from sidecar.exchange import (  # noqa: E402
    End,
    Exchange,
    Observation,
    Outcome,
    RequestFacts,
    Route,
    Status,
    Usage,
)
from tests.faults import page as faults  # noqa: E402

__all__ = [
    "API",
    "FAULTS",
    "PAGES",
    "README",
    "USAGE_LOG",
    "documents_tables",
    "faults_table",
    "fields_table",
    "main",
    "metric_names",
    "metrics_table",
    "rewritten",
    "series_table",
    "settings_table",
]

README = ROOT / "README.md"
METRICS = ROOT / "docs" / "metrics.md"
SETTINGS = ROOT / "docs" / "settings.md"
OPERATING = ROOT / "docs" / "operating.md"
OVERHEAD = ROOT / "docs" / "overhead.md"
USAGE_LOG = ROOT / "docs" / "usage-log.md"
FAULTS = ROOT / "docs" / "faults.md"
API = ROOT / "docs" / "api.md"
RESULTS = README.parent / "bench" / "RESULTS.md"


_OF_METRICS = (
    "litellm_sidecar_input_tokens_total",
    "litellm_sidecar_output_tokens_total",
    "litellm_sidecar_responses_total",
    "litellm_sidecar_cost_usd_total",
    "litellm_sidecar_cache_read_savings_usd_total",
    "litellm_sidecar_cache_write_premium_usd_total",
    "litellm_sidecar_cache_misses_total",
    "litellm_sidecar_observations_total",
    "litellm_sidecar_http_requests_total",
    "litellm_sidecar_overhead_seconds",
    "litellm_sidecar_upstream_failures_total",
    "litellm_sidecar_refusals_total",
)
"""What the front page says of the metrics."""
_OF_SETTINGS = (
    "SIDECAR_UPSTREAM",
    "SIDECAR_HOST",
    "SIDECAR_PORT",
    "SIDECAR_ADMIN_HOST",
    "SIDECAR_ADMIN_PORT",
    "SIDECAR_ADMIN_TOKEN",
    "SIDECAR_LABELS",
    "SIDECAR_COMPAT",
    "SIDECAR_TEAM_FILE",
    "SIDECAR_LITELLM_KEY",
    "SIDECAR_PRICE_FILE",
    "SIDECAR_TRUSTED_PROXIES",
    "SIDECAR_MAX_CONCURRENT_REQUESTS",
    "SIDECAR_USAGE_LOG",
)
"""And of the settings."""
_OF_OVERHEAD = (
    "JSON, 32 connections, CPU per request",
    "JSON, CPU per request, against LiteLLM itself",
    "SSE paced, 500 streams, CPU per event",
    "Peak memory, 500 paced streams",
    "Added latency at 200 requests/s, p50",
    "Added latency at 200 requests/s, p99",
)
"""And of what was measured."""


def metrics_table() -> str:
    """List every family that the default settings export."""
    rows = [
        (
            f"`{name}`",
            kind,
            ", ".join(f"`{label}`" for label in labels) or "none",
            documentation,
        )
        for name, kind, labels, documentation in _families()
    ]
    return _table(("name", "type", "labels", "what it counts"), rows)


def chief_metrics_table() -> str:
    """List the families that matter most: name, labels, and the first thing that is said."""
    found = {name: (labels, text) for name, _, labels, text in _families()}
    rows = [
        (f"`{name}`", ", ".join(f"`{label}`" for label in found[name][0]), _first(found[name][1]))
        for name in _OF_METRICS
    ]
    return _table(("name", "labels", "what it counts"), rows)


def edges_table() -> str:
    """List the edges of the histograms, without which no query of theirs can be written."""
    rows = [
        (f"`{family.name}`", ", ".join(f"{edge:g}" for edge in family.edges))
        for family in _store().families
        if family.edges
    ]
    return _table(("histogram", "edges, in seconds"), rows)


def metric_names() -> frozenset[str]:
    """Name every family and series that the default settings export."""
    names: set[str] = set()
    for name, kind, _, _ in _families():
        suffixes = ("", "_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names.update(name + suffix for suffix in suffixes)
    return frozenset(names)


def settings_table() -> str:
    """List every setting with its default, what it may be, and what it is for."""
    rows = [
        (
            f"`{PREFIX}{name.upper()}`",
            _default(field),
            allowed(field),
            field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]
    return _table(("variable", "default", "allowed", "what it is for"), rows)


def chief_settings_table() -> str:
    """List the settings that matter most."""
    found = {PREFIX + name.upper(): field for name, field in Settings.model_fields.items()}
    rows = [
        (f"`{name}`", _default(found[name]), _first(found[name].description or ""))
        for name in _OF_SETTINGS
    ]
    return _table(("variable", "default", "what it is for"), rows)


def series_table() -> str:
    """Say how many series a label set, a model, a route and the process make."""
    rows = []
    for said, compat, costs, misses in (
        ("the default", ("v1.83",), True, True),
        ("`SIDECAR_COMPAT=v1.83,v1.100`", ("v1.83", "v1.100"), True, True),
        ("`SIDECAR_MISS_REASONS=false`", ("v1.83",), True, False),
        ("that, `SIDECAR_PRICE_SOURCES=`, `SIDECAR_COMPAT=off`", (), False, False),
    ):
        rows.append((said, *map(str, _series(compat=compat, costs=costs, misses=misses))))
    return _table(("settings", "label set", "route and model", "route", "process"), rows)


def budget_table() -> str:
    """Reckon what some sizes of a company come to, with the default settings."""
    per_set, per_pair, per_route, rest = _series(compat=("v1.83",), costs=True, misses=True)
    rows = []
    for models, teams, routes in ((3, 5, 1), (10, 20, 2), (20, 60, 3)):
        parts = (models * teams * per_set, models * routes * per_pair, routes * per_route, rest)
        reckoned = " + ".join(f"{part:,}" for part in parts)
        rows.append((str(models), str(teams), str(routes), f"{reckoned} = {sum(parts):,}"))
    return _table(("models", "teams", "routes", "series"), rows)


def _series(*, compat: Sequence[str], costs: bool, misses: bool) -> tuple[int, int, int, int]:
    """Count what a first exchange makes, and others that differ from it in one thing each."""
    labels = Settings.model_fields["labels"].default
    metrics = Metrics(labels, compat=compat, costs=costs, misses=misses, clock=lambda: 0.0)
    ledger = Ledger(metrics, lambda observation, facts: Outcome.HIT)

    def made_by(team: bytes, model: str, route: Route) -> int:
        before = _count(metrics)
        ledger.begin(route)
        ledger.submit(_exchange(team, model, route))
        return _count(metrics) - before

    at_start = _count(metrics)
    first = made_by(b"a", "m", Route.MESSAGES)
    per_set = made_by(b"b", "m", Route.MESSAGES)
    per_pair = made_by(b"b", "n", Route.MESSAGES) - per_set
    per_route = made_by(b"b", "n", Route.CHAT_COMPLETIONS) - per_pair
    # The route of messages is there from the start, but for the code of its first answer.
    return per_set, per_pair, per_route, at_start + first - per_set - per_pair - per_route


def _count(metrics: Metrics) -> int:
    """Count the series that a scrape in text would show."""
    return sum(
        len(metric.samples) - sum(sample.name.endswith("_created") for sample in metric.samples)
        for metric in metrics.store.collect()
    )


def _exchange(team: bytes, model: str, route: Route) -> Exchange:
    return Exchange(
        route=route,
        method="POST",
        status_code=200,
        observed=True,
        end=End.COMPLETE,
        facts=RequestFacts(model, None, True, None),
        observation=Observation(Status.COMPLETE, Usage(1, 1, 1, 1), message_id="msg_01"),
        request_headers=[],
        response_headers=[(b"x-litellm-team-alias", team)],
        duration_s=1.0,
        first_byte_s=1.0,
        first_token_s=1.0,
        overhead_s=0.0,
    )


def overhead_table(only: Sequence[str] = ()) -> str:
    """Write what the last measurement says of each target, from the report that it wrote."""
    _, _, report = RESULTS.read_text(encoding="utf-8").partition("## What must hold\n\n")
    lines = report.partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kept = [row[:3] for row in rows[2:] if row[2] != "not measured"]
    return _table(rows[0][:3], [row for row in kept if not only or row[0] in only])


def fields_table() -> str:
    """List every field of a line of the usage log, with its type and what stands in it."""
    rows = [("`event`", "string", "Always `usage`."), *_fields(UsageLine)]
    return _table(("field", "type", "what it says"), rows)


def documents_tables() -> str:
    """List every field of the documents below `/api/v1/`, and of the objects in them."""
    parts = []
    seen: list[type[msgspec.Struct]] = []
    for name, document in DOCUMENTS.items():
        parts.append(f"### `/api/v1/{name}`\n\n{_object(document)}")
        seen += [kind for kind in dict.fromkeys(_objects_in(document)) if kind not in seen]
    parts += [f"### {kind.__name__}\n\n{_object(kind)}" for kind in seen]
    return "\n" + "\n".join(parts) + "\n"


def _object(kind: type[msgspec.Struct]) -> str:
    return _table(("field", "type", "what it says"), _fields(kind))


def _objects_in(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """Name the objects that a document is made of, in the order in which they are met."""
    module = sys.modules[kind.__module__]
    found: list[type[msgspec.Struct]] = []
    for field in msgspec.structs.fields(kind):
        for name in re.findall(r"\b[A-Z]\w+", str(kind.__annotations__[field.name])):
            if name == "None":
                continue
            part = getattr(module, name)
            found += [part, *_objects_in(part)]
    return found


def _fields(kind: type) -> list[tuple[str, str, str]]:
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    if isinstance(body[0], ast.Expr):
        body = body[1:]  # the class's own words
    rows = []
    # A field, and the string below it.
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(text, ast.Expr)
        words = str(ast.literal_eval(text.value))
        rows.append((f"`{ast.unparse(field.target)}`", _json_type(field), " ".join(words.split())))
    return rows


def _json_type(field: ast.AnnAssign) -> str:
    return " or ".join(_json_name(name) for name in ast.unparse(field.annotation).split(" | "))


def _json_name(name: str) -> str:
    names = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
    names |= {"None": "null", "UnsetType": "absent", "list[float": "array of number"}
    names |= {"None]": "null", "list[float]": "array of number", "list[int]": "array of integer"}
    names |= {"dict[str, int]": "object of integer", "dict[str, list[int]]": "object of arrays"}
    if name in names:
        return names[name]
    if name.startswith("list["):
        return f"array of {_linked(name[5:-1])}"
    return _linked(name)


def _linked(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def faults_table() -> str:
    """List what goes wrong, what the client gets, and what is counted."""
    table = _table(("what happens", "what the client gets", "what the counters say"), faults.ROWS)
    return f"{table}\n{faults.MEMORY}\n"


_README_TABLES: dict[str, Callable[[], str]] = {
    "metrics": chief_metrics_table,
    "settings": chief_settings_table,
    "overhead": lambda: overhead_table(_OF_OVERHEAD),
}
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: _README_TABLES,
    METRICS: {"metrics": metrics_table, "edges": edges_table},
    SETTINGS: {"settings": settings_table},
    OPERATING: {"series": series_table, "budget": budget_table},
    OVERHEAD: {"overhead": overhead_table},
    USAGE_LOG: {"fields": fields_table},
    FAULTS: {"faults": faults_table},
    API: {"documents": documents_tables},
}
"""The pages, and the tables that each of them has by name."""


def rewritten(text: str, tables: Mapping[str, Callable[[], str]] = _README_TABLES) -> str:
    """Put the tables of today between their markers.

    Raises:
        ValueError: a marker is absent, or is there twice.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs {begin.strip()} and {end} exactly once")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}{table()}{end}{tail}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated tables of the pages.")
    parser.add_argument("--check", action="store_true", help="compare only; 1 where they differ")
    check = parser.parse_args(arguments).check
    pages = [_update(page, tables, check) for page, tables in PAGES.items()]
    return 0 if all(pages) else 1


def _update(page: Path, tables: Mapping[str, Callable[[], str]], check: bool) -> bool:
    """Write a page, or compare it and show what differs; returns whether it is as it should be."""
    before = page.read_text(encoding="utf-8")
    after = rewritten(before, tables)
    if before == after:
        return True
    if not check:
        page.write_text(after, encoding="utf-8")
        return True
    name = page.name
    diff = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        name,
        f"{name} as generated",
    )
    sys.stdout.writelines(diff)
    return False


def _store() -> Store:
    """Make the families that the default settings export."""
    labels = Settings.model_fields["labels"].default
    return Metrics(labels, compat=("v1.83",), costs=True, misses=True, clock=lambda: 0.0).store


def _families() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and help text of each family, as an exposition shows them."""
    return [
        (
            f"{family.name}_total" if family.kind == "counter" else family.name,
            family.kind,
            family.labels,
            family.documentation,
        )
        for family in _store().families
    ]


def _first(text: str) -> str:
    """Cut a text to the first thing that it says."""
    head = re.split(r"[:;.](?: |$)", text, maxsplit=1)[0]
    return head.removesuffix(".")


def _default(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    shown = str(extra["shown"]) if isinstance(extra, dict) else ""
    if not shown:
        value = field.default
        if isinstance(value, tuple):
            shown = ",".join(map(str, value))
        elif isinstance(value, float):
            shown = f"{value:g}"
        elif value is not None:
            shown = str(value)
    return f"`{shown}`" if shown else "not set"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(cells: Sequence[str]) -> str:
    # A pipe within a cell would end it.
    inner = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| {inner} |\n"


if __name__ == "__main__":
    sys.exit(main())
