"""The committed dashboard shows what is exported, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

from deploy import metrics
from deploy.health import Progress
from deploy.metrics import METRICS, TAGS
from workers.loop import LoadSnapshot

DASHBOARD = Path(metrics.__file__).parent / "dashboards" / "switchyard.json"
EXPORTED = {name for spec in METRICS for name in spec.exported_names}


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    return shown + variables


def test_every_metric_on_the_dashboard_is_exported() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert shown
    assert shown <= EXPORTED


def test_the_dashboard_shows_what_was_promised() -> None:
    text = " ".join(expressions())
    for name in ("running", "waiting", "free_blocks", "tokens_total", "ttft_seconds_bucket"):
        assert f"ray_switchyard_{name}" in text


def test_every_metric_is_on_the_dashboard() -> None:
    text = " ".join(expressions())
    assert [spec.name for spec in METRICS if not any(name in text for name in spec.exported_names)] == []


def test_the_dashboard_groups_by_tags_that_exist() -> None:
    for expression in expressions():
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.replace(" ", "").split(",")) <= {*TAGS, "le"}


def test_every_metric_shows_a_key_of_the_workers_report() -> None:
    known = {*LoadSnapshot.__dataclass_fields__, "ttft_s"}
    assert {spec.key for spec in METRICS} <= known


def test_panels_have_their_own_places() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)


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
