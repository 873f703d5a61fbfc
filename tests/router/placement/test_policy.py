"""Placement as arithmetic: no clock, no network."""

from __future__ import annotations

import dataclasses

import pytest

from router.placement.policy import (
    POLICIES,
    Placement,
    Rates,
    Reject,
    RejectReason,
    Role,
    RouteRequest,
    WorkerView,
    cheapest,
    least_loaded,
)

RATES = Rates(prefill_ms_per_token=0.5, decode_ms_per_step=10.0, transfer_ms_per_block=0.1)


def view(worker_id: str, role: Role, **changes: object) -> WorkerView:
    idle = WorkerView(
        worker_id=worker_id,
        role=role,
        kv_fingerprint=b"a",
        block_size=16,
        num_blocks=1000,
        num_free_blocks=1000,
        num_streams=0,
        num_queued_tokens=0,
        num_cached_tokens=0,
        num_stored_tokens=0,
        rates=RATES,
    )
    return dataclasses.replace(idle, **changes)


def request(num_prompt_tokens: int = 100, **changes: object) -> RouteRequest:
    return dataclasses.replace(RouteRequest("r", num_prompt_tokens, num_output_tokens=50), **changes)


def place(*workers: WorkerView, order: RouteRequest | None = None) -> Placement:
    placement = cheapest(order or request(), workers)
    assert isinstance(placement, Placement)
    return placement


def test_prefill_and_decode_pools_share_a_request() -> None:
    placement = place(view("p", Role.PREFILL), view("d", Role.DECODE))
    assert (placement.prefill_id, placement.decode_id) == ("p", "d")
    assert placement.cost.prefill_ms == 50.0
    assert placement.cost.transfer_ms == pytest.approx(0.7)


def test_a_history_that_the_tiers_hold_goes_whole_to_a_decode_worker() -> None:
    stored = {"num_stored_tokens": 992}
    workers = [view("p", Role.PREFILL, **stored), view("d", Role.DECODE, **stored)]
    placement = place(*workers, order=request(1000))
    assert (placement.prefill_id, placement.decode_id, placement.num_uncached_tokens) == (None, "d", 8)
    assert placement.cost.prefill_ms == pytest.approx(4.0)
    assert placement.cost.transfer_ms == pytest.approx(6.2)
    longer = place(*workers, order=request(1200))  # too much to compute beside other streams
    assert (longer.prefill_id, longer.decode_id, longer.num_uncached_tokens) == ("p", "d", 208)


def test_a_short_prompt_that_nobody_has_seen_is_the_prefill_pools() -> None:
    assert place(view("p", Role.PREFILL), view("d", Role.DECODE), order=request(3)).prefill_id == "p"


def test_what_is_dearer_to_pull_than_to_compute_is_computed() -> None:
    slow = Rates(prefill_ms_per_token=0.01, decode_ms_per_step=10.0, transfer_ms_per_block=1.0)
    placement = place(view("m", Role.MIXED, num_stored_tokens=992, rates=slow), order=request(1000))
    assert placement.num_uncached_tokens == 1000
    assert placement.cost.transfer_ms == 0.0


def test_decode_workers_take_whole_requests_when_no_prefill_worker_lives() -> None:
    assert place(view("d", Role.DECODE)) == dataclasses.replace(
        place(view("d", Role.MIXED)), prefill_id=None, decode_id="d"
    )


def test_a_decode_worker_takes_whole_requests_when_the_prefill_workers_have_another_layout() -> None:
    placement = place(view("p", Role.PREFILL, kv_fingerprint=b"b"), view("d", Role.DECODE))
    assert (placement.prefill_id, placement.decode_id) == (None, "d")


@pytest.mark.parametrize("workers", [[], [view("p", Role.PREFILL)]])
def test_nobody_to_decode_is_a_reject(workers: list[WorkerView]) -> None:
    reject = cheapest(request(), workers)
    assert isinstance(reject, Reject)
    assert reject.reason is RejectReason.NO_WORKER


def test_a_prompt_that_fits_no_cache_is_a_reject() -> None:
    reject = cheapest(request(1000 * 16), [view("p", Role.PREFILL), view("d", Role.DECODE)])
    assert isinstance(reject, Reject)
    assert reject.reason is RejectReason.TOO_LARGE
    assert isinstance(cheapest(request(1000 * 16 - 1), [view("d", Role.DECODE)]), Placement)


def test_a_worker_too_small_for_the_prompt_is_passed_over() -> None:
    assert place(view("small", Role.MIXED, num_blocks=5), view("big", Role.MIXED, num_streams=50)).decode_id == "big"


@pytest.mark.parametrize(
    "burden",
    [{"num_queued_tokens": 1000}, {"num_streams": 20}, {"num_free_blocks": 0, "num_streams": 1}],
)
@pytest.mark.parametrize("order", [("busy", "idle"), ("idle", "busy")])
def test_the_idle_worker_is_cheaper(burden: dict[str, int], order: tuple[str, str]) -> None:
    views = [view(name, Role.MIXED, **(burden if name == "busy" else {})) for name in order]
    assert place(*views).decode_id == "idle"


def test_a_cached_prefix_is_worth_its_prefill_time_and_no_more() -> None:
    warm = view("warm", Role.PREFILL, num_cached_tokens=96, num_queued_tokens=90)
    decode = view("d", Role.DECODE)
    assert place(warm, view("cold", Role.PREFILL), decode).prefill_id == "warm"
    warm = dataclasses.replace(warm, num_queued_tokens=100)
    assert place(warm, view("cold", Role.PREFILL), decode).prefill_id == "cold"


def test_a_decode_worker_that_holds_the_blocks_is_cheaper() -> None:
    prefill = view("p", Role.PREFILL)
    assert place(prefill, view("a", Role.DECODE), view("b", Role.DECODE, num_cached_tokens=64)).decode_id == "b"


def test_least_loaded_does_not_see_prefixes() -> None:
    views = [view("warm", Role.MIXED, num_cached_tokens=96, num_streams=1), view("cold", Role.MIXED)]
    placement = least_loaded(request(), views)
    assert isinstance(placement, Placement)
    assert placement.decode_id == "cold"
    assert place(*views).decode_id == "warm"


def test_of_mixed_workers_and_pools_the_cheaper_is_taken() -> None:
    pools = [view("p", Role.PREFILL), view("d", Role.DECODE)]
    # An idle mixed worker saves the transfer; one that decodes for others would stall them with a long prefill.
    assert place(*pools, view("m", Role.MIXED)).prefill_id is None
    assert place(*pools, view("m", Role.MIXED, num_streams=4)).prefill_id == "p"
    queue = dataclasses.replace(pools[0], num_queued_tokens=10_000)
    assert place(queue, pools[1], view("m", Role.MIXED, num_streams=4)).prefill_id is None


def test_a_worker_that_failed_is_avoided_unless_there_is_no_other() -> None:
    avoid = request(avoid=frozenset({"a"}))
    assert place(view("a", Role.MIXED), view("b", Role.MIXED, num_streams=50), order=avoid).decode_id == "b"
    assert place(view("a", Role.MIXED), order=avoid).decode_id == "a"


def test_equal_workers_share_equal_requests() -> None:
    views = [view(f"w{i}", Role.MIXED) for i in range(4)]
    taken = [place(*views, order=request(request_id=f"r{i}")).decode_id for i in range(400)]
    assert all(60 <= taken.count(f"w{i}") <= 140 for i in range(4))
    assert taken == [place(*reversed(views), order=request(request_id=f"r{i}")).decode_id for i in range(400)]


def test_costs_add_up() -> None:
    placement = place(view("p", Role.PREFILL, num_queued_tokens=10), view("d", Role.DECODE, num_streams=5))
    cost = placement.cost
    assert cost.total_ms == pytest.approx(
        cost.queue_ms + cost.prefill_ms + cost.stall_ms + cost.transfer_ms + cost.decode_ms + cost.memory_ms
    )
    assert cost.ttft_ms == pytest.approx(5.0 + 50.0 + 0.7)
    assert cost.decode_ms == pytest.approx(50 * 10.0 * 1.2)


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    assert place(view("m", Role.MIXED, num_cached_tokens=112), order=request(112)).num_uncached_tokens == 1


def test_every_policy_of_the_table_places() -> None:
    for policy in POLICIES.values():
        assert isinstance(policy(request(), [view("m", Role.MIXED)]), Placement)
