"""What workers export on Ray's metrics port: names, meaning, and how a worker's report becomes values.

Prometheus sees each name with "ray_" before it, a counter also with "_total" behind it, a histogram as "_bucket",
"_sum" and "_count". Tags: pool, role, worker. Knows nothing of where the report comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TAGS = ("pool", "role", "worker")
Report = Mapping[str, float | list[float]]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: its name, what it means, and the key of the worker's report that it shows."""

    name: str
    kind: str  # "gauge", "counter" or "histogram"
    key: str
    description: str

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Names that Prometheus sees."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (f"{name}_total",) if self.kind == "counter" else (name,)


METRICS = (
    MetricSpec("switchyard_running", "gauge", "num_running", "Requests in the running batch"),
    MetricSpec("switchyard_waiting", "gauge", "num_waiting", "Requests waiting for a place in the batch"),
    MetricSpec("switchyard_waiting_for_kv", "gauge", "num_waiting_for_kv", "Decode requests waiting for KV blocks"),
    MetricSpec("switchyard_free_blocks", "gauge", "num_free_blocks", "KV blocks free or only cached"),
    MetricSpec("switchyard_queued_tokens", "gauge", "num_queued_tokens", "Prompt tokens accepted, not yet computed"),
    MetricSpec("switchyard_tokens", "counter", "num_generated_tokens", "Tokens generated"),
    MetricSpec("switchyard_prompt_tokens", "counter", "num_computed_prompt_tokens", "Prompt tokens computed"),
    MetricSpec("switchyard_cached_prompt_tokens", "counter", "num_cached_prompt_tokens", "Prompt tokens found cached"),
    MetricSpec(
        "switchyard_recomputed_prompt_tokens",
        "counter",
        "num_recomputed_prompt_tokens",
        "Prompt tokens computed by decode requests because KV blocks were missing or bad",
    ),
    MetricSpec("switchyard_preemptions", "counter", "num_preemptions", "Requests preempted for want of KV blocks"),
    MetricSpec("switchyard_published_blocks", "counter", "num_published_blocks", "KV blocks published"),
    MetricSpec("switchyard_transferred_blocks", "counter", "num_transferred_blocks", "KV blocks pulled and used"),
    MetricSpec("switchyard_ttft_seconds", "histogram", "ttft_s", "Time to first token, seen by the worker"),
)

TTFT_BOUNDS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


class WorkerMetrics:
    """The metrics of one worker. Ray drops a gauge that was not set for two seconds: report at least each second."""

    def __init__(self, pool: str, role: str, worker: str) -> None:
        from ray.util import metrics

        def make(spec: MetricSpec) -> Any:
            if spec.kind == "histogram":
                return metrics.Histogram(spec.name, spec.description, TTFT_BOUNDS_S, TAGS)
            kind = metrics.Gauge if spec.kind == "gauge" else metrics.Counter
            return kind(spec.name, spec.description, TAGS)

        self._tags = {"pool": pool, "role": role, "worker": worker}
        self._metrics = [(spec, make(spec)) for spec in METRICS]
        self._last: dict[str, float] = {}

    def report(self, report: Report) -> None:
        """Show a report; what it lacks is left as it was."""
        for spec, metric in self._metrics:
            value = report.get(spec.key)
            if spec.kind == "histogram":
                for observed in value if isinstance(value, list) else ():
                    metric.observe(observed, self._tags)
            elif isinstance(value, int | float):
                if spec.kind == "gauge":
                    metric.set(value, self._tags)
                elif value > self._last.get(spec.key, 0):
                    metric.inc(value - self._last.get(spec.key, 0), self._tags)
                    self._last[spec.key] = value
