"""The committed dashboard shows what is exported, and nothing else."""

from __future__ import annotations

import json
import re
from typing import ClassVar

import pytest
from switchyard.v1 import kvnode_pb2

from deploy.actors.health import Progress
from deploy.actors.kv_nodes import show_stats
from deploy.actors.metrics import RayMetrics, exported_names
from deploy.config import ROOT
from telemetry import node, worker

DASHBOARD = ROOT / "helm" / "switchyard" / "dashboards" / "engine.json"
METRICS = (*worker.RAY_METRICS, *node.METRICS)
EXPORTED = {name for metric in METRICS for name in exported_names(metric)}


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    return shown + variables


def test_every_metric_on_the_dashboard_is_exported() -> None:
    queries = re.findall(r'"(?:expr|definition|query)": "(.*)"', DASHBOARD.read_text())
    shown = {name for query in queries for name in re.findall(r"\b(?:ray|switchyard)_\w+", query)}
    assert shown
    assert shown <= EXPORTED


def test_the_dashboard_shows_what_was_promised() -> None:
    text = " ".join(expressions())
    for name in ("running_requests", "free_blocks", "generated_tokens_total", "time_to_first_token_seconds_bucket"):
        assert f"ray_switchyard_worker_{name}" in text


def test_every_metric_is_on_the_dashboard() -> None:
    text = " ".join(expressions())
    assert [metric.name for metric in METRICS if not any(name in text for name in exported_names(metric))] == []


def test_the_dashboard_groups_by_tags_that_exist() -> None:
    for expression in expressions():
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.replace(" ", "").split(",")) <= {*worker.LABELS, *node.LABELS, "reason", "le"}


def test_a_worker_that_computes_is_healthy() -> None:
    progress = Progress(timeout_s=10, now_s=0)
    for now_s in range(0, 100, 5):
        progress.observe({"num_steps": now_s, "num_queued_tokens": 7}, now_s)
    assert progress.problem(104) == ""


def test_a_worker_that_waits_for_its_clients_is_healthy() -> None:
    progress = Progress(timeout_s=10, now_s=0)
    progress.observe({"num_steps": 3, "num_queued_tokens": 0, "num_running": 4}, 100)
    assert progress.problem(105) == ""


def test_a_worker_that_does_not_compute_its_prompts_is_not() -> None:
    progress = Progress(timeout_s=10, now_s=0)
    progress.observe({"num_steps": 3, "num_queued_tokens": 7}, 5)
    progress.observe({"num_steps": 3, "num_queued_tokens": 7}, 10)
    assert progress.problem(15) == ""
    assert "no progress for 11 s" in progress.problem(16)


def test_a_worker_that_no_longer_reports_is_not() -> None:
    progress = Progress(timeout_s=10, now_s=0)
    progress.observe({"num_steps": 3, "num_queued_tokens": 0}, 1)
    assert "no progress" in progress.problem(20)


def test_a_worker_whose_step_hangs_is_not() -> None:
    progress = Progress(timeout_s=10, now_s=0)
    progress.observe({"num_steps": 3, "num_queued_tokens": 0, "step_age_s": 9.0}, 1)
    assert progress.problem(2) == ""
    progress.observe({"num_steps": 3, "num_queued_tokens": 0, "step_age_s": 11.0}, 3)
    assert "one step has taken 11 s" in progress.problem(4)


class FakeMetric:
    """What Ray's Counter, Gauge and Histogram were called with."""

    made: ClassVar[dict[str, list[tuple[float, dict[str, str]]]]] = {}

    def __init__(self, name: str, *_: object) -> None:
        self._calls = self.made.setdefault(name, [])

    def inc(self, value: float, labels: dict[str, str]) -> None:
        self._calls.append((value, labels))

    set = observe = inc


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[float, dict[str, str]]]]:
    """Calls by the names of the metrics, as Ray gets them."""
    FakeMetric.made = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", FakeMetric)
    return FakeMetric.made


def test_a_workers_report_is_shown(shown: dict[str, list[tuple[float, dict[str, str]]]]) -> None:
    labels = {"worker": "w", "pool": "p", "role": "mixed"}
    exported = RayMetrics(worker.RAY_METRICS, labels)
    exported.report({"num_running": 3, "num_generated_tokens": 7, "ttft_s": [0.5, 0.25]})
    exported.report({"num_running": 0, "num_generated_tokens": 9})
    assert shown["switchyard_worker_running_requests"] == [(3, labels), (0, labels)]
    assert shown["switchyard_worker_generated_tokens"] == [(7, labels), (2, labels)]
    assert shown["switchyard_worker_time_to_first_token_seconds"] == [(0.5, labels), (0.25, labels)]
    assert shown["switchyard_worker_preemptions"] == []


def test_a_nodes_disk_is_shown_where_there_is_one(shown: dict[str, list[tuple[float, dict[str, str]]]]) -> None:
    labels = {"node": "n"}
    arena, disk = RayMetrics(node.ARENA, labels), RayMetrics(node.DISK, labels)
    stats = kvnode_pb2.GetStatsResponse(num_sealed=5, rejected={"stale": 2})
    show_stats(arena, disk, stats)
    assert shown["switchyard_node_sealed_slots"] == [(5, labels)]
    assert shown["switchyard_node_rejected_fragments"] == [(2, {"node": "n", "reason": "stale"})]
    assert shown["switchyard_node_disk_up"] == []
    stats.disk.MergeFrom(kvnode_pb2.DiskStats(is_up=True, num_read=4, rejected={"checksum": 1}))
    show_stats(arena, disk, stats)
    assert shown["switchyard_node_disk_up"] == [(1, labels)]
    assert shown["switchyard_node_disk_read_fragments"] == [(4, labels)]
    assert shown["switchyard_node_disk_rejected_fragments"] == [(1, {"node": "n", "reason": "checksum"})]


def test_a_counter_goes_on_when_a_node_begins_anew(shown: dict[str, list[tuple[float, dict[str, str]]]]) -> None:
    exported = RayMetrics(node.ARENA, {"node": "n"})
    for num_promoted in (10, 12, 12, 3):
        exported.report(kvnode_pb2.GetStatsResponse(num_promoted=num_promoted))
    assert [value for value, _ in shown["switchyard_node_promoted_fragments"]] == [10, 2, 3]
