"""Counters, gauges and histograms, in the shape that a scrape needs.

The store is a prometheus-client collector: it is registered on a `CollectorRegistry` that the
caller owns, and the library's own exposition reads it through `collect`. What the library's
metric objects cannot do, and this store is here for: its samples keep their label text, so
that 30,000 of them render in milliseconds; and each knows when it was born, so that a scraper
can be shown zero before its first value.

It knows nothing of what is counted. One thread, the event loop's, writes and reads it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from prometheus_client import Metric
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["Amount", "Child", "Family", "Histogram", "Store", "Value"]


class Child:
    """One label set of a family.

    `born` is its place in the order in which the store's label sets came to be, counted
    from 1; `created` the Unix time of that.
    """

    __slots__ = ("born", "created", "created_text", "text", "values")

    def __init__(self, values: tuple[str, ...], text: str, born: int, created: float) -> None:
        self.values = values
        self.text = text
        self.born = born
        self.created = created
        self.created_text: str = floatToGoString(created)


class Value(Child):
    """A counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self, values: tuple[str, ...], text: str, born: int, created: float) -> None:
        super().__init__(values, text, born, created)
        self.value: float = 0

    def add(self, amount: float) -> None:
        """Raise the value. A counter's caller never passes a negative amount."""
        self.value += amount


class Amount(Value):
    """A sum of money in USD, kept as whole attodollars (10^-18): exact, however long it grows."""

    __slots__ = ("atto",)

    @property
    def value(self) -> float:
        """The sum in USD, rounded once."""
        return self.atto / 10**18

    @value.setter
    def value(self, value: float) -> None:
        self.atto = round(value * 10**18)


class Histogram(Child):
    """A histogram with classic buckets."""

    __slots__ = ("_edges", "bucket_texts", "counts", "sum")

    def __init__(
        self,
        values: tuple[str, ...],
        text: str,
        born: int,
        created: float,
        edges: Sequence[float],
        bucket_texts: Sequence[str],
    ) -> None:
        super().__init__(values, text, born, created)
        self._edges = edges
        self.bucket_texts = bucket_texts
        """The label text of each bucket, the infinite one last."""
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._edges, value)] += 1
        self.sum += value


ChildT = TypeVar("ChildT", bound=Child)


class Family(Generic[ChildT]):
    """All label sets of one name."""

    def __init__(
        self,
        store: Store,
        name: str,
        documentation: str,
        kind: str,
        labels: Sequence[str],
        make: Callable[[tuple[str, ...], str, int, float], ChildT],
        edges: Sequence[float] = (),
    ) -> None:
        self.name = name
        """Without the `_total` of a counter."""
        self.documentation = documentation
        self.kind = kind
        self.labels = tuple(labels)
        self.edges = tuple(edges)
        self.children: dict[tuple[str, ...], ChildT] = {}
        self._store = store
        self._make = make

    def child(self, *values: str) -> ChildT:
        """Return the label set with these values, at zero if it is new."""
        found = self.children.get(values)
        if found is None:
            text = _label_text(self.labels, values)
            found = self._make(values, text, *self._store.birth())
            self.children[values] = found
        return found


class Store(Collector):
    """The families of one sidecar.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.families: list[Family[Value] | Family[Amount] | Family[Histogram]] = []
        self.births = 0
        """How many label sets there are, and the `born` of the youngest."""

    def birth(self) -> tuple[int, float]:
        """Give out the next place in the order of birth, and the time."""
        self.births += 1
        return self.births, self._clock()

    def counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Family[Value]:
        """Add a counter; `name` comes without its `_total`."""
        family = Family(self, name, documentation, "counter", labels, Value)
        self.families.append(family)
        return family

    def amount(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Family[Amount]:
        """Add a counter of money; `name` comes without its `_total`."""
        family = Family(self, name, documentation, "counter", labels, Amount)
        self.families.append(family)
        return family

    def gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Family[Value]:
        """Add a gauge."""
        family = Family(self, name, documentation, "gauge", labels, Value)
        self.families.append(family)
        return family

    def histogram(
        self, name: str, documentation: str, labels: Sequence[str], edges: Sequence[float]
    ) -> Family[Histogram]:
        """Add a histogram with these upper bucket edges; the infinite one is implied."""
        edges = tuple(edges)
        bucket_labels = (*labels, "le")
        les = [floatToGoString(edge) for edge in (*edges, float("inf"))]

        def make(values: tuple[str, ...], text: str, born: int, created: float) -> Histogram:
            texts = [_label_text(bucket_labels, (*values, le)) for le in les]
            return Histogram(values, text, born, created, edges, texts)

        family = Family(self, name, documentation, "histogram", labels, make, edges)
        self.families.append(family)
        return family

    def describe(self) -> Iterable[Metric]:
        """Name the families to the registry, so that a name given twice is refused."""
        return [_metric(family) for family in self.families]

    def collect(self) -> Iterable[Metric]:
        """Give the library all that is here, with the times of creation."""
        for family in self.families:
            metric = _metric(family)
            for child in family.children.values():
                if isinstance(child, Histogram):
                    assert isinstance(metric, HistogramMetricFamily)
                    total = 0
                    buckets: list[tuple[str, float]] = []
                    for edge, count in zip(
                        (*family.edges, float("inf")), child.counts, strict=True
                    ):
                        total += count
                        buckets.append((floatToGoString(edge), total))
                    metric.add_metric(child.values, buckets, child.sum)
                    metric.add_sample(
                        f"{family.name}_created",
                        dict(zip(family.labels, child.values, strict=True)),
                        child.created,
                    )
                elif isinstance(metric, CounterMetricFamily) and isinstance(child, Value):
                    metric.add_metric(child.values, child.value, child.created)
                elif isinstance(metric, GaugeMetricFamily) and isinstance(child, Value):
                    metric.add_metric(child.values, child.value)
            yield metric


def _metric(
    family: Family[Value] | Family[Amount] | Family[Histogram],
) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    if family.kind == "counter":
        return CounterMetricFamily(family.name, family.documentation, labels=family.labels)
    if family.kind == "gauge":
        return GaugeMetricFamily(family.name, family.documentation, labels=family.labels)
    return HistogramMetricFamily(family.name, family.documentation, labels=family.labels)


def _label_text(labels: Sequence[str], values: Sequence[str]) -> str:
    """Write labels as an exposition does, sorted by name as the library sorts them."""
    pairs = sorted(zip(labels, values, strict=True))
    return ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
