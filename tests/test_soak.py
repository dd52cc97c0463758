"""What the soak concludes from its samples, and that its chart can be drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.chaos.judge import Verdict
from bench.inspected import State
from bench.plot import Panel, draw
from bench.soak import Figures, Sample, settings_for
from sidecar.config import load_settings

REST = State(16, 6, 0, 60_000_000, 0, 0)


def figures(sizes: list[float], after: State = REST) -> Figures:
    """Make figures of a run with these sizes of memory, in MB."""
    samples = [Sample(minute, size, 40, 50, 2.0, 1.0) for minute, size in enumerate(sizes)]
    return Figures(1000, 500, REST, after, samples, Verdict(), 600, 400.0)


@pytest.mark.parametrize(
    ("sizes", "faults"),
    [
        pytest.param([50.0] * 4 + [60.0] * 16, [], id="the warm-up does not count"),
        pytest.param([60.0] * 18 + [62.9] * 2, [], id="less than a twentieth"),
        pytest.param(
            [60.0] * 18 + [63.0] * 2, ["memory grew from 60.0 to 63.0 MB"], id="a twentieth"
        ),
        pytest.param([60.0 + size for size in range(20)], None, id="steadily"),
    ],
)
def test_growth_of_memory_is_a_fault(sizes: list[float], faults: list[str] | None) -> None:
    """Memory at the end is compared with memory after the warm-up."""
    found = figures(sizes).faults()
    assert found == faults if faults is not None else len(found) == 1


@pytest.mark.parametrize("name", ["files", "tasks", "connections"])
def test_what_stays_behind_is_a_fault(name: str) -> None:
    """At rest there must not be more than there was before."""
    more = REST._replace(**{name: getattr(REST, name) + 1})
    assert len(figures([60.0] * 20, more).faults()) == 1


def test_wrong_count_is_a_fault() -> None:
    """The books are compared, too."""
    wrong = figures([60.0] * 20)._replace(verdict=Verdict(offences=["no line"]))
    assert wrong.faults() == ["no line"]


def test_chart_has_a_point_for_each_value() -> None:
    """The chart is well-formed, and its points lie within it."""
    values = [0.0, 3.0, 68.0, 12.0]
    svg = draw("a < b", "minutes", [0, 1, 2, 3.2], [Panel("one", values), Panel("two", [0] * 4)])
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own
    lines = [line.get("points", "") for line in root.iter() if line.tag.endswith("polyline")]
    points = [tuple(map(float, point.split(","))) for line in lines for point in line.split()]
    assert len(points) == 8
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert all(0 < x < width and 0 < y < height for x, y in points)
    assert min(points[:4], key=lambda point: point[1]) == points[2]


def test_settings_of_the_soak_are_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No bound that a setting was given later keeps the soak from its start."""
    for name, value in settings_for(9, tmp_path / "usage.jsonl").items():
        monkeypatch.setenv(name, value)
    assert load_settings().usage_log_files == 100
