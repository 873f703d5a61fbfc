"""What a declaration says of a metric, and how a report becomes its samples.

Names follow Prometheus: base units, the unit at the end, then `_total` on a counter. Where OpenTelemetry's conventions
for generative AI have a metric, the declaration says which, and its buckets are theirs. Knows no metrics library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Types of metrics, as Prometheus calls them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    """As Prometheus sees it."""
    kind: Kind
    meaning: str
    unit: str = ""
    """What is counted or measured, as the name ends: seconds, bytes, tokens, ...; empty for events and for 0 or 1."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, the infinite one left out."""
    field: str = ""
    """Field of the report that has the value; a mapping there has one value for each value of the last label."""
    opentelemetry: str = ""
    """The metric of OpenTelemetry's conventions that means the same."""


def counter(
    name: str, unit: str, meaning: str, labels: tuple[str, ...] = (), field: str = "", otel: str = ""
) -> Metric:
    """A declaration of a counter."""
    return Metric(name, Kind.COUNTER, meaning, unit, labels, (), field, otel)


def gauge(name: str, unit: str, meaning: str, labels: tuple[str, ...] = (), field: str = "") -> Metric:
    """A declaration of a gauge."""
    return Metric(name, Kind.GAUGE, meaning, unit, labels, (), field)


def seconds(
    name: str,
    meaning: str,
    buckets: tuple[float, ...],
    labels: tuple[str, ...] = (),
    field: str = "",
    otel: str = "",
) -> Metric:
    """A declaration of a histogram of durations."""
    return Metric(name, Kind.HISTOGRAM, meaning, "seconds", labels, buckets, field, otel)


def samples(metric: Metric, report: object) -> list[tuple[tuple[str, ...], float]]:
    """The values that a report has for a counter or a gauge, each with the values of the labels that the report adds.

    report: a message or a mapping that has metric.field; nothing where it does not.
    """
    value = report.get(metric.field) if isinstance(report, Mapping) else getattr(report, metric.field, None)
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [((str(key),), float(number)) for key, number in value.items()]
    return [((), float(value))]
