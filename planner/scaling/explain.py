"""A decision as text for people: what binds each pool, its terms, and what is done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime

from planner.scaling.plan import FLIP, GROW, RETIRE, Explanation, Plan, PoolExplanation, Step
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
    steps = _steps_left(explanation, plan)
    said = "; ".join(_step(step) for step in steps) or "none"
    if steps and explanation.mode == "advise":
        said += " (advice, not carried out)"
    ending = [
        (pool.pool, pool.num_gpus // plan.gpus_per_worker[pool.pool] - pool.num_workers) for pool in explanation.pools
    ]
    draining = ", ".join(f"{count} of {name} drain" for name, count in ending if count > 0)
    return f"  actions: {said}" + (f"; under way: {draining}" if draining else "")


def _steps_left(explanation: Explanation, plan: Plan) -> list[Step]:
    """What is still to do: a plan stays the same while it is carried out."""
    change = {pool.pool: pool.target - pool.num_workers for pool in explanation.pools}
    flips = []
    for source, to, planned in plan.flips:
        count = min(planned, -change[source], change[to])
        if count > 0:
            flips.append(Step(FLIP, source, count, to))
            change[source] += count
            change[to] -= count
    after = {step.pool: step.after for step in plan.steps if step.kind == RETIRE}
    retire = [Step(RETIRE, name, -count, after=after.get(name, ())) for name, count in change.items() if count < 0]
    grow = [Step(GROW, name, count) for name, count in change.items() if count > 0]
    at_once = [step for step in retire if not step.after]
    return [*flips, *at_once, *grow, *(step for step in retire if step.after)]


def _step(step: Step) -> str:
    if step.kind == FLIP:
        return f"{step.num_workers} of {step.pool} serve in {step.to_pool}"
    if step.kind == GROW:
        return f"start {step.num_workers} in {step.pool}"
    after = f" once {' and '.join(step.after)} is ready" if step.after else ""
    return f"retire {step.num_workers} of {step.pool}{after}"
