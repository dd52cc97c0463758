"""The names, labels and help texts that dashboards are built on."""

from __future__ import annotations

from pathlib import Path

from sidecar.account.metrics import Metrics

GOLDEN = Path(__file__).parents[1] / "data" / "metrics.golden"


def test_names_labels_and_help_stand_still() -> None:
    """A difference to the golden file is a breaking change: say so in the changelog."""
    metrics = Metrics(
        ("model", "team_alias", "provider"),
        compat=("v1.83", "v1.100"),
        costs=True,
        misses=True,
        clock=lambda: 0.0,
    )
    lines = [
        f"{family.kind} {family.name} {{{','.join(family.labels)}}} "
        f"{list(family.edges) or ''}\n  {family.documentation}"
        for family in metrics.store.families
    ]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()
