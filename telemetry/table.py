"""All metrics as a document: `python -m telemetry.table > docs/metrics.md`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from telemetry import autoscaler, node, router, worker
from telemetry.metric import Metric

_HEAD = """# Metrics

Made by `python -m telemetry.table` from the declarations in `telemetry/`; a test keeps it fresh.

Each router answers `/metrics` on its HTTP port. Ray's processes export theirs on `ray.metrics_export_port`, where each
name begins with `ray_`: `ray_switchyard_worker_free_blocks`. A histogram is seen as `_bucket`, `_sum` and `_count`.
"""


def render() -> str:
    """The document in Markdown."""
    return "\n".join(
        [
            _HEAD,
            _section("A router's requests and streams (routers)", router.METRICS),
            _section("Workers' engines (routers and Ray)", worker.ENGINE),
            _section("Workers' engines (Ray)", (worker.TIME_TO_FIRST,)),
            _section(
                "Workers and their tiers (routers)",
                (worker.UP, worker.KNOWN_BLOCKS, *worker.STORE, worker.TIER_OK),
            ),
            _section("Speculative decoding (routers)", worker.SPECULATION),
            _section("Workers and their adapters (routers)", (worker.RESIDENT_ADAPTERS, *worker.ADAPTERS)),
            _section("What is asked of workers (routers and Ray)", worker.DEMAND),
            _section("KV nodes (Ray)", node.ARENA),
            _section("Disk tiers of KV nodes (Ray)", node.DISK),
            _section("An autoscaler", autoscaler.METRICS),
            _buckets((*router.METRICS, *worker.RAY_METRICS)),
        ]
    )


def _section(title: str, metrics: Sequence[Metric]) -> str:
    rows = [
        f"| `{metric.name}` | {metric.kind.value} | {metric.unit} | {', '.join(metric.labels)} | {_meaning(metric)} |"
        for metric in metrics
    ]
    head = ["| name | type | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([f"## {title}", "", *head, *rows, ""])


def _meaning(metric: Metric) -> str:
    return f"{metric.meaning} OpenTelemetry: {metric.opentelemetry}." if metric.opentelemetry else metric.meaning


def _buckets(metrics: Sequence[Metric]) -> str:
    rows = [
        f"| `{metric.name}` | {', '.join(f'{bound:g}' for bound in metric.buckets)} |"
        for metric in metrics
        if metric.buckets
    ]
    return "\n".join(["## Buckets", "", "| histogram | upper bounds |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    sys.stdout.write(render())
