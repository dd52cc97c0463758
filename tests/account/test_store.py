"""The store and what a scrape reads of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sidecar.account.exposition import Scrapes, render, wants_openmetrics
from sidecar.account.store import Store

EMPTY = CollectorRegistry()


class _Textual(Collector):
    """The store without times of creation, which the text format has no place for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        for metric in self._store.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def filled() -> Store:
    clock = itertools.count(1_700_000_000.5)
    store = Store(lambda: next(clock))
    tokens = store.counter("x_tokens", 'Counts "tokens"\nof \\ models.', ("model", "cache"))
    odd = ['a"b', "c\\d", "e\nf", "é🌍", "", "}{", "a,le=1"]
    for number, name in enumerate(odd):
        tokens.child(name, "read").add(number)
    numbers: tuple[float, ...] = (0.1, 1e-7, 999_999.5, 1_000_000, 12_345_678, 2**53, 1e21)
    for value in numbers:
        tokens.child("n", str(value)).add(value)
    store.counter("x_plain", "Without labels.").child().add(3)
    store.counter("x_none", "Without label sets.", ("a",))
    store.gauge("x_level", "A gauge.", ("z", "a")).child("1", "2").value = -1.5
    store.gauge("x_at_seconds", "Another.").child().value = 1_764_000_000.25
    times = store.histogram("x_seconds", "Times.", ("route", "a"), (0.1, 1, 2.5, 600))
    for seconds in (0.05, 0.1, 0.11, 2.5, 2.6, 1e6):
        times.child("/v1/messages", "le").observe(seconds)
    times.child('/"x"', "b").observe(3)
    return store


def test_text_is_what_the_library_writes() -> None:
    """Byte for byte, the library's generate_latest is the oracle."""
    store = filled()
    registry = CollectorRegistry()
    registry.register(_Textual(store))
    assert b"".join(render(store, EMPTY)) == generate_latest(registry)


def test_openmetrics_is_what_the_library_writes() -> None:
    """Also in OpenMetrics, with the times of creation; and a parser takes it."""
    store = filled()
    registry = CollectorRegistry()
    registry.register(store)
    text = b"".join(render(store, EMPTY, openmetrics=True))
    assert sorted(text.splitlines()) == sorted(generate_openmetrics(registry).splitlines())
    assert text.endswith(b"# EOF\n")
    assert len(list(text_string_to_metric_families(text.decode()))) == len(store.families)


def test_names_are_refused_twice() -> None:
    """The registry knows our names, and takes none of them a second time."""
    registry = CollectorRegistry()
    registry.register(filled())
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(filled())


def test_slices_are_short() -> None:
    """However many series there are, the loop gets its turn after a few thousand lines."""
    store = Store(lambda: 1.0)
    family = store.counter("x", "X.", ("n",))
    for number in range(30_000):
        family.child(str(number))
    for openmetrics in (False, True):
        slices = list(render(store, EMPTY, openmetrics=openmetrics))
        assert max(piece.count(b"\n") for piece in slices) <= 502
        assert sum(piece.count(b"\n") for piece in slices) >= 30_000


def test_series_born_during_a_scrape_do_no_harm() -> None:
    """Counting goes on while slices are written."""
    store = Store(lambda: 1.0)
    family = store.counter("x", "X.", ("n",))
    for number in range(5000):
        family.child(str(number))
    slices = render(store, EMPTY)
    next(slices)
    family.child("new").add(1)
    assert b"".join(slices).count(b"\n") >= 3000


def shown(store: Store, watermark: int | None) -> dict[str, str]:
    lines = b"".join(render(store, EMPTY, watermark=watermark)).decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def scraped(store: Store, scrapes: Scrapes, scraper: str) -> dict[str, str]:
    scrape = scrapes.begin(scraper)
    samples = shown(store, scrape.watermark)
    scrapes.end(scrape)
    return samples


def test_new_counters_are_shown_at_zero_once() -> None:
    """A Prometheus sees zero before the first value; everybody else sees what is."""
    now = itertools.count(0.0, 1.0)
    store = Store(lambda: 1.0)
    scrapes = Scrapes(store, lambda: 0, lambda: next(now))
    tokens = store.counter("t", "T.", ("m",))
    level = store.gauge("g", "G.")
    times = store.histogram("h", "H.", (), (1,))
    tokens.child("a").add(2101)
    level.child().add(4)
    times.child().observe(0.5)
    assert shown(store, None)['t_total{m="a"}'] == "2101.0"
    first = scraped(store, scrapes, "p1")
    assert first['t_total{m="a"}'] == "0.0"
    assert first["g"] == "4.0"
    assert (first["h_count"], first["h_sum"], first['h_bucket{le="+Inf"}']) == ("0.0",) * 3
    tokens.child("b").add(7)
    second = scraped(store, scrapes, "p1")
    assert (second['t_total{m="a"}'], second['t_total{m="b"}']) == ("2101.0", "0.0")
    assert second["h_count"] == "1.0"
    third = scraped(store, scrapes, "p1")
    assert third['t_total{m="b"}'] == "7.0"


def test_both_of_a_pair_are_shown_zero() -> None:
    """Each Prometheus that is known by its address sees the zero of a new counter."""
    now = itertools.count(0.0, 1.0)
    store = Store(lambda: 1.0)
    scrapes = Scrapes(store, lambda: 0, lambda: next(now))
    tokens = store.counter("t", "T.")
    for scraper in ("p1", "p2"):
        scraped(store, scrapes, scraper)
    tokens.child().add(5)
    assert scraped(store, scrapes, "p1")["t_total"] == "0.0"
    assert scraped(store, scrapes, "p2")["t_total"] == "0.0"
    assert scraped(store, scrapes, "p1")["t_total"] == "5.0"


def test_an_unknown_scraper_is_shown_no_zero_again() -> None:
    """A Prometheus with a new address may have old data: a second zero would be taken for a
    reset, and all counts would count twice."""
    time = [0.0]
    store = Store(lambda: 1.0)
    scrapes = Scrapes(store, lambda: 0, lambda: time[0])
    store.counter("t", "T.").child().add(5)
    scraped(store, scrapes, "p1")
    assert scraped(store, scrapes, "p2")["t_total"] == "5.0"
    store.counter("u", "U.").child().add(6)
    scraped(store, scrapes, "p2")
    time[0] += Scrapes.FORGET_S + 1
    assert scraped(store, scrapes, "p1")["u_total"] == "6.0"


def test_scrape_that_breaks_off_has_shown_nothing() -> None:
    """Prometheus keeps nothing of half a scrape: what it was to show at zero, the next one does,
    also where both were under way at once."""
    store = Store(lambda: 1.0)
    scrapes = Scrapes(store, lambda: 0, lambda: 1.0)
    store.counter("t", "T.").child().add(5)
    scrapes.begin("p1")
    late = scrapes.begin("p1")
    store.counter("u", "U.").child().add(6)
    assert scraped(store, scrapes, "p1") == {"t_total": "0.0", "u_total": "0.0"}
    scrapes.end(late)
    assert scraped(store, scrapes, "p1") == {"t_total": "5.0", "u_total": "6.0"}


def test_scrapes_are_up_to_date_when_one_has_shown_every_count() -> None:
    """A scrape counts for what was counted when it began, and only if no series was at zero."""
    counted = [0]
    store = Store(lambda: 1.0)
    scrapes = Scrapes(store, lambda: counted[0], lambda: 1.0)
    known = [scrapes.up_to_date]  # where nothing was counted nothing can be lost
    store.counter("t", "T.").child().add(5)
    counted[0] = 1
    known.append(scrapes.up_to_date)
    scraped(store, scrapes, "p1")  # the new series was shown at zero
    known.append(scrapes.up_to_date)
    early = scrapes.begin("p1")
    counted[0] = 2
    scrapes.end(early)
    known.append(scrapes.up_to_date)
    scraped(store, scrapes, "p1")
    known.append(scrapes.up_to_date)
    assert known == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        # Prometheus 2.42
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;"
            "version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            True,
        ),
        # Prometheus 3, without and with native histograms
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,"
            "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
            "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
        (
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;"
            "encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;"
            "escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
        ("text/plain;q=0.9, application/openmetrics-text;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
    ],
)
def test_format_is_negotiated(accept: str, wanted: bool) -> None:
    """The weights of the Accept header are respected."""
    assert wants_openmetrics(accept) is wanted
