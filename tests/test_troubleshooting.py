"""Whatever the sidecar can say to an operator has its entry: the sets are taken from the code."""

from __future__ import annotations

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.exchange import RefusalReason, Status, UpstreamFault
from sidecar.proxy.refusal import REFUSALS, refusal_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
AFTER_THE_HEAD = (UpstreamFault.BODY_CUT, UpstreamFault.IDLE_TIMEOUT)


def section(title: str, page: str = PAGE) -> str:
    """Take what stands under a heading, up to the next heading of any level."""
    found = re.search(rf"(?ms)^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", page)
    assert found is not None, title
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """Read the rows of tables whose first cell is names in backticks, by each of the names."""
    found = {}
    for line in re.findall(r"(?m)^\| `.*$", text):
        first, *cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        for name in re.findall(r"`([^`]+)`", first):
            assert name not in found, f"{name} stands there twice"
            found[name] = cells
    return found


def calls(*places: str) -> Iterator[ast.Call]:
    """Find every call in the code, the demo's left out."""
    for place in places or ("**/*.py",):
        for path in (ROOT / "sidecar").glob(place):
            if "demo" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield node


def logged() -> set[tuple[str, str]]:
    """Name every event that is logged, with its level."""
    events = set()
    for call in calls():
        match call.func:
            case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=level):
                if name.endswith("logger") and level in LEVELS:
                    (event, *_) = call.args
                    assert isinstance(event, ast.Constant), "names of events are constant"
                    events.add((str(event.value), level))
    return events


def numbers(function: str, at: int, *places: str) -> set[int]:
    """Collect the numbers that a function of this name is called with, at this place."""
    found = set()
    for call in calls(*places):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = call.func.id if isinstance(call.func, ast.Name) else name
        if name == function and len(call.args) > at:
            value = call.args[at]
            if isinstance(value, ast.Constant) and isinstance(value.value, int):
                found.add(value.value)
    return found


def test_every_event_of_the_log_has_its_row() -> None:
    """With the level that it is logged at; and no row is of an event that is none."""
    events = logged()
    said = {(name, cells[0]) for name, cells in rows(section("Log events")).items()}

    assert len(events) > 20  # they were found
    assert said == events


@pytest.mark.parametrize("fault", UpstreamFault)
def test_every_fault_of_litellm_has_its_row(fault: UpstreamFault) -> None:
    """With the code that the client gets; those after the head have none."""
    answered = rows(section("When LiteLLM gives no answer"))
    row = answered[fault]

    assert (fault in AFTER_THE_HEAD) != (row[0] == str(refusal_of(fault).status_code))
    assert all(row[-2:]), "what happened, and what to do"


def test_reasons_that_are_no_enum_have_their_rows() -> None:
    """There is one, of a fault of the sidecar itself, which `internal_errors_total` counts; what
    else clients are told comes from a closed set, and is counted by it."""
    answered = rows(section("When LiteLLM gives no answer"))
    answered |= rows(section("Requests that are refused"))
    written = {
        (str(reason.value), str(code.value))
        for call in calls("proxy/*.py")
        if isinstance(call.func, ast.Name) and call.func.id == "Refusal"
        for code, reason in [call.args[:2]]
        if isinstance(code, ast.Constant) and isinstance(reason, ast.Constant)
    }

    assert written == {("internal_error", "502")}
    assert {(name, answered[name][0]) for name, _ in written} == written


@pytest.mark.parametrize("reason", RefusalReason)
def test_every_refusal_has_its_row(reason: RefusalReason) -> None:
    """With the code that the client gets."""
    said = rows(section("Requests that are refused"))[reason]
    refusal = REFUSALS.get(reason)

    assert said[0] == (str(refusal.status_code) if refusal else "none")


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.COMPLETE])
def test_every_status_has_its_row(status: Status) -> None:
    """What is wrong with an answer that is not complete, and what to do."""
    assert all(rows(section("Observations that are missing, invalid or the like"))[status])


def test_every_refusal_of_the_admin_port_has_its_row() -> None:
    """By its code; and the reasons of `/readyz` that are no more than a word."""
    refused = section("The admin port refuses")
    codes = numbers("PlainTextResponse", 1, "admin/guard.py")

    assert codes
    assert {str(code) for code in codes} <= rows(refused).keys()
    readiness = ast.parse((ROOT / "sidecar" / "admin" / "readiness.py").read_text())
    words = {
        str(node.value.value)
        for node in ast.walk(readiness)
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    assert [word for word in words if f"`{word}`" not in refused] == []


def test_every_exit_code_has_its_row() -> None:
    """Those that the command line ends with, and those of signals before anything serves."""
    codes = {0} | numbers("exit", 0, "cli.py")
    codes |= {128 + number for number in (signal.SIGINT, signal.SIGTERM)}

    assert rows(section("Exit codes", COMMANDS)).keys() == {str(code) for code in codes}
