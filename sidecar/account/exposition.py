"""Writing what a scrape reads: the text format and OpenMetrics, in slices.

A scrape of tens of thousands of series takes tens of milliseconds; a stream that stands still
for that long would show it. So the text comes in slices of about a millisecond, between which
the loop does other work. The library's `generate_latest` writes the same lines, and is the
oracle in the tests; it also writes what is not ours, such as the process's own metrics.

`Scrapes` is the memory of who has been shown what. A counter that is born with its first
value is lost on `increase()`, which counts from the first sample it sees. A Prometheus is
therefore shown each new counter and histogram at zero once, and at its value from the next
scrape on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.utils import floatToGoString

from sidecar.account.store import Amount, Family, Histogram, Store, Value

__all__ = ["OPENMETRICS_TYPE", "TEXT_TYPE", "Scrapes", "render", "wants_openmetrics"]

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_SLICE_LINES = 500
"""Lines written between two chances for the loop to do other work: well under 1 ms, and about
as much again where they are compressed."""


def wants_openmetrics(accept: str) -> bool:
    """Say whether an Accept header prefers OpenMetrics to plain text (RFC 9110 section 12.5.1)."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0, "*/*": 0.0}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        if name in weights:
            weights[name] = max(weights[name], weight)
    openmetrics = weights["application/openmetrics-text"]
    return openmetrics > 0 and openmetrics >= max(weights["text/plain"], weights["*/*"])


@dataclass(slots=True)
class _Scraper:
    shown: int
    """The youngest label set that this scraper has been shown."""
    at: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """A scrape by a Prometheus that has begun."""

    watermark: int
    """Label sets born after it are to be shown at zero."""
    births: int
    counted: int
    scraper: _Scraper


class Scrapes:
    """Who has been shown which label sets.

    Each Prometheus of a pair is known by its address, so that each sees the zero. One that is
    not known, or was not seen for a while, is taken for one that has seen what any has: to
    show it a zero again would count everything twice.

    Args:
        store: whose label sets are shown.
        counted: how many exchanges have been counted.
        clock: monotonic seconds.
    """

    FORGET_S = 300.0
    """Prometheus itself forgets a series that was not scraped for five minutes."""
    _MAX_SCRAPERS = 64

    def __init__(
        self, store: Store, counted: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._counted = counted
        self._clock = clock
        self._scrapers: dict[str, _Scraper] = {}
        self._shown = 0
        self._true_counted = 0
        self.last_at: float | None = None
        """When a Prometheus last scraped, on the clock."""

    @property
    def up_to_date(self) -> bool:
        """Whether a Prometheus has seen every count as it is now."""
        return self._true_counted == self._counted()

    def begin(self, scraper: str) -> Scrape:
        """Note that a Prometheus has begun to scrape."""
        now = self._clock()
        known = self._scrapers.get(scraper)
        if known is None or now - known.at > self.FORGET_S:
            if len(self._scrapers) >= self._MAX_SCRAPERS:
                self._scrapers.clear()
            known = self._scrapers[scraper] = _Scraper(self._shown, now)
        known.at = self.last_at = now
        return Scrape(known.shown, self._store.births, self._counted(), known)

    def end(self, scrape: Scrape) -> None:
        """Note that it was sent all. Of what broke off before, Prometheus keeps nothing."""
        scraper = scrape.scraper
        scraper.shown = max(scraper.shown, scrape.births)
        self._shown = max(self._shown, scraper.shown)
        if scrape.watermark >= scrape.births:
            self._true_counted = max(self._true_counted, scrape.counted)


def render(
    store: Store,
    others: CollectorRegistry,
    *,
    openmetrics: bool = False,
    watermark: int | None = None,
) -> Iterator[bytes]:
    """Write all series, in slices between which the caller lets the loop run.

    Args:
        others: collectors that are not ours, written by the library.
        watermark: of a `Scrape`; None to show everything at its value.
    """
    shown = store.births if watermark is None else watermark
    for family in list(store.families):
        yield from _render_family(family, openmetrics, shown)
    foreign = generate_openmetrics(others) if openmetrics else generate_latest(others)
    yield foreign


def _render_family(
    family: Family[Value] | Family[Amount] | Family[Histogram], openmetrics: bool, shown: int
) -> Iterator[bytes]:
    counter = family.kind == "counter"
    name = family.name
    typed = f"{name}_total" if counter and not openmetrics else name
    documentation = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    if openmetrics:
        documentation = documentation.replace('"', r"\"")
    lines = [f"# HELP {typed} {documentation}\n# TYPE {typed} {family.kind}\n"]
    sample = f"{name}_total" if counter else name
    for child in list(family.children.values()):
        # A gauge is what it is; all else is shown at zero first.
        zero = child.born > shown and family.kind != "gauge"
        if isinstance(child, Histogram):
            _add_histogram(lines, name, child, zero)
        elif isinstance(child, Value):
            labels = f"{{{child.text}}}" if child.text else ""
            lines.append(f"{sample}{labels} {_number(0 if zero else child.value)}\n")
        if openmetrics and family.kind != "gauge":
            labels = f"{{{child.text}}}" if child.text else ""
            lines.append(f"{name}_created{labels} {child.created_text}\n")
        if len(lines) >= _SLICE_LINES:
            yield "".join(lines).encode()
            lines.clear()
    yield "".join(lines).encode()


def _add_histogram(lines: list[str], name: str, child: Histogram, zero: bool) -> None:
    total = 0
    for text, count in zip(child.bucket_texts, child.counts, strict=True):
        total += 0 if zero else count
        lines.append(f"{name}_bucket{{{text}}} {_number(total)}\n")
    labels = f"{{{child.text}}}" if child.text else ""
    lines.append(f"{name}_count{labels} {_number(total)}\n")
    lines.append(f"{name}_sum{labels} {_number(0 if zero else child.sum)}\n")


def _number(value: float) -> str:
    # What floatToGoString does to nearly every value, at a fraction of its cost.
    if 0 <= value < 1_000_000:
        return repr(float(value))
    return str(floatToGoString(value))
