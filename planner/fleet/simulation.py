"""A fleet in virtual time, scaled by the production code: the decisions and the rollout of planner.scaling.

Coarse on purpose, for comparing policies: prefill is one first-come-first-served queue before its workers, decode a
batch per worker whose step time is linear in its streams and their context. There is no prefix cache and no
preemption, and a stream that loses its worker goes on at another one. Pools of prefill and of decode only.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.fleet.fleet import Fleet
from planner.fleet.parts import FleetPool, FleetResult, Stream, Worker
from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.policies.policy import ScalingPolicy
from planner.scaling.rollout import RolloutState, adopt, advance, count_workers
from planner.trace import TraceRequest

_TICK_S = 5.0  # between two looks of the rollout
_RUN_OUT_S = 900.0  # after the last arrival; what has not ended then counts as missed


def simulate(
    trace: Sequence[TraceRequest],
    pools: Sequence[FleetPool],
    config: AutoscalingConfig,
    policy: ScalingPolicy | None = None,
    seed: int = 0,
) -> FleetResult:
    """Play a trace against one pool of prefill and one of decode; policy as in decide. The same seed gives the same."""
    fleet = Fleet(trace, pools, seed)
    scaling, rollout = ScalingState(), RolloutState()
    decide_at_s = config.interval_s
    ends_s = (trace[-1].arrival_s if trace else 0.0) + _RUN_OUT_S
    fleet.at(_TICK_S, "tick")
    while len(fleet.result.ttft_s) < len(trace) and fleet.now_s < ends_s:
        match fleet.next():
            case "arrival", TraceRequest() as request:
                fleet.arrive(request)
            case "ready", Worker() as worker:
                fleet.become_ready(worker)
            case "prefilled", (Worker() as worker, Stream() as stream):
                fleet.prefilled(worker, stream)
            case "decoded", (Worker() as worker, int(version)):
                fleet.decoded(worker, version)
            case "tick", _:
                fleet.at(fleet.now_s + _TICK_S, "tick")
                progress = fleet.progress()
                if fleet.now_s >= decide_at_s:
                    decide_at_s += config.interval_s
                    observation = fleet.observe(count_workers(rollout, progress))
                    plan, scaling, explanation = decide(observation, scaling, fleet.now_s, config, policy)
                    rollout = adopt(rollout, plan)
                    fleet.result.explanations.append(explanation)
                    for name, target in plan.targets.items():
                        fleet.result.counts[name].append(target)
                rollout, actions = advance(rollout, progress)
                fleet.act(actions)
    fleet.charge()
    fleet.result.duration_s, fleet.result.num_unfinished = fleet.now_s, fleet.num_under_way()
    return fleet.result
