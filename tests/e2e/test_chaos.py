"""Whether every token is counted once while everything breaks: a short run of `bench.chaos`.

The sidecar is a process of its own, restarted in the middle; a real Prometheus scrapes it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from bench.chaos.judge import Life, judge
from bench.chaos.run import Report, run
from tests.support.prometheus import find_prometheus
from tests.support.requirements import require

pytestmark = pytest.mark.slow

_EXCHANGES = 3000
_SEED = 20


@pytest.fixture(scope="module")
def report() -> Report:
    require(find_prometheus(), "prometheus")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(_EXCHANGES, _SEED, restarts=2, say=print))


def test_books_log_and_prometheus_agree(report: Report) -> None:
    """What the stand-in said is in the log, and what is in the log is in Prometheus."""
    assert report.verdict.offences == []
    assert report.verdict.difference == 0
    assert [row for row in report.verdict.table if row[3] != row[4]] == []


def test_everything_happened(report: Report) -> None:
    """The run was no stroll: what it is for has come up, and most of it is beyond doubt."""
    verdict, books = report.verdict, report.books
    sums = {name: certain + chosen for name, certain, chosen, _, _ in verdict.table}
    rare = {"oversized", "unknown"}
    assert [name for name, total in sums.items() if not total and name not in rare] == []
    assert books.restarts == 2
    assert books.refused > 0
    assert verdict.whole > _EXCHANGES / 4
    assert all(chosen < certain / 5 for _, certain, chosen, _, _ in verdict.table[:6])
    assert any(b'"cost_usd":' in line for line in report.lives[0].lines)


def test_sidecar_ends_well_and_keeps_nothing(report: Report) -> None:
    """Both processes end cleanly; no descriptor, task or connection stays behind."""
    assert report.exit_codes == [0, 0]
    assert report.leaks == []


def _tampered(report: Report, change: Callable[[dict[str, Any]], None]) -> Life:
    """Change the line of the first complete answer with a cache read."""
    lines = list(report.lives[0].lines)
    for at, raw in enumerate(lines):
        line = json.loads(raw)
        if line["status"] == "complete" and line["read_tokens"]:
            change(line)
            lines[at] = json.dumps(line).encode() + b"\n"
            return report.lives[0]._replace(lines=lines)
    raise AssertionError("there is none")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda line: line.update(read_tokens=line["read_tokens"] + 1), id="a token"),
        pytest.param(lambda line: line.update(status="partial"), id="the status"),
        pytest.param(lambda line: line.update(team_alias="unknown"), id="the team"),
        pytest.param(lambda line: line.update(outcome="write"), id="the outcome"),
        pytest.param(lambda line: line.update(user_agent="chaos/1 99999999"), id="the exchange"),
    ],
)
def test_comparison_finds_a_wrong_line(
    report: Report, change: Callable[[dict[str, Any]], None]
) -> None:
    """One wrong value in one line of thousands is found."""
    verdict = judge(report.books, [_tampered(report, change), report.lives[1]])
    assert verdict.offences


def test_comparison_finds_lost_and_repeated_lines(report: Report) -> None:
    """A line that is missing, or there twice, is found, and so is the difference it makes."""
    first, second = report.lives
    for lines in (first.lines[1:], [*first.lines, first.lines[0]]):
        verdict = judge(report.books, [first._replace(lines=lines), second])
        assert verdict.offences
        assert verdict.difference


def test_comparison_finds_a_lost_scrape(report: Report) -> None:
    """Metrics that lag behind the log by one count are found."""
    first, second = report.lives
    name = "litellm_sidecar_output_tokens_total"
    behind = [
        (labels, value - (labels["__name__"] == name and value > 0))
        for labels, value in second.samples
    ]
    verdict = judge(report.books, [first, second._replace(samples=behind)])
    assert verdict.offences
    assert verdict.difference
