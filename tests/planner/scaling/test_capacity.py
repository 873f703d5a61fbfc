"""How many workers the formulas ask for, and what binds."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costs.step_time import StepCost
from planner.scaling.capacity import Objectives, prefill_service, workers_for
from planner.scaling.queueing import normal_quantile, wait_quantile_s
from tests.planner.scaling.fakes import COSTS, pool

OBJECTIVES = Objectives(
    ttft_s=0.5,
    ttft_quantile=0.95,
    tpot_s=0.05,
    tpot_quantile=0.95,
    headroom=0.1,
    max_utilisation=0.8,
    recovery_s=30.0,
)


def test_prefill_workers_are_the_least_that_keep_to_ttft() -> None:
    """By hand: one less misses the objective, with the wait of the queueing formula and the long prompt's own time."""
    seen, arrivals = pool("prefill"), 30.0
    found = workers_for(seen, arrivals, COSTS["prefill"], OBJECTIVES)
    service = prefill_service(seen, COSTS["prefill"])
    own_s = service.quantile_s(0.95)
    for count, holds in ((found.num_workers, True), (found.num_workers - 1, False)):
        ttft_s = wait_quantile_s(count, arrivals, service, 0.95) + own_s
        assert (ttft_s <= 0.5 and arrivals * service.mean_s / count <= 0.8) is holds
    assert found.terms["ttft_ms"] <= found.terms["ttft_objective_ms"] == 500.0


def test_decode_workers_follow_littles_law() -> None:
    """D = ceil((N + z sqrt N) / b), with N = arrivals x tokens x step and b the batch that keeps to TPOT."""
    found = workers_for(
        pool("decode", max_num_seqs=1000, kv_blocks_per_worker=10**6), 54.0, COSTS["decode"], OBJECTIVES
    )
    per_stream_s = 2e-4 + 1e-8 * 1100
    batch = math.floor((0.045 - 0.01) / per_stream_s)
    streams = 54.0 * 200 * (0.01 + per_stream_s * batch)
    expected = math.ceil((streams + normal_quantile(0.95) * math.sqrt(streams)) / batch)
    assert (found.num_workers, found.binding) == (expected, "tpot")
    assert expected == math.ceil(streams / batch) + 1  # the quantile costs one worker here
    assert found.terms["batch"] == batch


@pytest.mark.parametrize(
    ("role", "changes", "binding"),
    [
        ("prefill", {"num_queued_tokens": 5e6}, "queue"),
        ("prefill", {"kv_bytes_per_token": 1e6, "link_bytes_per_s": 1e9}, "link"),
        ("decode", {"kv_blocks_per_worker": 500}, "kv_blocks"),
        ("decode", {"max_num_seqs": 4}, "max_num_seqs"),
        ("decode", {"max_num_seqs": 1000}, "tpot"),
        ("mixed", {"kv_blocks_per_worker": 150}, "kv_blocks"),
        ("mixed", {"num_queued_tokens": 5e6}, "queue"),
        ("mixed", {"max_num_seqs": 2}, "max_num_seqs"),
    ],
)
def test_the_constraint_that_binds_is_named(role: str, changes: dict[str, object], binding: str) -> None:
    assert workers_for(pool(role, **changes), 10.0, COSTS[role], OBJECTIVES).binding == binding


def test_rate_and_stock_are_separate_bounds() -> None:
    """The same streams with a tenth of the KV blocks: KV blocks limit the batch, and the terms name both limits."""
    terms = workers_for(pool("decode", kv_blocks_per_worker=500), 10.0, COSTS["decode"], OBJECTIVES).terms
    assert terms["batch"] == math.floor(terms["batch_by_kv_blocks"]) < terms["batch_by_tpot"]


def test_an_objective_that_nothing_reaches_is_named_and_does_not_ask_for_all() -> None:
    """A long prompt alone takes longer than the objective: more workers do not help it."""
    slow = pool("prefill", uncached_tokens_mean=20_000.0, uncached_tokens_square_mean=5e8)
    found = workers_for(slow, 1.0, COSTS["prefill"], OBJECTIVES)
    assert found.unreachable.startswith("ttft: a prompt at the 95% quantile alone takes")
    assert found.num_workers < 10
    steep = StepCost(0.06, 0.0, 1e-4, 0.0)
    assert workers_for(pool("decode"), 1.0, steep, OBJECTIVES).unreachable.startswith("tpot: one stream alone")
    assert "tpot" in workers_for(pool("mixed"), 1.0, steep, OBJECTIVES).unreachable


def test_prefix_hits_spare_prefill_only() -> None:
    """Half of each prompt cached: fewer prefill workers, and as many decode workers, whose contexts stay as long."""
    halved = {"uncached_tokens_mean": 500.0, "uncached_tokens_square_mean": 3e5}
    few, many = (workers_for(pool("prefill", **c), 60.0, COSTS["prefill"], OBJECTIVES) for c in (halved, {}))
    assert few.num_workers < many.num_workers
    same = [workers_for(pool("decode", **c), 60.0, COSTS["decode"], OBJECTIVES) for c in (halved, {})]
    assert same[0] == same[1]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["prefill", "decode", "mixed"]), st.floats(0, 300), st.floats(1, 3))
def test_more_arrivals_never_need_fewer_workers(role: str, arrivals: float, factor: float) -> None:
    seen = pool(role, num_running=1)
    counts = [workers_for(seen, a, COSTS[role], OBJECTIVES).num_workers for a in (arrivals, arrivals * factor)]
    assert counts[0] <= counts[1]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["prefill", "decode", "mixed"]), st.floats(0.1, 300), st.floats(1.1, 4))
def test_laxer_objectives_never_need_more_workers(role: str, arrivals: float, factor: float) -> None:
    lax = dataclasses.replace(OBJECTIVES, ttft_s=0.5 * factor, tpot_s=0.05 * factor)
    strict, looser = (workers_for(pool(role), arrivals, COSTS[role], o).num_workers for o in (OBJECTIVES, lax))
    assert looser <= strict + 1  # a larger batch has longer steps, so more streams at once: one worker by rounding


def test_nothing_to_do_needs_nobody() -> None:
    for role in ("prefill", "decode", "mixed"):
        assert workers_for(pool(role), 0.0, COSTS[role], OBJECTIVES).num_workers == 0
