"""Metric names of LiteLLM's own, and the version of LiteLLM that has them too."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import CollectorRegistry

from sidecar.account.compat import LABELS, Compat, UpstreamVersion
from sidecar.account.store import Store
from sidecar.exchange import Outcome, Usage

CACHED = "litellm_cached_tokens_metric"
HITS = "litellm_cache_hits_metric"
MISSES = "litellm_cache_misses_metric"
READS = ("litellm_provider_cache_read_input_tokens_metric", "litellm_input_cached_tokens_metric")
WRITES = (
    "litellm_provider_cache_creation_input_tokens_metric",
    "litellm_input_cache_creation_tokens_metric",
)


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ((), ()),
        (("v1.83",), (CACHED, HITS, MISSES)),
        (("v1.100",), (*READS, *WRITES)),
        (("v1.83", "v1.100"), (CACHED, HITS, MISSES, *READS, *WRITES)),
    ],
)
def test_choices_make_their_names(choices: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Each choice has its names, and counts under them and no others."""
    store = Store(lambda: 1.0)
    compat = Compat(store, choices)
    assert {family.name for family in store.families} == set(names)
    assert len(compat.families) == len(names)
    series = compat.series("m", "red")
    assert (series is None) == (choices == ())
    if series is None:
        return
    series.add(Usage(7, 16, 2101, 30, 20, None), Outcome.HIT)
    series.add(Usage(7, 16, 0, None, 5, 6), Outcome.WRITE)
    series.add(Usage(7, 16, 0, 0), Outcome.NOT_CACHED)
    series.add(Usage(7, 16), Outcome.UNREPORTED)
    registry = CollectorRegistry()
    registry.register(store)
    counts = {CACHED: 2101, HITS: 1, MISSES: 2}
    counts |= dict.fromkeys(READS, 2101) | dict.fromkeys(WRITES, 41)
    labels = dict(zip(LABELS, ("m", "m", "red"), strict=True))
    for name in names:
        assert registry.get_sample_value(f"{name}_total", labels) == counts[name]


class Rig:
    """What is known of the upstream's version."""

    def __init__(self, *, compat: bool = True) -> None:
        store = Store(lambda: 1.0)
        self.info = store.gauge("upstream_info", "", ("version",))
        self.conflict = store.gauge("compat_conflict", "", ("names",)).child("v1.100")
        self.version = UpstreamVersion(self.info, self.conflict if compat else None)

    def note(self, version: bytes) -> None:
        self.version.due = True
        self.version.note([(b"x-litellm-version", version)])

    def shown(self) -> dict[str, float]:
        return {names[0]: child.value for names, child in self.info.children.items()}


def test_version_is_that_of_the_last_answer() -> None:
    """One version is 1, those before it 0; answers without one change nothing."""
    rig = Rig()
    rig.version.note([(b"date", b"x")])
    assert rig.version.due, "it goes on looking"
    rig.note(b"1.83.10")
    assert (rig.shown(), rig.version.due) == ({"1.83.10": 1}, False)
    rig.note(b"1.100.5")
    assert rig.shown() == {"1.83.10": 0, "1.100.5": 1}
    rig.note(b"1.83.10")
    assert rig.shown() == {"1.83.10": 1, "1.100.5": 0}


@pytest.mark.parametrize("junk", [b"", b"main", b"1", b'1.2"}', b"1.2\xff", b"1." + b"2" * 50])
def test_what_is_no_version_is_no_label(junk: bytes) -> None:
    """An upstream can say anything."""
    rig = Rig()
    rig.note(junk)
    assert rig.shown() == {}


def test_versions_are_bounded() -> None:
    """However many there are, some are kept apart."""
    rig = Rig()
    for number in range(50):
        rig.note(b"1.83.%d" % number)
    assert len(rig.shown()) == 20


@pytest.mark.parametrize(
    ("version", "conflict"),
    [
        (b"1.83.10", 0),
        (b"1.86.0", 0),
        (b"1.87.0", 1),
        (b"1.100.5", 1),
        (b"1.100.5-nightly", 1),
        (b"2.0.0rc1", 1),
        (b"0.99.0", 0),
    ],
)
def test_version_that_has_the_names_itself(
    caplog: pytest.LogCaptureFixture, version: bytes, conflict: int
) -> None:
    """From 1.87 on LiteLLM has them, which is told once for each version."""
    rig = Rig()
    for _ in range(3):
        rig.note(version)
        rig.note(b"1.80.0")
    rig.note(version)
    assert rig.conflict.value == conflict
    told = [record for record in caplog.records if record.message == "compat_conflict"]
    assert [record.levelno for record in told] == [logging.WARNING] * conflict
    assert all("SIDECAR_COMPAT" in record.__dict__["detail"] for record in told)


def test_no_conflict_without_the_names(caplog: pytest.LogCaptureFixture) -> None:
    """Where they are off there is nothing to tell."""
    rig = Rig(compat=False)
    rig.note(b"1.100.5")
    assert (rig.conflict.value, rig.shown(), caplog.records) == (0, {"1.100.5": 1}, [])
