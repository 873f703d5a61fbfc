"""Lessons of other autoscalers (llm-d, AIBrix, KEDA, Ray Serve), each as a scenario."""

from __future__ import annotations

import dataclasses

import pytest

from costs.step_time import StepCostFit
from planner.scaling.observation import PoolObservation
from planner.scaling.step_cost import measured
from tests.planner.scaling.fakes import COSTS, FakeCluster, Loop, act, explained, pool, repeat, samples


def test_capacity_is_a_rate_where_the_limit_is_a_rate() -> None:
    """llm-d issue 1500: requests were dropped at 16 % KV use while "headroom" asked for fewer replicas.

    Prefill is out of compute with most KV blocks free: it grows, and names the time as its limit."""
    seen = pool("prefill", num_ready=2, arrivals_per_s=40.0, num_kv_blocks_used=0.16 * 40_000)
    plan, _, explanation = repeat([seen], act(), 60)
    assert plan.targets["prefill"] > 2
    assert explained(explanation, "prefill").binding in ("ttft", "utilisation")


def test_full_kv_blocks_alone_do_not_grow_a_pool() -> None:
    """llm-d issue 927: with tiers a cache is always near 100 % full; a policy on KV use grew for ever.

    The blocks are full of what may be evicted, and the load is small: the pool shrinks as with empty ones."""
    full = [pool("decode", num_ready=4, arrivals_per_s=1.0, num_kv_blocks_used=share * 80_000) for share in (0.0, 1.0)]
    plans = [repeat([seen], act(), 400)[0] for seen in full]
    assert plans[0].targets == plans[1].targets
    assert plans[1].targets["decode"] < 4


def test_pending_workers_are_counted() -> None:
    """llm-d-autoscaler issue 549: replicas that were starting were not counted, and each round asked for them again.

    A start takes ten minutes; the number that was asked for first is enough all the time."""
    demand = {"prefill": {"arrivals_per_s": 30.0}}
    cluster = FakeCluster({"prefill": 1}, startup_s=590.0).start_with({"prefill": 1})
    loop = Loop(act(), [pool(startup_s=590.0)], cluster, lambda now_s: demand).run(580)
    targets = {plan.targets["prefill"] for plan in loop.plans}
    assert len(targets) == 2
    assert len(cluster.workers) == max(targets) == loop.plans[-1].targets["prefill"]
    part = explained(loop.explanations[-1], "prefill")
    assert (part.num_workers, part.num_gpus) == (max(targets), max(targets))


def test_a_short_budget_keeps_the_ratio_of_prefill_to_decode() -> None:
    """llm-d issue 1212: pools were scaled one by one, and the first one took the GPUs of the other.

    Both need about twice what the budget has; both get about the same share of their need."""
    seen = [
        pool("prefill", num_ready=2, arrivals_per_s=110.0, fingerprint="a"),
        pool("decode", num_ready=2, arrivals_per_s=110.0, fingerprint="b"),
    ]
    wanted, _, _ = repeat([dataclasses.replace(p, num_ready=8) for p in seen], act(max_gpus=100), 60)
    got, _, _ = repeat([dataclasses.replace(p, num_ready=3) for p in seen], act(max_gpus=10), 60)
    assert got.num_gpus == 10
    shares = [got.targets[name] / wanted.targets[name] for name in ("prefill", "decode")]
    assert max(shares) - min(shares) <= 1 / min(wanted.targets.values())


def test_the_cost_of_a_step_is_fitted_not_assumed() -> None:
    """llm-d WVA's old model ITL = alpha + beta x batch held for its profile only: here both are measured, with context.

    The same load on workers that turn out twice as slow needs more of them."""
    cost = measured(StepCostFit(), samples(COSTS["decode"]), 0).cost()
    assert cost is not None
    assert cost.step_s(0, 16, 20_000) == pytest.approx(COSTS["decode"].step_s(0, 16, 20_000), rel=0.01)
    fast = pool("decode", num_ready=2, arrivals_per_s=20.0)
    slow = dataclasses.replace(fast, step_samples=samples(COSTS["decode"], factor=2.0))
    targets = [repeat([seen], act(), 60)[0].targets["decode"] for seen in (fast, slow)]
    assert targets[0] < targets[1]


def test_within_the_tolerance_queue_depth_stays() -> None:
    """AIBrix and HPA: ceil(n x use / target) moves only outside a tolerance, here 10 %."""
    config = act(policy="queue_depth")
    within = pool(num_ready=10, num_running=20, num_waiting=1, arrivals_per_s=1.0)
    assert repeat([within], config, 60)[0].targets == {"prefill": 10}
    beyond = dataclasses.replace(within, num_waiting=3)
    assert repeat([beyond], config, 60)[0].targets == {"prefill": 12}


def test_the_rate_of_change_is_capped() -> None:
    """AIBrix: a wrong figure must not empty a pool or fill the cluster at once.

    Down by a quarter in one decision, up by no more than twice (or four workers)."""
    plan, _, _ = repeat([pool(num_ready=16, arrivals_per_s=0.1)], act(), 310)
    assert plan.targets == {"prefill": 12}
    plan, _, explanation = repeat([pool(num_ready=6, max_workers=99, arrivals_per_s=500.0)], act(), 60)
    assert plan.targets == {"prefill": 12}
    assert "grown step by step" in explained(explanation, "prefill").reason


def test_processor_use_is_not_observed() -> None:
    """Nobody scales on the use of CPU or GPU with success: it is near 100 % from one stream to a full batch."""
    names = PoolObservation.__dataclass_fields__
    assert not [name for name in names if "util" in name or "cpu" in name or "gpu_use" in name]


def test_activation_has_its_own_threshold() -> None:
    """KEDA separates activation from the target: a pool without workers starts one for the first request, at once,
    though a whole worker is far from needed."""
    config = act(scale_to_zero=True)
    empty = pool(min_workers=0, num_ready=0)
    assert repeat([empty], config, 60)[0].targets == {"prefill": 0}
    one = dataclasses.replace(empty, num_waiting=1, num_queued_tokens=1000.0, arrivals_per_s=0.1)
    assert repeat([one], config, 0)[0].targets == {"prefill": 1}
    assert repeat([one], dataclasses.replace(config, policy="queue_depth"), 0)[0].targets == {"prefill": 1}


def test_the_last_worker_does_not_go_together_with_others() -> None:
    """Ray Serve never goes from more than one to none in one move."""
    config = act(scale_to_zero=True, shrink_share=1.0)
    for count, expected in ((4, 1), (1, 0)):
        seen = pool(min_workers=0, num_ready=count)
        assert repeat([seen], config, 310)[0].targets == {"prefill": expected}


def test_both_roles_are_scaled_in_one_decision_with_flips() -> None:
    """Asked for everywhere (llm-d-autoscaling 250, kthena 905, aibrix 2613): prefill and decode are one plan, and
    workers change their role. Prompts become outputs: the same six GPUs serve before and after, none is started."""
    rates = {"prefill": {"arrivals_per_s": 30.0}, "decode": {"arrivals_per_s": 30.0, "output_tokens_mean": 40.0}}
    templates = [pool("prefill"), pool("decode")]
    cluster = FakeCluster({"prefill": 1, "decode": 1}).start_with({"prefill": 4, "decode": 2})
    loop = Loop(act(max_gpus=6), templates, cluster, lambda now_s: rates).run(120)
    rates["prefill"] = {"arrivals_per_s": 12.0}
    rates["decode"] = {"arrivals_per_s": 12.0, "output_tokens_mean": 600.0}
    loop.run(900)
    assert cluster.ready("decode") > 2
    assert len({worker.worker_id for worker in cluster.workers}) <= 6
    assert cluster.most_gpus <= 6
    assert not [line for line in cluster.history if line.endswith("ready in decode")]
    assert cluster.ended_while_serving == []
