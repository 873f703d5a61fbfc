"""What an autoscaler exports on its own port."""

from __future__ import annotations

from telemetry.metric import counter, gauge

_PREFIX = "switchyard_autoscaler_"

LEADER = gauge(f"{_PREFIX}leader", "", "1 for the autoscaler that acts; others wait.")
WORKERS = gauge(
    f"{_PREFIX}workers", "workers", "Workers that serve in a pool, by where they stand.", ("pool", "status")
)
TARGET_WORKERS = gauge(f"{_PREFIX}target_workers", "workers", "Workers that the last plan wants.", ("pool",))
MISSING_WORKERS = gauge(
    f"{_PREFIX}missing_workers", "workers", "Workers that were asked for and cannot be had.", ("pool",)
)
GPUS = gauge(f"{_PREFIX}gpus", "gpus", "GPUs held or asked for, those of draining workers included.")
TARGET_GPUS = gauge(f"{_PREFIX}target_gpus", "gpus", "GPUs of the last plan.")
MAX_GPUS = gauge(f"{_PREFIX}max_gpus", "gpus", "The budget.")
BINDING = gauge(f"{_PREFIX}binding", "", "1 for the constraint that decided a pool's target.", ("pool", "constraint"))
PLAN = gauge(f"{_PREFIX}plan", "", "Number of the plan that is followed; it grows with every change.")
DECISIONS = counter(f"{_PREFIX}decisions_total", "", "Decisions made.")
ACTIONS = counter(f"{_PREFIX}actions_total", "", "Actions carried out: drain, switch, announce, replicas.", ("kind",))
PROBLEMS = counter(
    f"{_PREFIX}problems_total",
    "",
    "Looks or actions that failed: serve, directory, worker, memory, lease, record.",
    ("part",),
)
LAST_DECISION = gauge(f"{_PREFIX}last_decision_timestamp_seconds", "seconds", "When the last decision was made.")

METRICS = (
    LEADER,
    WORKERS,
    TARGET_WORKERS,
    MISSING_WORKERS,
    GPUS,
    TARGET_GPUS,
    MAX_GPUS,
    BINDING,
    PLAN,
    DECISIONS,
    ACTIONS,
    PROBLEMS,
    LAST_DECISION,
)
"""All of them."""
