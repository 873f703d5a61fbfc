"""A decision as text for people: what binds each pool, its terms, and what is done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime

from planner.scaling.plan import FLIP, GROW, Explanation, Plan, PoolExplanation, Step
from planner.scaling.record import decisions

_UNITS = {"_per_s": "/s", "_ms": " ms", "_gpus": " GPUs"}


def explain_last(lines: Iterable[str], count: int = 1) -> str:
    """The last decisions of a record, oldest first. Raises RecordError."""
    last = deque(decisions(lines), maxlen=count)
    return "\n\n".join(explanation_text(record.explanation, record.plan) for record in last)


def explanation_text(explanation: Explanation, plan: Plan) -> str:
    """One decision."""
    return "\n".join([_head(explanation), *(_pool(pool) for pool in explanation.pools), _actions(explanation, plan)])


def _head(explanation: Explanation) -> str:
    at = datetime.fromtimestamp(explanation.at_s, UTC).isoformat(sep=" ", timespec="seconds")
    gpus = f"{explanation.num_gpus} -> {explanation.target_gpus} of {explanation.max_gpus} GPUs"
    return f"plan {explanation.plan_id} at {at} ({explanation.policy}, {explanation.mode}): {gpus}"


def _pool(pool: PoolExplanation) -> str:
    counts = f"{pool.num_workers} -> {pool.target} workers, {pool.num_gpus} -> {pool.target_gpus} GPUs"
    missing = f"; not reached: {pool.num_missing} workers missing" if pool.num_missing else ""
    lines = [f"  {pool.pool} ({pool.role}): {counts}{missing}", f"    {pool.binding}: {pool.reason}"]
    if pool.terms:
        lines.append("    " + ", ".join(_term(name, value) for name, value in pool.terms.items()))
    return "\n".join(lines)


def _term(name: str, value: float) -> str:
    number = f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    for ending, unit in _UNITS.items():
        if name.endswith(ending):
            return f"{name.removesuffix(ending)} {number}{unit}"
    return f"{name} {number}"


def _actions(explanation: Explanation, plan: Plan) -> str:
    if explanation.mode == "off":
        return "  actions: none, autoscaling is off"
    steps = "; ".join(_step(step) for step in plan.steps) or "none"
    return f"  actions: {steps}" + (" (advice, not carried out)" if explanation.mode == "advise" and plan.steps else "")


def _step(step: Step) -> str:
    if step.kind == FLIP:
        return f"{step.num_workers} of {step.pool} serve in {step.to_pool}"
    if step.kind == GROW:
        return f"start {step.num_workers} in {step.pool}"
    after = f" once {' and '.join(step.after)} is ready" if step.after else ""
    return f"retire {step.num_workers} of {step.pool}{after}"
