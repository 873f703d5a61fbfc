"""Eight faults of NVIDIA Dynamo's planner (github.com/ai-dynamo/dynamo), as scenarios that must not happen here."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation
from tests.planner.scaling.fakes import COSTS, FakeCluster, Loop, act, explained, pool, repeat, samples


def test_a_load_between_two_sizes_does_not_oscillate() -> None:
    """dynamo issue 9294: a pool went 2, 1, 2, 1 for ever, since the load looked small as soon as two workers shared it.

    Four hours of a load that one worker just misses and two have plenty of room for."""
    rng = random.Random(1)

    def demand(now_s: float) -> dict[str, dict[str, object]]:
        return {"prefill": {"arrivals_per_s": max(0.0, 9.5 + rng.gauss(0, 1.0))}}

    loop = Loop(act(), [pool()], FakeCluster({"prefill": 1}).start_with({"prefill": 2}), demand).run(4 * 3600)
    assert {plan.targets["prefill"] for plan in loop.plans} <= {1, 2}
    assert loop.reversals("prefill") <= 1


def test_a_rebalance_is_one_plan_and_stays_within_the_budget() -> None:
    """dynamo issue 12428: prefill 4 -> 2 and decode 4 -> 6 were sent as two updates, and for a while ten GPUs of eight
    were in use.

    The pools have different shapes here, so nothing flips: decode starts only what retired prefill workers left."""
    demand = {"prefill": {"arrivals_per_s": 11.0}, "decode": {"arrivals_per_s": 50.0}}
    templates = [pool("prefill"), pool("decode", fingerprint="other")]
    cluster = FakeCluster({"prefill": 1, "decode": 1}).start_with({"prefill": 4, "decode": 4})
    loop = Loop(act(max_gpus=8, down_delay_s=60), templates, cluster, lambda now_s: demand).run(900)
    assert cluster.most_gpus <= 8
    assert loop.plans[-1].num_gpus == 8
    assert cluster.ready("decode") == loop.plans[-1].targets["decode"] > 4
    assert cluster.ready("prefill") == loop.plans[-1].targets["prefill"] < 4


def test_a_clamp_moves_no_pool_against_what_it_wanted() -> None:
    """dynamo issue 13064: (10 prefill, 1 decode) was clamped into (2 prefill, 4 decode).

    Prefill wants many more than the budget has; decode, which wants fewer, gets none of its GPUs."""
    seen = [
        pool("prefill", num_ready=3, arrivals_per_s=90.0, fingerprint="a"),
        pool("decode", num_ready=3, arrivals_per_s=1.0, fingerprint="b"),
    ]
    plan, _, explanation = repeat(seen, act(max_gpus=6), 400)
    assert plan.targets["prefill"] >= 3
    assert plan.targets["decode"] <= 3
    assert plan.num_gpus <= 6
    assert explained(explanation, "prefill").binding == "budget"


def test_cold_workers_do_not_teach_the_step_cost() -> None:
    """dynamo issue 12430: steps of workers that were still compiling entered the regression, and the planner asked for
    too many workers.

    Steps of young workers that take twice as long leave the plan as it was."""
    cold = samples(COSTS["prefill"], worker_age_s=5.0, factor=2.0)
    seen = pool(num_ready=3, arrivals_per_s=36.0)
    plans = [
        repeat([dataclasses.replace(seen, step_samples=seen.step_samples + extra)], act(), 120)[0]
        for extra in ((), cold)
    ]
    assert plans[0].targets == plans[1].targets
    warm = tuple(dataclasses.replace(sample, worker_age_s=60.0) for sample in cold)
    learned, _, _ = repeat([dataclasses.replace(seen, step_samples=seen.step_samples + warm)], act(), 120)
    assert learned.targets["prefill"] > plans[0].targets["prefill"]  # the same steps of warm workers do count


def test_a_pending_worker_does_not_block_the_shrink() -> None:
    """dynamo issue 14251: one worker that could not start kept the pool from shrinking for an hour.

    The pending one is given up first, then ready ones go."""
    cluster = FakeCluster({"prefill": 1}, most_nodes_gpus=5).start_with({"prefill": 5})
    cluster.replicas["prefill"] = 6
    cluster._add("prefill")
    loop = Loop(act(), [pool(arrivals_per_s=0.5)], cluster).run(420)
    assert loop.plans[-1].targets["prefill"] < 5
    assert all(worker.status != "starting" for worker in cluster.workers)
    assert cluster.ready("prefill") < 5


@pytest.mark.parametrize("mean", [math.nan, 0.0])
def test_no_traffic_shrinks_though_means_of_nothing_are_nan(mean: float) -> None:
    """dynamo issue 6985: without requests the mean prompt was NaN, every comparison false, and nothing was retired."""
    nothing = {
        "uncached_tokens_mean": mean,
        "uncached_tokens_square_mean": mean,
        "context_tokens_mean": mean,
        "output_tokens_mean": mean,
        "interarrival_cv2": mean,
        "ttft_mean_s": mean,
        "tpot_mean_s": mean,
        "step_samples": (),
    }
    cluster = FakeCluster({"prefill": 1, "decode": 1}).start_with({"prefill": 4, "decode": 4})
    loop = Loop(act(), [pool("prefill", **nothing), pool("decode", **nothing)], cluster).run(1200)
    assert loop.plans[-1].targets == {"prefill": 1, "decode": 1}
    assert len(cluster.workers) == 2


def test_a_shrink_ends_no_stream() -> None:
    """dynamo issue 13559: the worker that scale-down chose still had streams.

    Serve is asked for fewer only once the worker that it will end has drained, which takes two minutes here."""
    cluster = FakeCluster({"decode": 1}, drain_s=120.0).start_with({"decode": 4})
    Loop(act(), [pool("decode", arrivals_per_s=0.1)], cluster).run(1200)
    assert cluster.ended_while_serving == []
    assert len(cluster.workers) == 1
    drained = cluster.history.index("decode-4 drained")
    assert cluster.history.index("SetReplicas(pool='decode', num_replicas=3)") > drained


def test_a_count_set_by_hand_is_left_alone() -> None:
    """dynamo issue 4420: the planner undid what an operator had set, at its next interval.

    The pinned pool stays at five whatever the load, takes part in no flip, and its GPUs count for the budget."""
    seen = Observation(
        (
            pool("prefill", num_ready=5, arrivals_per_s=0.1, pinned_workers=5),
            pool("decode", num_ready=1, arrivals_per_s=60.0),
        )
    )
    config, state = act(max_gpus=8), ScalingState()
    for tick in range(60):
        plan, state, explanation = decide(seen, state, 10.0 * tick, config)
        assert plan.targets["prefill"] == 5
        assert plan.flips == ()
    assert plan.targets["decode"] == 3
    assert explained(explanation, "prefill").binding == "pinned"
    assert explained(explanation, "prefill").reason == "an operator set 5"


@pytest.mark.parametrize(("count", "target"), [(0, 2), (9, 4), (10**9, 4)])
def test_a_count_set_by_hand_stays_within_limits_that_changed_since(count: int, target: int) -> None:
    seen = [pool("prefill", num_ready=3, min_workers=2, max_workers=4, pinned_workers=count)]
    plan, _, explanation = repeat(seen, act(), 0)
    assert plan.targets == {"prefill": target}
    reason = f"an operator set {count}, but the pool has from 2 to 4 workers"
    assert (explained(explanation, "prefill").binding, explained(explanation, "prefill").reason) == ("pinned", reason)
