"""The scheduler's promises, without tensors: budgets hold, blocks are owned once, every request comes to an end."""

from __future__ import annotations

import pytest

from costs.transfer import TransferCost
from tests.workers.engine.fake_runner import BLOCK_SIZE, EOS, finish_all, make_engine, make_request
from workers.engine.request import FinishReason, RequestRole, RequestStatus
from workers.errors import InvalidRequest
from workers.sampling.params import NO_TOKEN


def test_long_prompts_are_computed_in_chunks_beside_decodes():
    engine, runner = make_engine(budget=8)
    engine.submit(make_request("short", 3, max_tokens=6))
    engine.step()
    engine.submit(make_request("long", 20, arrival=1.0))
    finish_all(engine)
    sizes = [plan.num_tokens for plan in runner.plans]
    assert sizes[:5] == [[3], [1, 7], [1, 7], [1, 6], [1, 1]]


def test_a_shared_prefix_is_taken_from_the_cache():
    engine, _ = make_engine()
    engine.submit(make_request("a", 12))
    finish_all(engine)
    second = make_request("b", 12)
    engine.submit(second)
    finish_all(engine)
    assert second.num_cached_prompt_tokens == 11  # the last token must be computed for its logits
    assert second.num_computed_prompt_tokens == 1


def test_a_fully_cached_prompt_writes_nothing_into_the_shared_block():
    engine, runner = make_engine()
    engine.submit(make_request("a", 8))
    finish_all(engine)
    engine.submit(make_request("b", 8))
    runner.plans.clear()
    engine.step()
    (chunk,) = runner.plans[0].chunks()
    assert (chunk.start_position, chunk.write_from, chunk.num_scheduled_tokens) == (7, 8, 1)


def test_eos_ends_the_stream_and_is_not_shown():
    engine, runner = make_engine()
    engine.submit(make_request("a", 3, max_tokens=9))
    engine.submit(make_request("b", 3, max_tokens=9, ignore_eos=True, arrival=1.0))
    runner.next_token = EOS
    events = engine.step()
    assert [t.request_id for t in events.tokens] == ["b"]
    assert [(e.request_id, e.reason) for e in events.ended] == [("a", FinishReason.STOP)]


def test_the_context_ends_a_stream():
    engine, _ = make_engine(num_blocks=16, context=10)
    engine.submit(make_request("a", 7, max_tokens=100))
    assert finish_all(engine) == {"a": FinishReason.LENGTH}


def test_preempted_requests_come_back_and_finish():
    engine, _ = make_engine(num_blocks=6, budget=100)
    for i in range(3):
        engine.submit(make_request(f"r{i}", 5, max_tokens=10, arrival=float(i), start=10 * i))
    ends = finish_all(engine)
    assert set(ends.values()) == {FinishReason.LENGTH}
    assert len(ends) == 3
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.pool.num_free == 6


def test_prefill_publishes_every_block_once_the_tail_last():
    engine, runner = make_engine(budget=8)
    engine.submit(make_request("p", 18, role=RequestRole.PREFILL))
    assert finish_all(engine) == {"p": FinishReason.PREFILLED}
    stored = [list(s.num_tokens) for plan in runner.plans for s in plan.stores]
    assert stored == [[4, 4], [4, 4], [2]]


def test_a_long_prefill_ends_with_a_short_chunk_that_begins_with_a_block():
    engine, runner = make_engine(num_blocks=300, budget=500, context=1200)
    engine.submit(make_request("p", 1027, role=RequestRole.PREFILL))
    finish_all(engine)
    assert [count for plan in runner.plans for count in plan.num_tokens] == [500, 460, 67]
    stored = [sum(s.num_tokens) for plan in runner.plans for s in plan.stores]
    assert stored == [500, 460, 67]


def test_decode_waits_pulls_and_continues():
    engine, runner = make_engine()
    request = make_request("d", 10, role=RequestRole.DECODE)
    engine.submit(request)
    assert engine.step() is None
    assert request.status is RequestStatus.WAITING_FOR_KV
    ((_, names),) = engine.scheduler.pending_pulls()
    assert len(names) == 3
    engine.scheduler.kv_available("d", 2)
    engine.step()
    assert [len(load.block_ids) for load in runner.plans[-1].loads] == [2]
    engine.continue_request("d", [7])
    assert finish_all(engine) == {"d": FinishReason.LENGTH}
    assert request.num_transferred_blocks == 3
    assert engine.scheduler.num_recomputed_prompt_tokens == 0
    assert [start for plan in runner.plans for start in plan.start_positions] == [10, 11, 12]


@pytest.mark.parametrize("role", [RequestRole.MIXED, RequestRole.PREFILL])
def test_a_prefix_that_the_tiers_have_is_pulled_and_the_rest_computed(role):
    engine, runner = make_engine(budget=100)
    request = make_request("r", 14, role=role)
    request.awaits_lookup = True
    engine.submit(request)
    assert engine.scheduler.wants_lookup(request)
    assert engine.step() is None
    engine.scheduler.kv_available("r", 2)
    finish_all(engine)
    assert [len(load.block_ids) for plan in runner.plans for load in plan.loads] == [2]
    first = next(chunk for plan in runner.plans for chunk in plan.chunks())
    assert (first.start_position, first.num_scheduled_tokens) == (8, 6)
    assert (request.num_cached_prompt_tokens, request.num_computed_prompt_tokens) == (8, 6)
    assert (engine.scheduler.num_prefixes_fetched, engine.scheduler.num_prefixes_recomputed) == (1, 0)


def test_a_prefix_that_is_cheaper_to_compute_is_not_pulled():
    cost = TransferCost(compute_s_per_token=1.0, fetch_s=9.0, fetch_s_per_block=0.0)
    engine, runner = make_engine(budget=100, transfer_cost=cost)
    loaded = []
    for name, length, num_blocks in (("short", 10, 2), ("long", 14, 3)):
        engine.submit(make_request(name, length, start=length))
        engine.scheduler.kv_available(name, num_blocks)
        runner.plans.clear()
        finish_all(engine)
        loaded += [name for plan in runner.plans for _ in plan.loads]
    assert loaded == ["long"]
    assert (engine.scheduler.num_prefixes_fetched, engine.scheduler.num_prefixes_recomputed) == (1, 1)


@pytest.mark.parametrize("good_blocks", [0, 1])
def test_a_prefix_that_does_not_verify_is_computed(good_blocks):
    engine, runner = make_engine(budget=100)
    runner.load_limit = good_blocks
    request = make_request("r", 14)
    engine.submit(request)
    engine.scheduler.kv_available("r", 3)
    assert finish_all(engine) == {"r": FinishReason.LENGTH}
    assert request.num_computed_prompt_tokens == 14 - BLOCK_SIZE * good_blocks
    assert engine.scheduler.num_recomputed_prompt_tokens == 0  # those count what a prefill worker had promised


def test_what_is_cached_here_is_not_asked_for():
    engine, _ = make_engine()
    engine.submit(make_request("a", 8))
    finish_all(engine)
    again = make_request("b", 10)
    engine.submit(again)
    assert not engine.scheduler.wants_lookup(again)


def test_whoever_computes_a_full_block_writes_it_back_once():
    engine, runner = make_engine(budget=100, writes_back=True)
    engine.submit(make_request("m", 10, max_tokens=8))
    finish_all(engine)
    written = [list(w.num_tokens) for plan in runner.plans for w in plan.stores]
    assert written == [[4, 4], [4], [4]]
    runner.plans.clear()
    decode = make_request("d", 6, max_tokens=8, role=RequestRole.DECODE, start=20)
    engine.submit(decode)
    engine.continue_request("d", [7])
    finish_all(engine)
    written = [w for plan in runner.plans for w in plan.stores]
    assert [list(w.num_tokens) for w in written] == [[4], [4]]  # not the prompt's, which prefill published
    assert written[0].block_names == decode.block_names[1:2]


@pytest.mark.parametrize("good_blocks", [0, 1])
def test_decode_recomputes_what_does_not_verify(good_blocks):
    engine, runner = make_engine(budget=100)
    runner.load_limit = good_blocks
    engine.submit(make_request("d", 10, role=RequestRole.DECODE))
    engine.continue_request("d", [7])
    assert finish_all(engine) == {"d": FinishReason.LENGTH}
    assert engine.scheduler.num_recomputed_prompt_tokens == 10 - BLOCK_SIZE * good_blocks


def test_a_preempted_decode_pulls_again():
    engine, _ = make_engine(num_blocks=6, budget=100)
    for i in range(2):
        engine.submit(make_request(f"d{i}", 8, max_tokens=12, role=RequestRole.DECODE, arrival=float(i), start=20 * i))
        engine.continue_request(f"d{i}", [7])
    assert len(finish_all(engine)) == 2
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_recomputed_prompt_tokens == 0


def test_a_ready_decode_waits_for_a_step_with_budget():
    engine, runner = make_engine(budget=8)
    engine.submit(make_request("first", 8))
    finish_all(engine)
    engine.submit(make_request("long", 20, start=11))
    engine.submit(make_request("d", 8, role=RequestRole.DECODE, arrival=1.0))
    engine.continue_request("d", [7])
    runner.plans.clear()
    finish_all(engine)
    sizes = [plan.num_tokens for plan in runner.plans]
    assert sizes[:2] == [[8], [8]]
    assert all(size > 0 for plan in sizes for size in plan)


def test_clients_that_do_not_read_stop_nobody_else():
    engine, _ = make_engine(num_blocks=8, max_num_seqs=2)
    for i in range(3):
        stalled = make_request(f"stalled{i}", 7, max_tokens=20, arrival=float(i), start=10 * i)
        stalled.window_tokens = 1
        engine.submit(stalled)
        while engine.step() is not None:
            pass
    assert all(r.is_stalled for r in engine.scheduler.requests.values())
    engine.submit(make_request("quick", 20, max_tokens=9, arrival=9.0, start=5))
    assert finish_all(engine) == {"quick": FinishReason.LENGTH}
    for i in range(3):
        engine.credit(f"stalled{i}", 100)
    assert len(finish_all(engine)) == 3


def test_continue_that_completes_the_request_ends_it():
    engine, _ = make_engine()
    engine.submit(make_request("d", 5, max_tokens=1, role=RequestRole.DECODE))
    engine.step()
    end = engine.continue_request("d", [7])
    assert end is not None
    assert end.reason is FinishReason.LENGTH
    assert engine.scheduler.pool.num_free == 16


def test_unknown_names_are_ignored():
    engine, _ = make_engine()
    assert engine.cancel("nobody") is None
    assert engine.continue_request("nobody", [1]) is None
    engine.credit("nobody", 5)
    engine.scheduler.kv_available("nobody", 3)


def test_the_same_id_twice_is_refused():
    engine, _ = make_engine()
    engine.submit(make_request("a", 3))
    with pytest.raises(InvalidRequest, match="stream_id"):
        engine.submit(make_request("a", 3))


def test_a_request_whose_logits_are_no_numbers_fails():
    """It ended well, and empty: token 0 stands first among NaNs, and was the end of text."""
    engine, runner = make_engine()
    runner.next_token = NO_TOKEN
    engine.submit(make_request("a", 5))
    assert finish_all(engine) == {"a": FinishReason.FAILED}
    assert engine.scheduler.pool.num_referenced == 0


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_client_that_does_not_read_gives_its_blocks_to_one_that_waits(max_num_seqs):
    """It held them for as long as it did not read, and nobody else was admitted."""
    engine, _ = make_engine(num_blocks=6, max_num_seqs=max_num_seqs, context=24)
    slow = make_request("slow", 18, max_tokens=5)
    slow.window_tokens = 1
    engine.submit(slow)
    while engine.step() is not None:
        pass
    assert slow.is_stalled
    engine.submit(make_request("quick", 11, max_tokens=3, arrival=1.0, start=20))
    assert finish_all(engine) == {"quick": FinishReason.LENGTH}
    engine.credit("slow", 100)
    assert finish_all(engine) == {"slow": FinishReason.LENGTH}


def test_continue_up_to_the_context_ends_the_request():
    engine, _ = make_engine(context=12)
    engine.submit(make_request("d", 11, max_tokens=9, role=RequestRole.DECODE))
    end = engine.continue_request("d", [3])
    assert end is not None
    assert end.reason is FinishReason.LENGTH


def test_what_is_written_back_holds_no_blocks_behind_its_step():
    """A tier that says nothing kept blocks of ended requests, and streams that did not need it were preempted."""
    engine, runner = make_engine(num_blocks=16, context=60, budget=100, writes_back=True)
    runner.holds_back = True
    engine.submit(make_request("ended", 14, max_tokens=3))
    while engine.scheduler.requests:
        engine.step()
    assert runner.begun
    assert engine.scheduler.pool.num_referenced == 0
    engine.submit(make_request("other", 40, max_tokens=16, start=3))
    while engine.scheduler.requests:
        engine.step()
    assert engine.scheduler.num_preemptions == 0
    runner.holds_back = False
    assert finish_all(engine) == {}
    engine.scheduler.pool.check()


def test_a_request_that_comes_back_takes_no_drafts_and_no_planned_blocks():
    """An earlier request that was admitted late took the blocks of a later one that the same plan had."""
    engine, runner = make_engine(num_blocks=4, budget=20, context=16)
    engine.submit(make_request("late", 6, max_tokens=9, arrival=1.0))
    engine.step()
    early = make_request("early", 7, max_tokens=9, start=20)
    engine.submit(early)
    engine.scheduler.propose("early", [7, 7, 7])
    engine.step()
    plan = runner.plans[-1]
    assert len(set(plan.rows)) == len(plan.rows) == 2
    assert not plan.has_preempted
    assert set(finish_all(engine)) == {"early", "late"}
