"""The simulated fleet: nothing is lost, the budget holds, and the policies keep what they promise there."""

from __future__ import annotations

import dataclasses
import random

import pytest

from costs.step_time import StepCost
from planner.fleet.parts import FleetPool, FleetResult
from planner.fleet.simulation import simulate
from planner.scaling.config import AutoscalingConfig
from planner.trace import TraceRequest

PREFILL = FleetPool(name="prefill", role="prefill", cost=StepCost(0.01, 5e-5, 0.0, 0.0), startup_s=60.0, workers=2)
DECODE = FleetPool(name="decode", role="decode", cost=StepCost(0.01, 0.0, 2e-4, 1e-8), startup_s=60.0, workers=2)


def poisson(rates: list[tuple[float, float]], seed: int = 0, output: int = 150) -> list[TraceRequest]:
    """Phases of (seconds, requests a second)."""
    rng, now_s, end_s, trace = random.Random(seed), 0.0, 0.0, []
    for seconds, rate in rates:
        end_s += seconds
        while now_s < end_s:
            now_s += rng.expovariate(rate)
            trace.append(TraceRequest(now_s, 1 + int(rng.expovariate(1 / 800)), 2 + int(rng.expovariate(1 / output))))
    return trace


def played(
    rates: list[tuple[float, float]], policy: str = "slo", seed: int = 0, **changes: object
) -> tuple[list[TraceRequest], FleetResult]:
    trace = poisson(rates, seed)
    base = AutoscalingConfig(mode="act", policy=policy, max_gpus=16)
    config = dataclasses.replace(base, **changes)  # type: ignore[arg-type]
    return trace, simulate(trace, [PREFILL, DECODE], config, seed=seed)


def test_the_same_seed_gives_the_same() -> None:
    first, again = (played([(300, 6.0)])[1] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("policy", ["slo", "queue_depth", "fixed"])
def test_every_request_ends_and_the_budget_holds(policy: str) -> None:
    trace, result = played([(200, 4.0), (200, 25.0), (400, 2.0)], policy, max_gpus=6, down_delay_s=60.0)
    assert len(result.ttft_s) == len(trace)
    assert result.most_gpus <= 6
    assert result.num_killed_streams == 0


def test_a_worker_that_does_not_drain_in_time_has_its_streams_moved_and_counted() -> None:
    """Outputs last for minutes, and a drain five seconds: streams go on elsewhere, none is lost or cut by Serve."""
    trace = poisson([(120, 6.0), (600, 0.3)], output=4000)
    pools = [PREFILL, dataclasses.replace(DECODE, workers=6, drain_timeout_s=5.0, startup_s=20.0)]
    config = AutoscalingConfig(mode="act", policy="queue_depth", max_gpus=16, down_delay_s=30.0)
    result = simulate(trace, pools, config)
    assert result.num_moved_streams > 0
    assert result.num_killed_streams == 0
    assert len(result.ttft_s) == len(trace)


@pytest.mark.parametrize("seed", range(3))
def test_constant_load_turns_round_at_most_once(seed: int) -> None:
    """An hour of the same Poisson rate; both pools start with two workers."""
    _, result = played([(3600, 7.0 + 2 * seed)], seed=seed)
    assert result.reversals("prefill") <= 1
    assert result.reversals("decode") <= 1


def test_slo_keeps_its_objectives_with_fewer_gpus_than_it_may_have() -> None:
    _, result = played([(900, 8.0), (900, 16.0), (900, 8.0)])
    assert result.attainment(0.5, 0.05) >= 0.9
    assert result.gpu_s < 8 * result.duration_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_phases(seed: int) -> None:
    """Any demand, policy, budget and drain: nothing is lost, no stream is cut, the budget holds."""
    rng = random.Random(seed)
    phases = [(rng.uniform(60, 600), rng.uniform(0.5, 30)) for _ in range(rng.randrange(1, 7))]
    trace = poisson(phases, seed, rng.choice([50, 300, 1500]))
    drain_s, budget = rng.choice([2.0, 60.0, 300.0]), rng.randrange(4, 17)
    pools = [dataclasses.replace(pool, drain_timeout_s=drain_s) for pool in (PREFILL, DECODE)]
    policy = rng.choice(["slo", "queue_depth"])
    config = AutoscalingConfig(mode="act", policy=policy, max_gpus=budget, down_delay_s=rng.choice([30.0, 300.0]))
    result = simulate(trace, pools, config, seed=seed)
    assert result.most_gpus <= budget
    assert result.num_killed_streams == 0
    assert len(result.ttft_s) + result.num_unfinished == len(trace)
