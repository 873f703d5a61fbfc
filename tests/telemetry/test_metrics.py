"""The declarations: well named, complete, read from fields that exist, and as the document shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from switchyard.v1 import kvnode_pb2, worker_pb2

from telemetry import autoscaler, node, router, table, worker
from telemetry.metric import Kind, Metric, samples
from workers.engine.load import LoadSnapshot

ROOT = Path(table.__file__).parents[1]
ALL = (*router.METRICS, *worker.ROUTER_METRICS, worker.TIME_TO_FIRST, *node.METRICS, *autoscaler.METRICS)
UNITS = {
    "workers",
    "gpus",
    "seconds",
    "bytes",
    "requests",
    "tokens",
    "blocks",
    "fragments",
    "segments",
    "slots",
    "streams",
    "frames",
    "adapters",
}


def test_the_document_is_fresh() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == table.render(), "run python -m telemetry.table > docs/metrics.md"


def test_each_name_is_declared_once() -> None:
    names = [metric.name for metric in ALL]
    assert len(set(names)) == len(names)
    declared = {value.name for value in vars(router).values() if isinstance(value, Metric)}
    assert declared == {metric.name for metric in router.METRICS}


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"switchyard(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert metric.meaning.endswith(".")
    last = metric.name.removesuffix("_total").rpartition("_")[2]
    assert (last if last in UNITS else "") == metric.unit
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_both_ends_measure_the_first_token_alike() -> None:
    assert worker.TIME_TO_FIRST.buckets == router.TIME_TO_FIRST.buckets == router.PREDICTED_TIME_TO_FIRST.buckets


def test_each_field_of_a_report_is_a_metric() -> None:
    load = set(worker_pb2.WorkerLoad.DESCRIPTOR.fields_by_name)
    adapters, digests = {metric.field for metric in worker.ADAPTERS}, {"device_adapters", "host_adapters"}
    engine = {metric.field for metric in (*worker.ENGINE, *worker.SPECULATION)}
    others = {metric.field for metric in (*worker.DEMAND, *worker.STORE)}
    assert engine | others | adapters | digests | {"tier_problems"} == load
    assert engine | adapters | digests == set(LoadSnapshot.__dataclass_fields__)
    stats = set(kvnode_pb2.GetStatsResponse.DESCRIPTOR.fields_by_name)
    assert {metric.field for metric in node.ARENA} | {"disk"} == stats
    assert {metric.field for metric in node.DISK} == set(kvnode_pb2.DiskStats.DESCRIPTOR.fields_by_name)


def test_no_other_file_spells_a_metric() -> None:
    """Code reads the declarations; tests spell what users see."""
    packages = ("router", "workers", "kvstore", "deploy", "planner", "checkpoint", "costs")
    spelled = {
        f"{path.relative_to(ROOT)}: {found}"
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        for found in re.findall(r"[\"'](?:ray_)?switchyard_(?!client)\w+[\"']", path.read_text())
    }
    assert spelled == set()


def test_documents_name_declared_metrics_only() -> None:
    names = {metric.name for metric in ALL} | {f"ray_{metric.name}" for metric in ALL}
    for document in ("README.md", "ARCHITECTURE.md", "docs/metrics.md"):
        found = set(re.findall(r"`((?:ray_)?switchyard_\w+)`", (ROOT / document).read_text()))
        assert found - {"switchyard_client"} <= names, document


def test_samples_of_a_report() -> None:
    load = worker_pb2.WorkerLoad(num_running=3, tier_is_up={"host": True, "redis": False})
    running = next(metric for metric in worker.ENGINE if metric.field == "num_running")
    tiers = next(metric for metric in worker.STORE if metric.field == "tier_is_up")
    assert samples(running, load) == samples(running, {"num_running": 3}) == [((), 3.0)]
    assert sorted(samples(tiers, load)) == [(("host",), 1.0), (("redis",), 0.0)]
    assert samples(running, {}) == []
