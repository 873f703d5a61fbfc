"""The router's books: reservations, reports, memory, speeds. And the memory of seen blocks by itself."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from router.fleet.fleet import Fleet, KvLayout, LoadReport, WorkerInfo, extend_names, name_blocks
from router.placement.affinity import BlockChanges, SeenBlocks, SnapshotPart
from router.placement.policy import Placement, Rates, Reject, Role, RouteRequest, WorkerView, cheapest
from router.placement.residency import AdapterCosts

LAYOUT = KvLayout(b"layout", 16)
RATES = Rates(prefill_ms_per_token=0.5, decode_ms_per_step=10.0, transfer_ms_per_block=0.1)
COSTS = AdapterCosts(load_ms=100.0, copy_ms=5.0)


def info(worker_id: str, role: Role = Role.MIXED) -> WorkerInfo:
    return WorkerInfo(worker_id, role.value, role, LAYOUT, num_blocks=100, context_tokens=1000)


def fleet_of(*infos: WorkerInfo) -> Fleet:
    fleet = Fleet(cheapest, RATES, COSTS)
    for one in infos:
        fleet.add(one)
    return fleet


def pick(fleet: Fleet, request_id: str, num_tokens: int = 64, prompt: list[int] | None = None) -> Placement:
    prompt = list(range(num_tokens)) if prompt is None else prompt
    names = name_blocks(fleet.layouts, prompt, b"")
    placement = fleet.pick(RouteRequest(request_id, len(prompt), num_output_tokens=32), names, now_s=0.0)
    assert isinstance(placement, Placement)
    fleet.check()
    return placement


def views(fleet: Fleet) -> dict[str, WorkerView]:
    return {view.worker_id: view for view in fleet.views({})}


def test_a_burst_spreads_before_any_worker_has_reported() -> None:
    fleet = fleet_of(*(info(f"w{i}") for i in range(4)))
    taken = [pick(fleet, f"r{i}", prompt=[i, *range(20)]).decode_id for i in range(40)]
    assert [taken.count(f"w{i}") for i in range(4)] == [10] * 4


def test_reservations_are_given_back_once() -> None:
    fleet = fleet_of(info("p", Role.PREFILL), info("d", Role.DECODE))
    before = views(fleet)
    pick(fleet, "r")
    assert (views(fleet)["p"].num_queued_tokens, views(fleet)["d"].num_queued_tokens) == (64, 0)
    assert (views(fleet)["p"].num_free_blocks, views(fleet)["d"].num_free_blocks) == (96, 94)
    fleet.first_token("r", now_s=1.0)
    assert views(fleet)["p"].num_streams == views(fleet)["p"].num_queued_tokens == 0
    assert views(fleet)["d"].num_streams == 1
    for _ in range(2):
        fleet.release("r")
        fleet.first_token("r", now_s=2.0)
        fleet.check()
    after = views(fleet)
    assert after["d"] == before["d"]
    assert after["p"].num_streams == after["p"].num_queued_tokens == 0


def test_a_mixed_worker_is_through_with_a_prompt_at_its_first_token() -> None:
    fleet = fleet_of(info("m"))
    pick(fleet, "r")
    fleet.first_token("r", now_s=1.0)
    assert (views(fleet)["m"].num_queued_tokens, views(fleet)["m"].num_streams) == (0, 1)
    fleet.check()


def test_views_are_the_last_report_and_what_was_done_since() -> None:
    fleet = fleet_of(info("m"))
    pick(fleet, "mine")
    fleet.report("m", LoadReport(num_streams=5, num_free_blocks=50, num_queued_tokens=300))  # others' included
    pick(fleet, "since", prompt=[9] * 64)
    view = views(fleet)["m"]
    assert (view.num_streams, view.num_queued_tokens, view.num_free_blocks) == (6, 364, 44)
    fleet.report("m", LoadReport(num_streams=0, num_free_blocks=100, num_queued_tokens=0))  # lags behind what we sent
    view = views(fleet)["m"]
    assert (view.num_streams, view.num_queued_tokens, view.num_free_blocks) == (2, 128, 88)


def test_a_lost_worker_takes_its_reservations_along() -> None:
    fleet = fleet_of(info("p", Role.PREFILL), info("d", Role.DECODE))
    pick(fleet, "r")
    fleet.remove("d")
    fleet.add(info("d", Role.DECODE))
    fleet.check()
    assert views(fleet)["d"].num_streams == 0
    fleet.release("r")
    fleet.check()
    assert views(fleet)["p"].num_streams == 0


def test_a_retired_worker_gets_nothing_new() -> None:
    fleet = fleet_of(info("a"))
    pick(fleet, "old")
    fleet.retire("a", is_retired=True)
    assert not fleet.can_serve
    assert isinstance(fleet.pick(RouteRequest("new", 10, 10), {}, now_s=0.0), Reject)
    fleet.release("old")
    fleet.retire("a", is_retired=False)
    pick(fleet, "new")


def test_a_prompt_goes_where_its_prefix_was_seen() -> None:
    fleet = fleet_of(*(info(f"w{i}") for i in range(8)))
    first = pick(fleet, "r0", prompt=[7] * 96)
    fleet.release("r0")
    again = pick(fleet, "r1", prompt=[7] * 80 + [8] * 30)
    assert again.decode_id == first.decode_id
    assert again.num_uncached_tokens == 30


def test_equal_prompts_stay_together_before_the_worker_has_said_a_word_of_them() -> None:
    fleet = Fleet(cheapest, replace(RATES, transfer_ms_per_block=1000.0), COSTS)  # nothing is gained by pulling
    for i in range(8):
        fleet.add(info(f"w{i}"))
        assert fleet.apply_block_event(f"w{i}", SnapshotPart(1, 0, True, []))
    (names,) = name_blocks(fleet.layouts, [7] * 400, b"").values()
    taken = {pick(fleet, "r0", prompt=[7] * 400).decode_id}
    assert {view.worker_id for view in fleet.views({LAYOUT: names}) if view.num_cached_tokens == 400} == taken
    for i in range(1, 3):
        fleet.first_token(f"r{i - 1}", now_s=0.2)  # it waits no longer; it still runs
        taken.add(pick(fleet, f"r{i}", prompt=[7] * 400).decode_id)
    assert len(taken) == 1


def test_what_a_worker_says_of_its_blocks_outweighs_what_it_was_sent() -> None:
    fleet = fleet_of(info("a"), info("b"))
    first = pick(fleet, "r0", prompt=[7] * 96)
    fleet.release("r0")
    other = {"a": "b", "b": "a"}[first.decode_id]
    (names,) = name_blocks(fleet.layouts, [7] * 96, b"").values()
    for worker_id, held in ((first.decode_id, []), (other, names)):
        assert fleet.apply_block_event(worker_id, SnapshotPart(1, 0, True, held))
        for number in range(1, 4):
            assert fleet.apply_block_event(worker_id, BlockChanges(number, number + 1, [], []))
    assert pick(fleet, "r1", prompt=[7] * 96).decode_id == other
    assert fleet.num_reported_blocks(other) == 6
    fleet.lose_blocks(other)
    assert fleet.num_reported_blocks(other) is None
    assert not fleet.apply_block_event("nobody", SnapshotPart(1, 0, True, []))


def test_the_next_turn_of_a_chat_finds_its_last_answer() -> None:
    fleet = fleet_of(*(info(f"w{i}") for i in range(8)))
    names = name_blocks(fleet.layouts, [1] * 40, b"")
    fleet.remember("w5", extend_names(names, [1] * 40 + [2] * 40, b""))
    placement = pick(fleet, "r", prompt=[1] * 40 + [2] * 40 + [3] * 16)
    assert (placement.decode_id, placement.num_uncached_tokens) == ("w5", 16)


def test_extended_names_are_the_names_of_the_longer_prompt() -> None:
    for num_tokens in (0, 15, 16, 33, 64):
        tokens = list(range(100))
        short = name_blocks(frozenset({LAYOUT}), tokens[:num_tokens], b"")
        assert extend_names(short, tokens, b"") == name_blocks(frozenset({LAYOUT}), tokens, b"")


def test_speeds_are_learnt_per_pool() -> None:
    fleet = fleet_of(info("a"), info("b"))
    for i in range(60):
        pick(fleet, f"r{i}", prompt=[i] * 64)
        fleet.first_token(f"r{i}", now_s=0.128)
        fleet.observe_decode("a", num_steps=100, duration_s=2.0)
        fleet.release(f"r{i}")
    rates = views(fleet)["b"].rates
    assert abs(rates.prefill_ms_per_token - 2.0) < 0.01
    assert abs(rates.decode_ms_per_step - 20.0) < 0.1
    fleet.observe_decode("a", num_steps=2, duration_s=100.0)  # too short to say anything
    assert views(fleet)["b"].rates == rates


@given(st.lists(st.tuples(st.sampled_from(["pick", "first", "release", "lose", "back", "report"]), st.integers(0, 5))))
def test_the_books_balance_whatever_happens(events: list[tuple[str, int]]) -> None:
    infos = [info("p", Role.PREFILL), info("d", Role.DECODE), info("m"), info("e", Role.DECODE)]
    fleet = fleet_of(*infos)
    live: set[str] = set()
    for kind, number in events:
        request_id, worker = f"r{number}", infos[number % 4]
        if kind == "pick" and request_id not in live:
            names = name_blocks(fleet.layouts, [number] * 40, b"")
            if isinstance(fleet.pick(RouteRequest(request_id, 40, 10), names, 0.0), Placement):
                live.add(request_id)
        elif kind == "first":
            fleet.first_token(request_id, 1.0)
        elif kind == "release":
            fleet.release(request_id)
            live.discard(request_id)
        elif kind == "lose":
            fleet.remove(worker.worker_id)
        elif kind == "back" and worker.worker_id not in views(fleet):
            fleet.add(worker)
        elif kind == "report":
            fleet.report(worker.worker_id, LoadReport(number, 100 - number, 10 * number))
        fleet.check()
        for view in fleet.views({}):
            assert min(view.num_streams, view.num_queued_tokens, view.num_free_blocks) >= 0


def names_of(*ids: int) -> list[bytes]:
    """Chained names: each says what its ancestors are, as real block names do."""
    return [bytes(ids[: end + 1]) for end in range(len(ids))]


def test_seen_blocks_are_matched_by_prefix() -> None:
    seen = SeenBlocks(10)
    seen.remember(names_of(1, 2, 3, 4))
    assert seen.match_prefix(names_of(1, 2, 3, 4, 5)) == 4
    assert seen.match_prefix(names_of(1, 2, 9)) == 2
    assert seen.match_prefix(names_of(9)) == 0
    assert seen.match_prefix([]) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=30), st.integers(1, 8))
def test_seen_blocks_are_bounded_and_never_lose_an_ancestor(prompts: list[list[int]], max_blocks: int) -> None:
    seen = SeenBlocks(max_blocks)
    for prompt in prompts:
        seen.remember(names_of(*prompt))
        assert len(seen) <= max_blocks
        assert seen.match_prefix(names_of(*prompt)) == min(len(prompt), max_blocks)
        for other in prompts:
            held = [name in seen._names for name in names_of(*other)]
            assert held == sorted(held, reverse=True)
            assert seen.match_prefix(names_of(*other)) == sum(held)
