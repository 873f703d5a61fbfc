"""Preempted requests compute again or pull from the tiers, whichever is cheaper: the same tokens either way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from switchyard.v1 import worker_pb2

from costs.transfer import ALWAYS_FETCH, NEVER_FETCH, TransferCost
from kvstore.config import KVStoreConfig
from tests.workers.engine.fake_runner import finish_all, make_engine, make_request
from tests.workers.forked_worker import prompt, spec_for, worker
from tests.workers.kv.test_cache_groups import WINDOWS, alone, request, run
from tests.workers.paged_runner import BLOCK_SIZE, PagedRunner, make
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from workers.config import POLICIES, SchedulingOptions
from workers.engine.engine import Engine
from workers.engine.kv.stores import MAX_WRITTEN_BACK_BLOCKS
from workers.engine.request import FinishReason, RequestRole, RequestStatus
from workers.engine.step import SchedulerOutput

COSTS = st.sampled_from([ALWAYS_FETCH, NEVER_FETCH, TransferCost(1.0, 5.0, 1.0)])


def submit_all(engine: Engine, runner: PagedRunner, shapes: Sequence, role: RequestRole, windows: tuple[int, ...]):
    """Requests of one role, those of decode with the blocks that their prefill left in the tier; the first tokens."""
    first: dict[str, list[int]] = {}
    for i, (length, max_tokens, start) in enumerate(shapes):
        name = f"r{i}"
        new = request(name, length, max_tokens, role, 5 * start)
        new.priority, new.tenant, new.deadline_s = -i, bytes([i % 2]), 100.0 - i
        first[name] = []
        if role is RequestRole.DECODE:
            prefill, source = make(64, 200, False, windows=windows)
            source.tier = runner.tier
            prefill.submit(request(name, length, max_tokens, RequestRole.PREFILL, 5 * start))
            first[name] = run(prefill)[name]
        engine.submit(new)
        if role is RequestRole.DECODE:
            engine.continue_request(name, first[name])
    return first


@pytest.mark.parametrize("role", [RequestRole.MIXED, RequestRole.DECODE])
@pytest.mark.parametrize(("is_async", "num_stages"), [(False, 1), (True, 1), (False, 2), (True, 3)])
@settings(max_examples=100, deadline=None)
@given(
    windows=WINDOWS,
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(2, 14), st.integers(0, 2)), min_size=2, max_size=6),
    num_blocks=st.integers(12, 20),
    budget=st.integers(3, 12),
    cost=COSTS,
    lost=st.integers(0, 9),
    policy=st.sampled_from(POLICIES),
    tpot_target_s=st.sampled_from([0.0, 1.0]),
)
def test_tokens_are_those_of_each_request_alone(
    is_async, num_stages, role, windows, shapes, num_blocks, budget, cost, lost, policy, tpot_target_s
):
    """Whichever way is taken, and whatever a tier has lost meanwhile."""
    expected = {f"r{i}": alone(request(f"r{i}", n, m, start=5 * k), windows) for i, (n, m, k) in enumerate(shapes)}
    scheduling = SchedulingOptions(policy=policy, tpot_target_s=tpot_target_s, min_prefill_tokens=2)
    engine, runner = make(
        num_blocks,
        budget,
        is_async,
        4,
        windows,
        writes_back=True,
        transfer_cost=cost,
        scheduling=scheduling,
        num_stages=num_stages,
    )
    first = submit_all(engine, runner, shapes, role, windows)
    runner.is_lost = lambda group, name: name[0] % 10 < lost - 5
    tokens = run(engine)
    assert {name: [*first[name], *tokens.get(name, [])] for name in expected} == expected
    preemption = engine.scheduler.preemption
    assert preemption.num_leaving_blocks == 0
    if cost is NEVER_FETCH and role is RequestRole.MIXED:
        assert preemption.num_swaps == 0


def test_two_requests_do_not_give_way_to_each_others_pulls_for_ever() -> None:
    """Two want a seventh block of twelve: a token that is being chosen is lost when its request is preempted."""
    shapes, windows = [(1, 3, 0), (14, 4, 0), (22, 4, 1), (1, 2, 0), (22, 5, 0)], (0, 6)
    expected = {f"r{i}": alone(request(f"r{i}", n, m, start=5 * k), windows) for i, (n, m, k) in enumerate(shapes)}
    scheduling = SchedulingOptions(tpot_target_s=1.0, min_prefill_tokens=2)
    engine, runner = make(
        12, 7, True, 4, windows, writes_back=True, transfer_cost=TransferCost(1.0, 5.0, 1.0), scheduling=scheduling
    )
    first = submit_all(engine, runner, shapes, RequestRole.DECODE, windows)
    tokens = run(engine)
    assert {name: [*first[name], *tokens.get(name, [])] for name in expected} == expected
    assert engine.scheduler.num_preemptions > 0


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(10, 20),
    budget=st.integers(8, 28),
    num_stages=st.integers(1, 3),
    length=st.integers(20, 60),
    later=st.lists(st.tuples(st.integers(5, 22), st.integers(2, 6), st.integers(0, 8)), min_size=2, max_size=3),
)
@example(17, 19, 1, 58, [(6, 2, 1), (7, 6, 1), (9, 2, 0)])  # two later ones took turns, each while the other pulled
def test_a_long_prompt_gets_its_blocks_though_later_requests_pull_theirs(
    num_blocks, budget, num_stages, length, later
) -> None:
    """later: length, tokens and step of requests that a prefill worker has computed."""
    engine, runner = make(num_blocks, budget, True, 4, writes_back=True, num_stages=num_stages)
    first = replace(request("first", min(length, num_blocks * BLOCK_SIZE - 8), 2), arrival_time_s=0.0)
    expected = {"first": alone(request("first", first.num_prompt_tokens, 2), (0,))}
    engine.submit(first)
    coming, tokens = [], {"first": []}
    for i, (size, max_tokens, step) in enumerate(later):
        name, start = f"later{i}", 7 * i + 3
        expected[name] = alone(request(name, size, max_tokens, start=start), (0,))
        prefill, source = make(64, 200, False)
        source.tier = runner.tier
        prefill.submit(request(name, size, max_tokens, RequestRole.PREFILL, start))
        tokens[name] = run(prefill)[name]
        new = replace(request(name, size, max_tokens, RequestRole.DECODE, start), arrival_time_s=1.0 + step + 0.1 * i)
        coming.append((step, new))
    for number in range(1000):
        for step, new in coming:
            if step == number:
                engine.submit(new)
                engine.continue_request(new.request_id, list(tokens[new.request_id]))
        events = engine.step()
        for token in events.tokens if events else ():
            tokens[token.request_id].append(token.token_id)
        if number > 8 and not engine.scheduler.has_work():
            break
    assert tokens == expected


@pytest.mark.parametrize(("is_async", "num_stages"), [(False, 1), (True, 1), (False, 2), (True, 3)])
@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(8, 24), st.integers(6, 14)), min_size=3, max_size=6),
    num_blocks=st.integers(12, 18),
    failing=st.sets(st.integers(2, 60), min_size=1, max_size=2),
)
def test_steps_that_fail_leave_swapped_requests_whole(is_async, num_stages, shapes, num_blocks, failing):
    """The ranks forget all transfers then: nobody waits for them, and what was not stored is computed again."""
    engine, runner = make(
        num_blocks, 12, is_async, 4, writes_back=True, transfer_cost=ALWAYS_FETCH, num_stages=num_stages
    )
    runner.fails = lambda plan: plan.sequence in failing
    expected = {f"r{i}": alone(request(f"r{i}", n, m, start=5 * i), (0,)) for i, (n, m) in enumerate(shapes)}
    for i, (length, max_tokens) in enumerate(shapes):
        engine.submit(request(f"r{i}", length, max_tokens, start=5 * i))
    tokens: dict[str, list[int]] = {name: [] for name in expected}
    reasons: dict[str, FinishReason] = {}
    for _ in range(2000):
        events = engine.step()
        for token in events.tokens if events else ():
            tokens[token.request_id].append(token.token_id)
        reasons |= {end.request_id: end.reason for end in events.ended} if events else {}
        if not engine.scheduler.has_work():
            break
    assert set(reasons) == set(expected)
    for name, reason in reasons.items():
        whole = len(expected[name]) if reason is FinishReason.LENGTH else len(tokens[name])
        assert tokens[name] == expected[name][:whole], name
    assert engine.scheduler.preemption.num_leaving_blocks == 0
    assert engine.scheduler.pool.num_referenced == 0
    engine.scheduler.pool.check()


def test_one_that_is_admitted_takes_no_block_of_what_is_planned_already():
    """With the prompts' part of the step used up it had blocks for no token, and took one for its next token from a
    request of the same plan."""
    shapes = [(12, 2, 0), (19, 6, 0), (13, 5, 0), (10, 4, 1), (17, 2, 2)]
    expected = {f"r{i}": alone(request(f"r{i}", n, m, start=5 * k), (0,)) for i, (n, m, k) in enumerate(shapes)}
    scheduling = SchedulingOptions(tpot_target_s=1.0, min_prefill_tokens=2)
    engine, runner = make(13, 3, True, 4, writes_back=True, transfer_cost=NEVER_FETCH, scheduling=scheduling)
    first = submit_all(engine, runner, shapes, RequestRole.DECODE, (0,))
    runner.is_lost = lambda group, name: name[0] % 10 < 1
    tokens = run(engine)
    assert {name: [*first[name], *tokens.get(name, [])] for name in expected} == expected


def preempted(cost: TransferCost | None, is_async: bool = False) -> tuple[Engine, PagedRunner]:
    """Two requests that do not fit together; the later one is preempted."""
    options = {} if cost is None else {"transfer_cost": cost, "writes_back": True}
    engine, runner = make(12, 40, is_async, **options)
    engine.submit(request("early", 20, 20))
    engine.submit(request("late", 18, 20, start=3))
    tokens = run(engine)
    assert tokens == {
        "early": alone(request("early", 20, 20), (0,)),
        "late": alone(request("late", 18, 20, start=3), (0,)),
    }
    assert engine.scheduler.num_preemptions > 0
    return engine, runner


@pytest.mark.parametrize("is_async", [False, True])
def test_a_swapped_request_pulls_what_it_had_computed(is_async):
    engine, runner = preempted(ALWAYS_FETCH, is_async)
    preemption = engine.scheduler.preemption
    assert (preemption.num_swaps, preemption.num_recomputes) == (engine.scheduler.num_preemptions, 0)
    pulled = {name for load in runner.loads for name in load.block_names}
    assert len(pulled) >= 2
    assert len(pulled) * BLOCK_SIZE > 8  # more than some first block that the device had kept
    plain, _ = preempted(NEVER_FETCH, is_async)
    assert engine.counters.num_computed_prompt_tokens < plain.counters.num_computed_prompt_tokens


@pytest.mark.parametrize("cost", [None, NEVER_FETCH])
def test_without_tiers_or_where_pulling_is_dearer_it_computes_again(cost):
    engine, runner = preempted(cost)
    preemption = engine.scheduler.preemption
    assert (preemption.num_swaps, preemption.num_recomputes) == (0, engine.scheduler.num_preemptions)
    assert runner.loads == []


@pytest.mark.parametrize(("fetch_s", "swaps"), [(7.9, True), (8.1, False)])
def test_the_choice_follows_the_cost(fetch_s, swaps):
    """Ten blocks at 4 tokens of 0.5 s are 20 s to compute. To pull them takes fetch_s + 10 x 1.2 s, to store none more:
    they were written back as they filled."""
    engine, _ = make_engine(num_blocks=12, context=60, budget=100, writes_back=True,
                            transfer_cost=TransferCost(0.5, fetch_s, 1.2))  # fmt: skip
    engine.submit(make_request("only", 40, max_tokens=9))
    engine.step()
    engine.step()
    scheduler = engine.scheduler
    scheduler.preemption.preempt(SchedulerOutput(), scheduler.requests["only"])
    assert (scheduler.preemption.num_swaps, scheduler.preemption.num_recomputes) == ((1, 0) if swaps else (0, 1))


def test_what_was_not_written_back_is_stored_with_the_preemption_and_its_blocks_are_free_a_step_later():
    engine, runner = make_engine(num_blocks=12, context=60, budget=100, writes_back=True)
    scheduler = engine.scheduler
    engine.submit(make_request("only", 40, max_tokens=9))
    runner.holds_back = True
    scheduler.transfers.num_written_back_blocks += MAX_WRITTEN_BACK_BLOCKS  # others' are on their way
    engine.step()
    assert scheduler.stores.num_dropped_write_backs == 10
    scheduler.transfers.num_written_back_blocks -= MAX_WRITTEN_BACK_BLOCKS
    plan, request = SchedulerOutput(), scheduler.requests["only"]
    scheduler.preemption.preempt(plan, request)
    assert [len(store.block_ids) for store in plan.stores] == [10]
    assert all(store.is_copied for store in plan.stores)
    assert (scheduler.pool.num_free, scheduler.preemption.num_leaving_blocks) == (2, 10)
    output = runner.start(plan)()
    scheduler.update(plan, output)
    assert (scheduler.pool.num_free, scheduler.preemption.num_leaving_blocks) == (12, 0)
    assert request.is_leaving  # it pulls them when the tier has them


def test_a_swapped_request_waits_for_its_stores_while_others_run():
    """Else it would compute again what the tiers are about to have."""
    engine, runner = make_engine(num_blocks=32, context=48, budget=100, writes_back=True)
    runner.holds_back = True
    for i in range(2):
        engine.submit(make_request(f"r{i}", 18, max_tokens=18, arrival=float(i), start=20 * i, ignore_eos=True))
    engine.step()
    scheduler, request = engine.scheduler, engine.scheduler.requests["r1"]
    scheduler.preemption.preempt(SchedulerOutput(), request)
    engine.step()
    assert (request.is_leaving, request.status) == (True, RequestStatus.PREEMPTED)
    runner.holds_back = False
    engine.step()
    engine.step()
    assert (request.is_leaving, request.status) == (False, RequestStatus.RUNNING)
    assert set(finish_all(engine)) == {"r0", "r1"}


@pytest.mark.parametrize("is_written_back", [True, False])
def test_a_tier_that_says_nothing_holds_up_no_request(is_written_back):
    """A swapped request waits for its stores only while others run, and does not pull from such a tier."""
    engine, runner = make_engine(num_blocks=12, context=48, budget=100, writes_back=True)
    runner.holds_back = True
    for i in range(2):
        engine.submit(make_request(f"r{i}", 18, max_tokens=18, arrival=float(i), start=20 * i, ignore_eos=True))
    others = 0 if is_written_back else MAX_WRITTEN_BACK_BLOCKS  # on their way: the prompts' blocks are dropped
    engine.scheduler.transfers.num_written_back_blocks += others
    engine.step()
    engine.scheduler.transfers.num_written_back_blocks -= others
    ended = []
    for _ in range(300):
        events = engine.step()
        ended += [end.request_id for end in events.ended] if events else []
    assert ended == ["r0", "r1"]
    assert engine.scheduler.preemption.num_swaps == 1
    assert all(transfer.is_copied for transfer in runner.begun)  # none is a load
    assert engine.scheduler.pool.num_referenced == 0


@pytest.mark.parametrize(("prefix_fetch", "tp"), [("always", 1), ("always", 2), ("never", 1)])
def test_real_workers_swap_through_the_host_tier_or_compute_again(tmp_path, shared_kv_node, prefix_fetch, tp):
    """The model's own tokens in either case."""
    checkpoint = make_checkpoint("gqa", tmp_path)
    spec = spec_for(checkpoint, "mixed", shared_kv_node, tp=tp, kvstore=KVStoreConfig(prefix_fetch=prefix_fetch))
    spec = replace(spec, engine=replace(spec.engine, num_blocks=8))
    prompts = [prompt(60, seed=20 + tp), prompt(61, seed=30 + tp)]
    with worker(spec) as client:
        for i, token_ids in enumerate(prompts):
            client.submit(f"r{i}", token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=50)
        for i, token_ids in enumerate(prompts):
            client.wait_finished(f"r{i}")
            assert client.tokens[f"r{i}"] == generate_with_transformers(checkpoint, token_ids, 50)
        load = client.load()
    assert load.num_preemptions == load.num_swaps + load.num_recomputes > 0
    if prefix_fetch == "never":
        assert (load.num_swaps, load.num_transferred_blocks) == (0, 0)
    else:
        assert load.num_recomputes == 0
        assert load.num_transferred_blocks >= 2
        assert load.pulled_bytes["host"] > 0
