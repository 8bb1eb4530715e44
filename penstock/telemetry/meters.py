"""The live metrics of one process: values for what `catalog` declares, and their exposition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.samples import Sample

from penstock.telemetry.catalog import of
from penstock.telemetry.metric import OTHER, PREFIX, Label, Metric, Process

Source = Callable[[], float]


class Meter(Protocol):
    """What code that measures needs. Safe to call from any thread; cheap enough for each token."""

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """A counter grows."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One more value for a histogram."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """A gauge stands at `value`."""


class _NoMeter:
    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        return

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        return

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        return


NO_METER: Meter = _NoMeter()
"""Measures nothing: for parts that run without a process around them."""


class Meters:
    """A `Meter` over every metric of one kind of process.

    What is counted elsewhere already is not counted twice: `read` names a source that is asked at
    each exposition.
    """

    def __init__(self, process: Process, identity: Mapping[str, str] | None = None) -> None:
        """`identity`: labels of every series of this process (role and worker); the front and the
        store have none.
        """
        self.process = process
        self._identity = dict(identity or {})
        self._registry = CollectorRegistry(auto_describe=False)
        self._metrics = {PREFIX + metric.name: metric for metric in of(process)}
        self._live: dict[Metric, Counter | Gauge | Histogram] = {}
        self._seen: dict[tuple[Metric, str], set[str]] = {}
        self._sources: dict[Metric, Source] = {}
        for metric in self._metrics.values():
            if not metric.name.startswith("process_"):
                self._live[metric] = self._make(metric)
        ProcessCollector(namespace=PREFIX.rstrip("_"), registry=self._registry)

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        live = self._of(metric, labels)
        assert isinstance(live, Counter)
        live.inc(amount)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        live = self._of(metric, labels)
        assert isinstance(live, Histogram)
        live.observe(value)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        live = self._of(metric, labels)
        assert isinstance(live, Gauge)
        live.set(value)

    def read(self, metric: Metric, source: Source) -> None:
        """The value of a metric without labels is `source()` from now on, at each exposition."""
        if metric.labels or metric.kind == "histogram" or metric not in self._live:
            raise ValueError(f"{metric.name} cannot be read from elsewhere in a {self.process}")
        self._sources[metric] = source

    def text(self) -> bytes:
        """Prometheus text format 0.0.4. Call it where the sources may be read."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        text: bytes = generate_latest(registry)
        return text

    def collect(self) -> Iterator[Family]:
        """prometheus_client's collector protocol."""
        for family in self._registry.collect():
            full = family.name + ("_total" if family.type == "counter" else "")
            metric = self._metrics.get(full)
            if metric is None:
                # Process figures of the library that the catalogue does not have.
                continue
            yield self._shown(family, metric)
            for alias in metric.also:
                yield self._alias(family, metric, alias)

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        name, names = PREFIX + metric.name, metric.label_names
        if metric.kind == "counter":
            return Counter(name, metric.meaning, names, registry=self._registry)
        if metric.kind == "gauge":
            return Gauge(name, metric.meaning, names, registry=self._registry)
        return Histogram(
            name, metric.meaning, names, registry=self._registry, buckets=metric.buckets
        )

    def _of(self, metric: Metric, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        live = self._live[metric]
        if not metric.labels:
            return live
        return live.labels(*[self._bounded(metric, x, labels[x.name]) for x in metric.labels])

    def _bounded(self, metric: Metric, label: Label, value: str) -> str:
        if label.values:
            return value if value in label.values else OTHER
        seen = self._seen.setdefault((metric, label.name), set())
        if value in seen:
            return value
        if len(seen) >= label.most:
            return OTHER
        seen.add(value)
        return value

    def _shown(self, family: Family, metric: Metric) -> Family:
        identity = self._identity
        if metric.name.startswith("process_"):
            identity = {"role": self.process, **identity}
        shown = Family(family.name, metric.meaning, family.type)
        source = self._sources.get(metric)
        for sample in family.samples:
            # Creation times would double the number of series.
            if sample.name.endswith("_created"):
                continue
            value = sample.value if source is None else float(source())
            shown.samples.append(Sample(sample.name, {**identity, **sample.labels}, value))
        return shown

    def _alias(self, family: Family, metric: Metric, alias: str) -> Family:
        name = PREFIX + alias
        # An older counter that was shown as a gauge stays one.
        is_counter = metric.kind == "counter" and name.endswith("_total")
        kind = "gauge" if metric.kind == "counter" and not is_counter else family.type
        own = PREFIX + metric.name
        shown = Family(
            name.removesuffix("_total") if is_counter else name,
            f"The same as {own}",
            kind,
        )
        for sample in self._shown(family, metric).samples:
            suffix = sample.name.removeprefix(own)
            shown.samples.append(Sample(name + suffix, sample.labels, sample.value))
        return shown
