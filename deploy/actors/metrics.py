"""Exports what workers and KV nodes report on Ray's metrics port.

Names and meanings are declared in `telemetry`. Knows nothing of where a report comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from telemetry.metric import Kind, Metric, samples

Report = Mapping[str, Any]
"""Of a worker: see workers.runtime.leader.WorkerLeader.metrics."""


def exported_names(metric: Metric) -> tuple[str, ...]:
    """What Prometheus sees of a metric on Ray's port."""
    name = f"ray_{metric.name}"
    return tuple(f"{name}_{part}" for part in ("bucket", "sum", "count")) if metric.kind is Kind.HISTOGRAM else (name,)


class RayMetrics:
    """Metrics of one worker or node. Ray drops a gauge that was not set for two seconds: report at least each second.

    labels: what all their samples have in common.
    """

    def __init__(self, metrics: Sequence[Metric], labels: Mapping[str, str]) -> None:
        self._metrics = [(metric, _make(metric)) for metric in metrics]
        self._labels = dict(labels)
        self._last: dict[tuple[str, tuple[str, ...]], float] = {}

    def relabel(self, labels: Mapping[str, str]) -> None:
        """What all samples have in common from now on. Gauges with the labels before go within two seconds."""
        self._labels = dict(labels)

    def report(self, report: object) -> None:
        """Show a report; what it lacks is left as it was."""
        for metric, exported in self._metrics:
            if metric.kind is Kind.HISTOGRAM:
                observed = report.get(metric.field, ()) if isinstance(report, Mapping) else ()
                for value in observed:
                    exported.observe(value, self._labels)
                continue
            for more, value in samples(metric, report):
                labels = {**self._labels, **dict(zip(metric.labels[len(self._labels) :], more, strict=True))}
                if metric.kind is Kind.GAUGE:
                    exported.set(value, labels)
                elif increase := self._increase(metric.name, more, value):
                    exported.inc(increase, labels)

    def _increase(self, name: str, more: tuple[str, ...], value: float) -> float:
        """By how much a counter grew since the last report; one that is smaller began anew with its process."""
        before = self._last.get((name, more), 0.0)
        self._last[name, more] = value
        return value - before if value >= before else value


def _make(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind is Kind.HISTOGRAM:
        return metrics.Histogram(metric.name, metric.meaning, list(metric.buckets), metric.labels)
    if metric.kind is Kind.GAUGE:
        return metrics.Gauge(metric.name, metric.meaning, metric.labels)
    return metrics.Counter(metric.name.removesuffix("_total"), metric.meaning, metric.labels)  # Ray puts it behind
