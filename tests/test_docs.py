"""The pages say what is so: generated tables, names, and their own examples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from scripts import docs
from sidecar.account.identity import NO_TEAM, TeamFile
from sidecar.account.lookups import LOOKUP_RESULTS
from sidecar.account.rates import Unpriced
from sidecar.cli import cli
from sidecar.config import PREFIX, Settings
from sidecar.exchange import (
    LABEL_NAMES,
    InputClass,
    LogFault,
    MissReason,
    Outcome,
    Rewrite,
    Route,
    Status,
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


def named(value: object) -> str | None:
    """Name a file in a test's id."""
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


@pytest.mark.parametrize("page", docs.PAGES, ids=named)
def test_generated_tables_are_those_of_today(page: Path) -> None:
    """`scripts/docs.py` would change nothing."""
    text = page.read_text()

    assert docs.rewritten(text, docs.PAGES[page]) == text


def test_page_of_the_usage_log_is_complete() -> None:
    """Every reason of a failure, and every name to group by, is explained."""
    text = docs.USAGE_LOG.read_text()

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
    monkeypatch.setattr(docs, "PAGES", {page: docs.PAGES[README]})

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
    ("page", "names"),
    [
        pytest.param("metrics", LABEL_NAMES, id="labels"),
        pytest.param("metrics", InputClass, id="cache"),
        pytest.param("metrics", Route, id="route"),
        pytest.param("accuracy", Outcome, id="outcome"),
        pytest.param("accuracy", Status, id="status"),
        pytest.param("rewriting", Rewrite, id="result"),
        pytest.param("prices", [reason for reason in Unpriced if "rate" not in reason], id="price"),
        pytest.param("misses", MissReason, id="miss"),
    ],
)
def test_every_name_of_a_closed_set_is_on_its_page(page: str, names: Iterable[str]) -> None:
    """Values that operators meet in labels are explained."""
    text = (ROOT / "docs" / f"{page}.md").read_text()

    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_command_is_on_its_page() -> None:
    """What can be typed is explained."""
    text = (ROOT / "docs" / "commands.md").read_text()

    assert [name for name in cli.commands if f"| `sidecar {name}" not in text] == []


@pytest.mark.parametrize("path", SPEAKING, ids=named)
def test_every_command_that_is_mentioned_exists(path: Path) -> None:
    """Who is called at night can type what a page or a runbook says, options and all."""
    for name, rest in re.findall(
        r"(?m)(?:`|^\$ |-- |exec sidecar )sidecar ([a-z]+)([^`\n#]*)", path.read_text()
    ):
        assert name in cli.commands
        known = {option for one in cli.commands[name].params for option in one.opts} | {"--help"}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)


@pytest.mark.parametrize("path", SPEAKING, ids=named)
def test_commands_in_the_container_are_in_the_image(path: Path) -> None:
    """It has no curl, and no shell to count on."""
    within = re.findall(
        r"(?:kubectl exec \S+ -c sidecar -- |compose exec sidecar |[Ff]rom inside the pod: `)(\w+)",
        path.read_text(),
    )

    assert set(within) <= {"sidecar", "python"}


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
    """Paths of the repository lead somewhere; tests/test_site.py follows the links."""
    text = path.read_text()
    folders = "bench|deploy|docs|fuzz|requirements|scripts|sidecar|tests"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)

    assert [name for name in paths if not (ROOT / name).exists()] == []


def test_results_of_look_ups_are_on_their_page() -> None:
    """Every source and result of a look-up is explained."""
    text = (ROOT / "docs" / "teams.md").read_text()

    for source, results in LOOKUP_RESULTS.items():
        rows = [line for line in text.splitlines() if line.startswith(f"| `{source}` |")]
        assert [name for name in results if not any(f"`{name}`" in row for row in rows)] == []
