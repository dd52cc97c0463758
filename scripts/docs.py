"""Writes the generated tables of the pages: metrics, settings, fields of the usage log, faults.

It knows the pages' markers and how a table looks; what stands in the tables comes from
`Metrics`, `Settings`, `UsageLine` and the cases of `tests/faults` alone. With `--check` it writes
nothing, and ends with 1 and a diff where a page differs from what it would write.

    python scripts/docs.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from sidecar.account.metrics import Metrics  # noqa: E402
from sidecar.account.usage_log import UsageLine  # noqa: E402
from sidecar.config import PREFIX, Settings, allowed  # noqa: E402
from tests.faults import page as faults  # noqa: E402

__all__ = [
    "FAULTS",
    "README",
    "USAGE_LOG",
    "faults_table",
    "fields_table",
    "main",
    "metric_names",
    "metrics_table",
    "rewritten",
    "settings_table",
]

README = ROOT / "README.md"
USAGE_LOG = ROOT / "docs" / "usage-log.md"
FAULTS = ROOT / "docs" / "faults.md"
RESULTS = README.parent / "bench" / "RESULTS.md"


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


def overhead_table() -> str:
    """Write what the last measurement says of each target, from the report that it wrote."""
    _, _, report = RESULTS.read_text(encoding="utf-8").partition("## What must hold\n\n")
    lines = report.partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return _table(rows[0][:3], [row[:3] for row in rows[2:] if row[2] != "not measured"])


def fields_table() -> str:
    """List every field of a line of the usage log, with its type and what stands in it."""
    (definition,) = ast.parse(inspect.getsource(UsageLine)).body
    assert isinstance(definition, ast.ClassDef)
    rows = [("`event`", "string", "Always `usage`.")]
    # A field, and the string below it.
    for field, text in zip(definition.body[1::2], definition.body[2::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(text, ast.Expr)
        words = str(ast.literal_eval(text.value))
        rows.append((f"`{ast.unparse(field.target)}`", _json_type(field), " ".join(words.split())))
    return _table(("field", "type", "what it says"), rows)


def _json_type(field: ast.AnnAssign) -> str:
    names = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
    names |= {"None": "null", "UnsetType": "absent"}
    return " or ".join(names[name] for name in ast.unparse(field.annotation).split(" | "))


def faults_table() -> str:
    """List what goes wrong, what the client gets, and what is counted."""
    table = _table(("what happens", "what the client gets", "what the counters say"), faults.ROWS)
    return f"{table}\n{faults.MEMORY}\n"


_README_TABLES: dict[str, Callable[[], str]] = {
    "metrics": metrics_table,
    "settings": settings_table,
    "overhead": overhead_table,
}
_USAGE_LOG_TABLES: dict[str, Callable[[], str]] = {"fields": fields_table}
_FAULTS_TABLES: dict[str, Callable[[], str]] = {"faults": faults_table}


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
    pages = [
        _update(README, _README_TABLES, check),
        _update(USAGE_LOG, _USAGE_LOG_TABLES, check),
        _update(FAULTS, _FAULTS_TABLES, check),
    ]
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


def _families() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and help text of each family, as an exposition shows them."""
    labels = Settings.model_fields["labels"].default
    store = Metrics(labels, compat=("v1.83",), costs=True, misses=True, clock=lambda: 0.0).store
    return [
        (
            f"{family.name}_total" if family.kind == "counter" else family.name,
            family.kind,
            family.labels,
            family.documentation,
        )
        for family in store.families
    ]


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
