"""One decision: what is observed and remembered -> a plan for all pools, what to remember, and why.

    learn (arrivals, step costs) -> want (the policy) -> damp -> the pool's limits -> budget and flips

Pure: the same code runs in production and in simulation, and a recorded decision can be made again (record.py).
Knows nothing of Ray, Kubernetes or clocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from planner.scaling.budget import Arrangement, Move, arrange
from planner.scaling.config import AutoscalingConfig
from planner.scaling.damping import Damped, PoolMemory, damp, down_window_s, follow_starts, moved, remember, shrink_step
from planner.scaling.forecast import observe
from planner.scaling.observation import Observation, PoolObservation, why_unusable
from planner.scaling.plan import FLIP, GROW, RETIRE, Explanation, Plan, PoolExplanation, Step
from planner.scaling.policies.fixed import FixedPolicy
from planner.scaling.policies.policy import Hold, Learned, ScalingPolicy, Want
from planner.scaling.policies.queue_depth import QueueDepthPolicy
from planner.scaling.policies.slo import SloPolicy
from planner.scaling.step_cost import measured

POLICIES: Mapping[str, Callable[[AutoscalingConfig], ScalingPolicy]] = {
    "slo": SloPolicy,
    "queue_depth": QueueDepthPolicy,
    "fixed": FixedPolicy,
}


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What one decision leaves to the next. Serialisable; an empty one is that of a fresh start."""

    plan: Plan | None = None
    pools: dict[str, PoolMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one pool should do, before the budget, and why."""

    move: Move
    binding: str
    reason: str
    terms: dict[str, float] | None = None
    num_missing: int = 0


def decide(
    observation: Observation,
    state: ScalingState,
    now_s: float,
    config: AutoscalingConfig,
    policy: ScalingPolicy | None = None,
) -> tuple[Plan, ScalingState, Explanation]:
    """The plan, the state for the next decision, and why. policy: in place of the configured one, for comparisons."""
    acting = policy or POLICIES[config.policy](config)
    max_gpus = config.max_gpus or sum(pool.gpus_per_worker * pool.max_workers for pool in observation.pools)
    verdicts: dict[str, _Verdict] = {}
    memories: dict[str, PoolMemory] = {}
    for pool in observation.pools:
        memory = follow_starts(state.pools.get(pool.name, PoolMemory()), pool, now_s)
        verdicts[pool.name], memories[pool.name] = _judge(pool, observation, memory, config, acting, now_s)

    by_name = {pool.name: pool for pool in observation.pools}

    def may_flip(source: str, to: str) -> bool:
        return by_name[source].can_flip_to(by_name[to])

    def replaces(pool: str, other: str) -> bool:
        return _replaces(by_name[pool].role, by_name[other].role)

    arranged = arrange([verdict.move for verdict in verdicts.values()], may_flip, replaces, max_gpus)
    plan = _plan(observation, arranged, state.plan, max_gpus)
    for pool in observation.pools:
        window_s = down_window_s(pool, memories[pool.name], config)
        memories[pool.name] = moved(memories[pool.name], pool.num_workers, plan.targets[pool.name], window_s, now_s)
    explained = tuple(_explain(pool, verdicts[pool.name], plan, arranged) for pool in observation.pools)
    num_gpus = sum(pool.num_gpus for pool in observation.pools)
    name = config.policy if policy is None else type(policy).__name__
    explanation = Explanation(plan.plan_id, config.mode, name, now_s, num_gpus, plan.num_gpus, max_gpus, explained)
    return plan, ScalingState(plan, memories), explanation


# ---- one pool


def _judge(
    pool: PoolObservation,
    observation: Observation,
    memory: PoolMemory,
    config: AutoscalingConfig,
    policy: ScalingPolicy,
    now_s: float,
) -> tuple[_Verdict, PoolMemory]:
    current, minimum = pool.num_workers, _minimum(pool, observation, config)
    if config.mode == "off":
        return _stay(pool, current, "off", "autoscaling is off"), memory
    if pool.pinned_workers is not None:
        return _pinned(pool, pool.pinned_workers), memory
    unusable = why_unusable(pool, config.metrics_max_age_s)
    if unusable is None:
        memory = dataclasses.replace(memory, learned=_learn(pool, memory.learned, config, now_s))
        want = policy.want(pool, memory.learned)
    else:
        want = Hold(unusable)
    if isinstance(want, Hold):
        held = dataclasses.replace(memory, held_at_s=now_s)
        return _stay(pool, max(current, minimum), "hold", want.reason), held
    memory = remember(memory, want, pool, config, now_s)
    damped = damp(pool, memory, config, now_s)
    verdict = _bounded(pool, want, damped, minimum, _num_missing(pool, memory, config, now_s))
    move = dataclasses.replace(verdict.move, step=shrink_step(current, config))
    return dataclasses.replace(verdict, move=move), memory


def _learn(pool: PoolObservation, learned: Learned, config: AutoscalingConfig, now_s: float) -> Learned:
    return Learned(
        observe(learned.arrivals, pool.arrivals_per_s, now_s),
        measured(learned.steps, pool.step_samples, config.warmup_s),
    )


def _bounded(pool: PoolObservation, want: Want, damped: Damped, minimum: int, num_missing: int) -> _Verdict:
    """The damped target within the pool's limits."""
    current, target = pool.num_workers, damped.target
    binding, reason = want.binding, damped.reason
    if want.unreachable:
        reason += f"; no number of workers reaches {want.unreachable}"
    if target == current and not want.least <= current <= want.enough:
        binding = "damping"
    most = max(minimum, pool.max_workers)
    if num_missing and target >= current:
        target, binding = current, "not_reached"
        reason = f"{num_missing} workers are not to be had; no more are asked for ({reason})"
    if target > most or (target == most and want.least > most):
        target, binding, reason = most, "maximum", f"at most {most} workers ({reason})"
    if target < minimum:
        target, binding, reason = minimum, "minimum", f"at least {minimum} workers ({reason})"
    elif target == minimum and want.enough < minimum:
        binding, reason = "minimum", f"at least {minimum} workers ({reason})"
    move = Move(
        pool=pool.name,
        current=current,
        num_ready=pool.num_ready,
        num_draining=pool.num_draining,
        target=target,
        goal=min(most, max(minimum, damped.goal)),
        flip_floor=damped.flip_floor,
        pressure_floor=damped.pressure_floor,
        minimum=minimum,
        gpus_per_worker=pool.gpus_per_worker,
    )
    return _Verdict(move, binding, reason, want.terms, max(0, num_missing - max(0, current - target)))


def _stay(pool: PoolObservation, target: int, binding: str, reason: str) -> _Verdict:
    move = Move(
        pool=pool.name,
        current=pool.num_workers,
        num_ready=pool.num_ready,
        num_draining=pool.num_draining,
        target=target,
        goal=target,
        flip_floor=target,
        pressure_floor=target,
        minimum=min(target, pool.num_workers),
        gpus_per_worker=pool.gpus_per_worker,
        held=True,
    )
    return _Verdict(move, binding, reason)


def _pinned(pool: PoolObservation, count: int) -> _Verdict:
    """The count that an operator set, within the pool's limits, which may have changed since."""
    within = min(max(count, pool.min_workers), max(pool.min_workers, pool.max_workers))
    limits = f", but the pool has from {pool.min_workers} to {pool.max_workers} workers" if within != count else ""
    return _stay(pool, within, "pinned", f"an operator set {count}{limits}")


def _minimum(pool: PoolObservation, observation: Observation, config: AutoscalingConfig) -> int:
    """One worker of each role stays, or one mixed worker: without, a request would wait for a start."""
    mixed = any(other.role == "mixed" and other.min_workers for other in observation.pools)
    may_be_empty = config.scale_to_zero or (mixed and pool.role != "mixed")
    return pool.min_workers if may_be_empty else max(1, pool.min_workers)


def _num_missing(pool: PoolObservation, memory: PoolMemory, config: AutoscalingConfig, now_s: float) -> int:
    """Workers that have been starting for too long. Serve reports nothing: it goes on asking Ray for nodes."""
    if memory.starting_since_s is None:
        return 0
    patience_s = max(config.not_reached_after_s, 2 * pool.startup_s)
    return pool.num_starting if now_s - memory.starting_since_s >= patience_s else 0


# ---- all pools


def _plan(observation: Observation, arranged: Arrangement, last: Plan | None, max_gpus: int) -> Plan:
    """A new plan, or the last one where it wants the same: its flips may be under way."""
    gpus = {pool.name: pool.gpus_per_worker for pool in observation.pools}
    if (
        last is not None
        and (last.targets, last.gpus_per_worker, last.max_gpus) == (arranged.targets, gpus, max_gpus)
        and set(arranged.flips) <= {(source, to) for source, to, _ in last.flips}
    ):
        return last
    plan_id = 1 if last is None else last.plan_id + 1
    return Plan(plan_id, dict(arranged.targets), _steps(observation, arranged), gpus, max_gpus)


def _steps(observation: Observation, arranged: Arrangement) -> tuple[Step, ...]:
    flips = [Step(FLIP, source, count, to) for (source, to), count in sorted(arranged.flips.items())]
    change = {pool.name: arranged.targets[pool.name] - pool.num_workers for pool in observation.pools}
    for (source, to), count in arranged.flips.items():
        change[source] += count
        change[to] -= count
    roles = {pool.name: pool.role for pool in observation.pools}
    growing = [pool.name for pool in observation.pools if arranged.targets[pool.name] > pool.num_workers]
    grow = [Step(GROW, name, count) for name, count in sorted(change.items()) if count > 0]
    retire = []
    for name, count in sorted(change.items()):
        if count < 0:
            # A pool that takes over for this one has its workers ready first, where the budget has room for both.
            after = tuple(other for other in growing if _replaces(roles[other], roles[name]))
            retire.append(Step(RETIRE, name, -count, after=after))
    return (
        *flips,
        *(step for step in retire if not step.after),
        *grow,
        *(step for step in retire if step.after),
    )


def _replaces(role: str, other: str) -> bool:
    return role == other or "mixed" in (role, other)


def _explain(pool: PoolObservation, verdict: _Verdict, plan: Plan, arranged: Arrangement) -> PoolExplanation:
    target, binding, reason = plan.targets[pool.name], verdict.binding, verdict.reason
    flips = [(source, to, count) for (source, to), count in arranged.flips.items() if pool.name in (source, to)]
    if pool.name in arranged.limited:
        binding = "budget"
        reason = f"wanted {verdict.move.target}, but the budget is {plan.max_gpus} GPUs ({reason})"
    for source, to, count in flips:
        reason += f"; {count} from {source}" if to == pool.name else f"; {count} to {to}"
    return PoolExplanation(
        pool=pool.name,
        role=pool.role,
        num_workers=pool.num_workers,
        target=target,
        binding=binding,
        reason=reason,
        num_gpus=pool.num_gpus,
        target_gpus=target * pool.gpus_per_worker,
        num_missing=verdict.num_missing,
        terms=verdict.terms,
    )
