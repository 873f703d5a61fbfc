"""Decisions: bad input, limits, modes, damping, flips, and properties over random traces."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation, PoolObservation
from tests.planner.scaling.fakes import FakeCluster, Loop, act, explained, pool, repeat

IDLE = {"num_waiting": 0, "num_running": 0, "arrivals_per_s": 0.0}


# ---- what may not be concluded from


def test_fresh_zero_goes_to_the_minimum() -> None:
    """Nothing arrives and the figures are fresh: after the down window one worker is left, in steps."""
    plan, _, explanation = repeat([pool(num_ready=1, **IDLE)], act(), 0)
    assert plan.targets == {"prefill": 1}
    loop = Loop(act(), [pool(**IDLE)], FakeCluster({"prefill": 1}).start_with({"prefill": 6}))
    loop.run(1200)
    assert loop.plans[-1].targets == {"prefill": 1}
    assert explained(loop.explanations[-1], "prefill").binding == "minimum"
    assert explained(explanation, "prefill").reason.startswith("at least 1 workers")


def test_stale_metrics_hold() -> None:
    plan, _, explanation = repeat([pool(num_ready=6, metrics_age_s=31.0, **IDLE)], act(), 3600)
    assert plan.targets == {"prefill": 6}
    assert explained(explanation, "prefill").binding == "hold"
    assert explained(explanation, "prefill").reason == "metrics are 31 s old, more than 30 s"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize(
    "name",
    [
        *("arrivals_per_s", "num_queued_tokens", "metrics_age_s", "startup_s", "interarrival_cv2", "queue_imbalance"),
        *("uncached_tokens_mean", "uncached_tokens_square_mean", "context_tokens_mean", "output_tokens_mean"),
        *("handoff_s", "kv_bytes_per_token", "link_bytes_per_s"),
    ],
)
def test_a_figure_that_is_no_number_holds_and_is_named(name: str, value: float) -> None:
    busy = dataclasses.replace(pool(num_ready=3, arrivals_per_s=5.0), **{name: value})
    plan, _, explanation = repeat([busy], act(), 600)
    assert plan.targets == {"prefill": 3}
    assert explained(explanation, "prefill").reason == f"{name} is {value}"


def test_a_hold_starts_the_down_window_anew() -> None:
    """Four minutes of few requests, one stale observation, one minute of few: five minutes are not known."""
    config, quiet = act(), pool(num_ready=6, arrivals_per_s=0.5)
    _, state, _ = repeat([quiet], config, 240)
    _, state, _ = repeat([dataclasses.replace(quiet, metrics_age_s=99.0)], config, 0, state, 250.0)
    plan, state, _ = repeat([quiet], config, 100, state, 260.0)
    assert plan.targets == {"prefill": 6}
    plan, _, _ = repeat([quiet], config, 240, state, 370.0)
    assert plan.targets["prefill"] < 6


def test_a_pause_is_not_a_window() -> None:
    """The autoscaler was away for an hour: one quiet observation is no proof of a quiet hour."""
    config, quiet = act(), pool(num_ready=6, arrivals_per_s=0.5)
    _, state, _ = repeat([quiet], config, 60)
    plan, _, _ = repeat([quiet], config, 60, state, 3600.0)
    assert plan.targets == {"prefill": 6}


def test_without_measured_steps_slo_holds() -> None:
    _, _, explanation = repeat([pool(arrivals_per_s=50.0, step_samples=())], act(), 60)
    assert explained(explanation, "prefill").reason == "step costs are not measured yet: 0 samples"


# ---- modes and limits


def test_off_makes_no_plan_of_its_own() -> None:
    plan, _, explanation = repeat([pool(num_ready=2, arrivals_per_s=90.0)], AutoscalingConfig(), 600)
    assert (plan.targets, plan.steps) == ({"prefill": 2}, ())
    assert explained(explanation, "prefill").binding == "off"


def test_advice_is_the_plan_that_acting_would_carry_out() -> None:
    busy = [pool(num_ready=2, arrivals_per_s=90.0)]
    advised, acted = (repeat(busy, AutoscalingConfig(mode=mode), 60) for mode in ("advise", "act"))
    assert advised[0] == acted[0]
    assert advised[0].steps
    assert (advised[2].mode, acted[2].mode) == ("advise", "act")


def test_the_pools_maximum_is_kept_and_named() -> None:
    plan, _, explanation = repeat([pool(num_ready=2, max_workers=3, arrivals_per_s=90.0)], act(), 60)
    assert plan.targets == {"prefill": 3}
    assert explained(explanation, "prefill").binding == "maximum"


def test_fixed_asks_for_the_configured_number_again() -> None:
    """A redeployment left one worker of four."""
    plan, _, _ = repeat([pool(num_ready=1, configured_workers=4)], act(policy="fixed"), 60)
    assert plan.targets == {"prefill": 4}


@pytest.mark.parametrize(("requests", "expected"), [(4, 2), (5, 3), (7, 4)])
def test_queue_depth_is_requests_over_target(requests: int, expected: int) -> None:
    """ceil(requests / 2) prefill workers, from two."""
    seen = pool(num_ready=2, num_waiting=requests - 1, num_running=1, arrivals_per_s=1.0)
    plan, _, explanation = repeat([seen], act(policy="queue_depth"), 60)
    assert plan.targets == {"prefill": expected}
    assert explained(explanation, "prefill").terms == {
        "requests": requests,
        "requests_per_worker": requests / 2,
        "target_per_worker": 2.0,
    }


def test_one_worker_of_each_role_stays_or_one_mixed() -> None:
    """Idle, with min_workers 0: prefill and decode keep one each; beside a mixed pool that keeps one, they may go."""
    pair = [pool(role, min_workers=0, num_ready=2, **IDLE) for role in ("prefill", "decode")]
    plan, _, _ = repeat(pair, act(), 400)
    assert plan.targets == {"prefill": 1, "decode": 1}
    plan, _, _ = repeat([*pair, pool("mixed", **IDLE)], act(), 400)
    assert plan.targets == {"prefill": 1, "decode": 1, "mixed": 1}  # one step each; the last ones go next
    alone = [dataclasses.replace(p, num_ready=1) for p in pair]
    plan, _, _ = repeat([*alone, pool("mixed", **IDLE)], act(), 400)
    assert plan.targets == {"prefill": 0, "decode": 0, "mixed": 1}


def test_every_plan_names_what_binds_with_terms_in_ms_and_gpus() -> None:
    seen = [
        pool("prefill", num_ready=2, gpus_per_worker=4, arrivals_per_s=40.0),
        pool("decode", num_ready=2, gpus_per_worker=4, arrivals_per_s=40.0),
    ]
    _, _, explanation = repeat(seen, act(), 60)
    for part in explanation.pools:
        assert part.binding in ("ttft", "utilisation", "tpot", "max_num_seqs")
        assert part.num_gpus == 8
        assert part.target_gpus == 4 * part.target
        assert part.terms
        assert any(name.endswith("_ms") for name in part.terms)
    assert explanation.num_gpus == 16
    assert explanation.target_gpus == sum(part.target_gpus for part in explanation.pools)


# ---- damping


def test_growth_waits_for_a_short_sustained_need() -> None:
    config, quiet = act(), pool(num_ready=2, arrivals_per_s=10.0)
    _, state, _ = repeat([quiet], config, 60)
    busy = dataclasses.replace(quiet, num_queued_tokens=3e7)
    plan, state, _ = repeat([busy], config, 10, state, 70.0)
    assert plan.targets == {"prefill": 2}
    plan, _, _ = repeat([busy], config, 0, state, 90.0)
    assert plan.targets["prefill"] > 2


def test_a_shrink_keeps_a_margin_of_arrivals() -> None:
    """8 workers stay while 1 / 0.8 times the arrivals would still need them, though fewer would do for the arrivals."""
    seen = pool(num_ready=8, arrivals_per_s=68.0)
    plan, _, explanation = repeat([seen], act(), 600)
    assert plan.targets == {"prefill": 8}
    assert "7 needed, 8 enough" in explained(explanation, "prefill").reason
    plan, _, _ = repeat([dataclasses.replace(seen, arrivals_per_s=50.0)], act(), 600)
    assert plan.targets["prefill"] < 8


def test_a_lull_shorter_than_the_window_shrinks_nothing() -> None:
    """Every four minutes a burst needs all six workers: the down window of five minutes always has one in it."""
    config, state = act(), ScalingState()
    for tick in range(200):
        rate = 60.0 if tick % 24 == 0 else 2.0
        seen = Observation((pool(num_ready=6, arrivals_per_s=rate),))
        plan, state, _ = decide(seen, state, 10.0 * tick, config)
        assert plan.targets == {"prefill": 6}


def test_a_shrink_waits_at_least_as_long_as_a_start_takes() -> None:
    slow = pool(num_ready=6, arrivals_per_s=0.5, startup_s=900.0)
    plan, state, _ = repeat([slow], act(), 890)
    assert plan.targets == {"prefill": 6}
    plan, _, _ = repeat([slow], act(), 20, state, 900.0)
    assert plan.targets == {"prefill": 5}


@pytest.mark.parametrize("seed", range(8))
def test_at_most_one_reversal_under_constant_load(seed: int) -> None:
    """Two hours of Poisson arrivals whose mean lies near a step of the formula, from any count of workers."""
    rng = random.Random(seed)
    rate = rng.uniform(5, 40)

    def demand(now_s: float) -> dict[str, dict[str, object]]:
        counted = sum(rng.random() < rate / 100 for _ in range(1000)) / 10
        return {name: {"arrivals_per_s": counted} for name in ("prefill", "decode")}

    start = {name: rng.randrange(1, 9) for name in ("prefill", "decode")}
    cluster = FakeCluster({"prefill": 1, "decode": 1}).start_with(start)
    loop = Loop(act(), [pool("prefill"), pool("decode")], cluster, demand).run(7200)
    assert loop.reversals("prefill") <= 1
    assert loop.reversals("decode") <= 1


def test_a_load_that_comes_and_goes_is_followed_less_and_less() -> None:
    """A minute of five times the load every eight minutes: the pool shrinks between bursts once or twice, then waits
    longer before it does; without the longer windows it would turn round 58 times in four hours."""

    def demand(now_s: float) -> dict[str, dict[str, object]]:
        return {"prefill": {"arrivals_per_s": 20.0 if now_s % 480 < 60 else 4.0}}

    loop = Loop(act(), [pool()], FakeCluster({"prefill": 1}).start_with({"prefill": 2}), demand).run(4 * 3600)
    assert loop.reversals("prefill") < 15


# ---- flips


def test_flips_come_before_starts() -> None:
    """Decode needs two more workers and prefill has had two too many for a minute: they change their role."""
    seen = [pool("prefill", num_ready=6, arrivals_per_s=8.0), pool("decode", num_ready=1, arrivals_per_s=8.0)]
    plan, _, explanation = repeat(seen, act(), 70)
    ((source, to, count),) = plan.flips
    assert (source, to) == ("prefill", "decode")
    assert count >= 1
    assert plan.steps[0].kind == "flip"
    assert f"{count} from prefill" in explained(explanation, "decode").reason


@pytest.mark.parametrize("change", [{"tp": 2, "gpus_per_worker": 2}, {"pp": 2}, {"fingerprint": "other"}])
def test_workers_of_another_shape_or_model_do_not_flip(change: dict[str, object]) -> None:
    seen = [
        pool("prefill", num_ready=6, arrivals_per_s=8.0),
        pool("decode", num_ready=1, arrivals_per_s=8.0, **change),
    ]
    plan, _, _ = repeat(seen, act(), 70)
    assert plan.flips == ()
    assert plan.targets["decode"] > 1


# ---- nodes that cannot be had


def test_a_plan_that_nodes_cannot_carry_is_not_reached_and_asks_for_no_more() -> None:
    """Two of the nodes do not come: after ten minutes the plan says how many are missing, and does not grow while the
    need does."""
    rates = {"prefill": {"arrivals_per_s": 40.0}}
    cluster = FakeCluster({"prefill": 1}, most_nodes_gpus=3).start_with({"prefill": 1})
    loop = Loop(act(), [pool()], cluster, lambda now_s: rates).run(900)
    asked = loop.plans[-1].targets["prefill"]
    part = explained(loop.explanations[-1], "prefill")
    assert asked > 3
    assert all(explained(earlier, "prefill").num_missing == 0 for earlier in loop.explanations[:60])
    assert (part.binding, part.num_missing) == ("not_reached", asked - 3)
    rates["prefill"] = {"arrivals_per_s": 120.0}
    loop.run(600)
    part = explained(loop.explanations[-1], "prefill")
    assert loop.plans[-1].targets["prefill"] == asked
    assert part.num_missing == asked - 3
    assert f"{asked - 3} workers are not to be had" in part.reason
    cluster.most_nodes_gpus = 1000  # the nodes come after all, and the policy goes on
    loop.run(600)
    assert cluster.ready("prefill") > asked


# ---- properties

figures = st.one_of(st.floats(0, 200), st.sampled_from([0.0, math.nan, math.inf, -1.0]))


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Anything that metrics might say."""
    roles = draw(st.sampled_from([("prefill", "decode"), ("mixed",), ("prefill", "decode", "mixed")]))
    return Observation(tuple(draw(_pools(role)) for role in roles))


@st.composite
def _pools(draw: st.DrawFn, role: str) -> PoolObservation:
    count = st.integers(0, 6)
    return pool(
        role,
        min_workers=draw(st.integers(0, 2)),
        max_workers=draw(st.integers(2, 12)),
        num_ready=draw(count),
        num_starting=draw(count),
        num_flipping_in=draw(st.integers(0, 2)),
        num_draining=draw(st.integers(0, 2)),
        metrics_age_s=draw(st.sampled_from([0.0, 5.0, 99.0, math.nan])),
        arrivals_per_s=draw(figures),
        uncached_tokens_mean=draw(figures),
        num_waiting=draw(st.integers(0, 300)),
        num_running=draw(st.integers(0, 300)),
        num_queued_tokens=draw(figures),
        pinned_workers=draw(st.sampled_from([None, None, None, 3])),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(observations(), min_size=1, max_size=12), st.sampled_from(["slo", "queue_depth", "fixed"]))
def test_any_observations_give_a_plan_within_limits(seen: list[Observation], policy: str) -> None:
    """No input raises; targets never lie beyond a pool's maximum or what it has; the same input gives the same plan."""
    config, state, now_s = act(policy=policy), ScalingState(), 0.0
    for observation in seen:
        now_s += 10.0
        first, again = (decide(observation, state, now_s, config) for _ in range(2))
        assert (first[0], first[1].plan) == (again[0], again[1].plan)
        plan, state, explanation = first
        assert plan.targets.keys() == {p.name for p in observation.pools}
        assert len(explanation.pools) == len(observation.pools)
        for p in observation.pools:
            assert 0 <= plan.targets[p.name] <= max(p.max_workers, p.num_workers, p.min_workers, p.pinned_workers or 0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 60), st.floats(0, 60), st.integers(60, 400)), min_size=1, max_size=6),
    st.integers(4, 24),
    st.integers(0, 120),
    st.sampled_from(["slo", "queue_depth"]),
)
def test_the_budget_is_never_exceeded_over_random_traces(
    phases: list[tuple[float, float, int]], max_gpus: int, drain_s: int, policy: str
) -> None:
    """Demand that jumps between phases: all GPUs that exist, starting and draining ones too, stay within the budget,
    and no worker ends while it serves.
    """
    until, ends = [], 0
    for prefill, decode, seconds in phases:
        ends += seconds
        until.append((ends, prefill, decode))

    def demand(now_s: float) -> dict[str, dict[str, object]]:
        _, prefill, decode = next((phase for phase in until if now_s < phase[0]), until[-1])
        return {
            "prefill": {"arrivals_per_s": prefill, "num_waiting": int(prefill / 4)},
            "decode": {"arrivals_per_s": decode, "num_running": int(decode * 4)},
        }

    cluster = FakeCluster({"prefill": 1, "decode": 2}, drain_s=float(drain_s)).start_with({"prefill": 1, "decode": 1})
    templates = [pool("prefill"), pool("decode", gpus_per_worker=2, tp=2)]
    Loop(act(max_gpus=max_gpus, down_delay_s=60.0, policy=policy), templates, cluster, demand).run(ends)
    assert cluster.most_gpus <= max_gpus
    assert cluster.ended_while_serving == []
