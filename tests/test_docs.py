"""The README says what is so: generated tables, names, and its own example."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import docs
from sidecar.account.identity import NO_TEAM, TeamFile
from sidecar.account.lookups import LOOKUP_RESULTS
from sidecar.cli import cli
from sidecar.config import PREFIX, Settings
from sidecar.exchange import (
    LABEL_NAMES,
    InputClass,
    LogFault,
    Outcome,
    RefusalReason,
    Rewrite,
    Route,
    Status,
    UpstreamFault,
)
from sidecar.report import GROUPINGS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}

SPEAKING = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "Dockerfile",
    ROOT / "docker-compose.yml",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(
        path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".md", ".yaml", ".yml")
    ),
]


def named(path: Path) -> str:
    """Name a file in a test's id."""
    return str(path.relative_to(ROOT))


def test_generated_tables_are_those_of_today() -> None:
    """`scripts/docs.py` would change nothing."""
    text, faults = README.read_text(), docs.FAULTS.read_text()

    assert docs.rewritten(text) == text
    assert docs.rewritten(faults, {"faults": docs.faults_table}) == faults


def test_page_of_the_usage_log_is_that_of_today() -> None:
    """Its fields are those that are written, and every reason of a failure is explained."""
    text = docs.USAGE_LOG.read_text()

    assert docs.rewritten(text, {"fields": docs.fields_table}) == text
    assert [fault for fault in LogFault if f"| `{fault}` |" not in text] == []
    choices = text.replace("`model,team_alias`", "`model`, `team_alias`")
    assert [name for name in GROUPINGS if f"`{name}`" not in choices] == []


def test_check_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` ends with 1 and a diff, and leaves the file as it is; without it the file is
    mended."""
    stale = README.read_text().replace("| `SIDECAR_PORT` | `4001` |", "| `SIDECAR_PORT` | `1` |")
    page = tmp_path / "README.md"
    page.write_text(stale)
    monkeypatch.setattr(docs, "README", page)

    assert docs.main(["--check"]) == 1
    assert "\n+| `SIDECAR_PORT` | `4001` |" in capsys.readouterr().out
    assert page.read_text() == stale

    assert docs.main([]) == 0
    assert page.read_text() == README.read_text()
    assert docs.main(["--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("nothing", id="no markers"),
        pytest.param(README.read_text() * 2, id="each marker twice"),
    ],
)
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    """A table is never written to a place that was not meant for it."""
    with pytest.raises(ValueError, match="exactly once"):
        docs.rewritten(text)


@pytest.mark.parametrize("path", SPEAKING, ids=named)
def test_every_setting_that_is_mentioned_exists(path: Path) -> None:
    """No page, manifest or configuration names a setting that is none."""
    mentioned = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]", path.read_text()))

    assert mentioned <= SETTINGS


@pytest.mark.parametrize("path", SPEAKING, ids=named)
def test_every_metric_that_is_mentioned_exists(path: Path) -> None:
    """No page, rule or query names a metric that is not exported."""
    # What follows a colon is the name of a recording rule.
    found = re.findall(r"(?<![\w:])litellm_sidecar_\w+", path.read_text())

    assert set(found) <= docs.metric_names()


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(LABEL_NAMES, id="labels"),
        pytest.param(InputClass, id="cache"),
        pytest.param(Outcome, id="outcome"),
        pytest.param(Status, id="status"),
        pytest.param(Rewrite, id="result"),
        pytest.param(Route, id="route"),
        pytest.param(RefusalReason, id="reason"),
        pytest.param(tuple(cli.commands), id="commands"),
    ],
)
def test_every_name_of_a_closed_set_is_on_the_page(names: Iterator[str]) -> None:
    """Values that operators meet in labels, and commands, are explained."""
    text = README.read_text()

    assert [
        name for name in names if f"`{name}`" not in text and f"`sidecar {name}" not in text
    ] == []


def test_every_reason_of_an_answer_of_our_own_is_on_the_page() -> None:
    """All values of `x-sidecar-error`; what breaks after the head has none."""
    text = README.read_text()
    after_the_head = {UpstreamFault.IDLE_TIMEOUT, UpstreamFault.BODY_CUT}

    assert [
        fault for fault in set(UpstreamFault) - after_the_head if f"`{fault}`" not in text
    ] == []


def test_example_of_a_team_file_can_be_used(tmp_path: Path) -> None:
    """The example of the page is read as the page says."""
    page = ROOT / "docs" / "teams.md"
    match = re.search(r"```yaml\n(# printf.*?)```", page.read_text(), re.DOTALL)
    assert match is not None
    path = tmp_path / "teams.yaml"
    path.write_text(match[1])
    hashes = re.findall(r"[0-9a-f]{64}", match[1])

    teams = TeamFile(path)

    assert [teams.team_of(hashed) for hashed in hashes] == ["Team Red", NO_TEAM]


@pytest.mark.parametrize("path", [path for path in SPEAKING if path.suffix == ".md"], ids=named)
def test_every_file_that_is_mentioned_exists(path: Path) -> None:
    """Paths of the repository and links within a page lead somewhere."""
    text = path.read_text()
    paths = re.findall(r"`((?:deploy|scripts|sidecar|requirements)/[\w./-]+)`", text)
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in re.findall(r"(?m)^#+ (.+)$", text)
    }

    assert [name for name in paths if not (ROOT / name).exists()] == []
    assert [name for name in linked if not (path.parent / name).exists()] == []
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings


def test_results_of_look_ups_are_on_their_page() -> None:
    """Every source and result of a look-up is explained."""
    text = (ROOT / "docs" / "teams.md").read_text()

    for source, results in LOOKUP_RESULTS.items():
        rows = [line for line in text.splitlines() if line.startswith(f"| `{source}` |")]
        assert [name for name in results if not any(f"`{name}`" in row for row in rows)] == []
