"""Where requests with adapters go: the same homes for every router, more of them under load, fewer when it is over."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement.policy import AdapterNeed, Placement, Reject, RejectReason, Role, WorkerView, cheapest
from router.placement.residency import (
    COOL_S,
    AdapterCosts,
    HeldAdapters,
    Homes,
    adapter_ms,
    at_home,
    by_rendezvous,
    cooled,
    place,
)
from tests.router.placement.test_policy import request, view

COSTS = AdapterCosts(load_ms=100.0, copy_ms=5.0)
NEED = AdapterNeed(b"a digest", is_loadable=True)

digests = st.binary(min_size=1, max_size=64)
worker_ids = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=12)


def able(worker_id: str, role: Role = Role.MIXED, **changes: object) -> WorkerView:
    return view(worker_id, role, **{"takes_adapters": True, "adapter_ms": COSTS.load_ms, **changes})


def resident(worker: WorkerView) -> WorkerView:
    return dataclasses.replace(worker, holds_adapter=True, adapter_ms=0.0)


@given(digests, worker_ids)
def test_the_order_is_of_the_set_and_not_of_its_listing(digest: bytes, ids: set[str]) -> None:
    order = by_rendezvous(digest, ids)
    assert sorted(order) == sorted(ids)
    assert by_rendezvous(digest, sorted(ids, reverse=True)) == order


@given(digests, worker_ids, st.data())
def test_who_leaves_moves_nothing_else(digest: bytes, ids: set[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(ids)))
    assert by_rendezvous(digest, ids - {gone}) == [one for one in by_rendezvous(digest, ids) if one != gone]


@given(digests, worker_ids, st.integers(1, 12))
def test_more_homes_keep_those_that_there_were(digest: bytes, ids: set[str], count: int) -> None:
    views = [able(one) for one in sorted(ids)]
    fewer, more = ({one.worker_id for one in at_home(digest, views, n)} for n in (count, count + 1))
    assert fewer <= more
    assert len(fewer) == min(count, len(ids))


def test_adapters_spread_evenly() -> None:
    ids = [f"worker-{i}" for i in range(8)]
    first = Counter(by_rendezvous(f"digest {i}".encode(), ids)[0] for i in range(1600))
    assert set(first) == set(ids)
    assert max(first.values()) < 1.35 * 200
    assert min(first.values()) > 0.65 * 200


def test_each_role_and_each_kind_of_blocks_has_homes_of_its_own() -> None:
    views = [
        able(f"{role.value}-{i}", role, kv_fingerprint=kind) for role in Role for kind in (b"a", b"b") for i in "01"
    ]
    homes = at_home(b"a digest", views, 1)
    assert sorted((one.role.value, one.kv_fingerprint) for one in homes) == sorted(
        (role.value, kind) for role in Role for kind in (b"a", b"b")
    )


@given(st.integers(1, 20), st.floats(0, 1e6), st.floats(0, 1e6))
def test_homes_cool_by_one_in_each_time_and_never_below_one(count: int, since_s: float, passed_s: float) -> None:
    homes = cooled(Homes(count, since_s), since_s + passed_s)
    assert homes.count == max(1, count - int((since_s + passed_s - since_s) // COOL_S))
    assert cooled(homes, since_s + passed_s) == homes


_loads = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 2000), st.sampled_from([0.0, COSTS.copy_ms, COSTS.load_ms])),
    min_size=1,
    max_size=8,
)


@given(digests, _loads, st.integers(1, 10), st.floats(0, 1e4))
def test_a_request_goes_to_a_home_and_the_homes_grow_by_one_at_most(
    digest: bytes, loads: list[tuple[int, int, float]], count: int, now_s: float
) -> None:
    views = [
        able(f"w{i}", num_streams=streams, num_queued_tokens=queued, adapter_ms=ms, holds_adapter=ms < COSTS.load_ms)
        for i, (streams, queued, ms) in enumerate(loads)
    ]
    order = request(adapter=AdapterNeed(digest, is_loadable=True))
    found, homes = place(order, views, cheapest, Homes(count, now_s), now_s)
    assert isinstance(found, Placement)
    assert homes.count in (count, count + 1)
    home_ids = {one.worker_id for one in at_home(digest, views, homes.count)}
    assert found.decode_id in home_ids
    if homes.count > count:  # only for a worker that is cheaper though it must have the adapter first
        before = cheapest(order, at_home(digest, views, count))
        anywhere = cheapest(order, views)
        assert isinstance(before, Placement)
        assert isinstance(anywhere, Placement)
        assert anywhere.cost.total_ms < before.cost.total_ms


def test_an_idle_home_keeps_the_adapter_where_it_is() -> None:
    first, second, third = by_rendezvous(NEED.digest, ["a", "b", "c"])
    views = [resident(able(first, num_streams=1)), able(second), able(third)]
    found, homes = place(request(adapter=NEED), views, cheapest, Homes(), 0.0)
    assert isinstance(found, Placement)
    assert (found.decode_id, homes) == (first, Homes())


def test_load_makes_the_next_one_a_home_and_time_takes_it_back() -> None:
    first, second, third = by_rendezvous(NEED.digest, ["a", "b", "c"])
    views = [resident(able(first, num_streams=20)), able(second), able(third)]
    found, homes = place(request(adapter=NEED), views, cheapest, Homes(), 7.0)
    assert isinstance(found, Placement)
    assert (found.decode_id, homes) == (second, Homes(2, 7.0))
    quiet = [resident(able(first)), resident(able(second)), able(third)]
    _, homes = place(request(adapter=NEED), quiet, cheapest, homes, 7.0 + COOL_S - 1)
    assert homes.count == 2
    _, homes = place(request(adapter=NEED), quiet, cheapest, homes, 7.0 + COOL_S)
    assert homes.count == 1


def test_among_homes_the_device_comes_before_the_host_and_the_host_before_the_files() -> None:
    held = HeldAdapters(4, on_device=frozenset({b"d"}), on_host=frozenset({b"h"}))
    assert [adapter_ms(digest, held, False, COSTS) for digest in (b"d", b"h", b"x")] == [0.0, 5.0, 100.0]
    assert adapter_ms(b"x", held, True, COSTS) == 0.0
    views = [able("a", adapter_ms=100.0), able("b", adapter_ms=5.0), able("c", adapter_ms=0.0)]
    for best, least in (("c", 3), ("b", 2)):
        found, _ = place(request(adapter=NEED), views[:least], cheapest, Homes(3), 0.0)
        assert isinstance(found, Placement)
        assert found.decode_id == best
    assert found.cost.adapter_ms == 5.0


def test_both_halves_of_a_request_are_at_home() -> None:
    views = [able(f"p{i}", Role.PREFILL) for i in range(4)] + [able(f"d{i}", Role.DECODE) for i in range(4)]
    found, _ = place(request(adapter=NEED), views, cheapest, Homes(), 0.0)
    assert isinstance(found, Placement)
    assert found.prefill_id == by_rendezvous(NEED.digest, ["p0", "p1", "p2", "p3"])[0]
    assert found.decode_id == by_rendezvous(NEED.digest, ["d0", "d1", "d2", "d3"])[0]


def test_who_failed_it_is_no_home_of_it() -> None:
    first, second = by_rendezvous(NEED.digest, ["a", "b"])
    order = request(adapter=NEED, avoid=frozenset({first}))
    found, homes = place(order, [resident(able(first)), able(second)], cheapest, Homes(), 0.0)
    assert isinstance(found, Placement)
    assert (found.decode_id, homes.count) == (second, 1)


def test_only_holders_are_asked_when_the_files_are_others_now() -> None:
    gone = AdapterNeed(NEED.digest, is_loadable=False)
    first, second = by_rendezvous(NEED.digest, ["a", "b"])
    found, _ = place(request(adapter=gone), [able(first), resident(able(second))], cheapest, Homes(), 0.0)
    assert isinstance(found, Placement)
    assert found.decode_id == second
    found, _ = place(request(adapter=gone), [able(first), able(second)], cheapest, Homes(), 0.0)
    assert isinstance(found, Reject)
    assert found.reason is RejectReason.NO_WORKER
    assert "the files at its path have another digest" in found.message


@pytest.mark.parametrize("views", [[], [view("a", Role.MIXED)]])
def test_workers_that_take_no_adapters_get_none(views: list[WorkerView]) -> None:
    found, _ = place(request(adapter=NEED), views, cheapest, Homes(), 0.0)
    assert found == Reject(RejectReason.NO_WORKER, "no worker that takes adapters is up")


def test_a_home_without_space_for_it_is_left_for_one_with_space() -> None:
    first, second = by_rendezvous(NEED.digest, ["a", "b"])
    found, _ = place(request(adapter=NEED), [able(first, num_blocks=1), able(second)], cheapest, Homes(), 0.0)
    assert isinstance(found, Placement)
    assert found.decode_id == second
