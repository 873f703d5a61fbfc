"""A plan survives its wire form, and changes leave a rank where full plans leave it."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grammars.grammar import Grammar, GrammarKind
from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import BlockTransfer, ModelRunnerOutput, RowState, SchedulerOutput, TransferDone
from workers.runtime.rank_state import PlanGap, RankState
from workers.sampling.params import SamplingParams, SamplingRows

SAMPLING = SamplingParams(temperature=0.7, top_p=0.25, top_k=2**31 - 1, seed=2**64 - 3)


def test_round_trip():
    names = [bytes(range(16)), bytes(range(240, 256))]
    plan = SchedulerOutput(
        rows=[3, 0],
        start_positions=[10, 40],
        num_tokens=[3, 1],
        write_from=[12, 40],
        num_logits=[2, 1],
        num_prompt_logits=[1, 0],
        prompt_targets=[88],
        num_known=[3, 0],
        token_ids=[5, 6, 7],
        new_rows=[RowState(3, 9, SAMPLING, [[3, 1, 4], [1]])],
        new_blocks=[0, 0, 10, 77, 1, 0, 10, 78],
        loads=[BlockTransfer(1, 1, names, [7, 8], [16, 3])],
        ends_prompts=True,
        stores=[BlockTransfer(2, 0, names[:1], [0], [16], is_copied=True), BlockTransfer(3, 0, names[1:], [1], [2])],
    )
    found = decode_plan(encode_plan(plan, 17, is_full=True, polls=[4, 9]))
    assert (found.sequence, found.is_full, found.polls) == (17, True, [4, 9])
    for column in (
        "rows",
        "start_positions",
        "num_tokens",
        "write_from",
        "num_logits",
        "num_known",
        "token_ids",
        "num_prompt_logits",
        "prompt_targets",
    ):
        assert getattr(found, column).tolist() == getattr(plan, column), column
    (row,) = found.new_rows
    assert (row.row, row.num_prompt_tokens, row.block_tables) == (3, 9, [[3, 1, 4], [1]])
    for field in fields(SamplingRows):  # whatever the sampler goes by
        assert getattr(row.sampling, field.name) == getattr(SAMPLING, field.name), field.name
    assert found.new_blocks.tolist() == [[0, 0, 10, 77], [1, 0, 10, 78]]
    assert (found.loads, found.stores, found.ends_prompts) == (plan.loads, plan.stores, True)


@pytest.mark.parametrize("source", ["a", "[a-z]+\u00e9", "x" * 1001])
def test_a_grammar_reaches_the_ranks_whole(source):
    grammar = Grammar(GrammarKind.REGEX, source)
    state = RowState(2, 1, SamplingParams(grammar=grammar), [[4]], [9, 8], [5])
    other = RowState(0, 1, SamplingParams(logit_bias={3: 1.0}), [[6]], [], [])
    found = decode_plan(encode_plan(SchedulerOutput(new_rows=[state, other]), 1, is_full=True)).new_rows
    assert [row.sampling.grammar for row in found] == [grammar, None]
    assert (list(found[0].history), list(found[0].stop_ids), found[1].sampling.logit_bias) == ([9, 8], [5], {3: 1.0})


def test_an_empty_plan_is_its_header():
    words = encode_plan(SchedulerOutput(), 1)
    assert words.dtype == np.int32
    assert len(words) == 12
    assert decode_plan(words).num_requests == 0


def test_a_decode_step_takes_as_many_words_in_any_context():
    def words_of(context: int) -> int:
        scheduler = make_scheduler(256)
        for i in range(3):
            request = Request(f"r{i}", [1] * context, context, SamplingParams(max_tokens=99), arrival_time_s=float(i))
            scheduler.add(request)
        while True:
            plan = scheduler.schedule()
            if plan.num_tokens == [1, 1, 1] and not plan.new_rows:
                return len(encode_plan(plan, 4))
            scheduler.update(plan, ModelRunnerOutput([2] * sum(plan.num_logits)))

    assert words_of(17) == words_of(121) < 40


def test_a_rank_that_missed_a_plan_refuses_changes_until_a_full_plan_comes():
    state = RankState(2, 4)
    row = RowState(1, 3, SAMPLING, [[5, 6]])
    with pytest.raises(PlanGap, match="plan 1 of changes follows plan 0"):
        state.apply(decode_plan(encode_plan(SchedulerOutput(), 1)))
    state.apply(decode_plan(encode_plan(SchedulerOutput(new_rows=[row]), 7, is_full=True)))
    with pytest.raises(PlanGap, match="plan 9 of changes follows plan 7"):
        state.apply(decode_plan(encode_plan(SchedulerOutput(new_blocks=[0, 1, 2, 9]), 9)))
    assert state.block_tables[0][1].tolist() == [5, 6, 0, 0]
    with pytest.raises(PlanGap):  # the one that would have followed comes too late
        state.apply(decode_plan(encode_plan(SchedulerOutput(new_blocks=[0, 1, 2, 9]), 8)))
    state.apply(decode_plan(encode_plan(SchedulerOutput(new_rows=[row]), 10, is_full=True)))
    state.apply(decode_plan(encode_plan(SchedulerOutput(new_blocks=[0, 1, 2, 9]), 11)))
    assert state.block_tables[0][1].tolist() == [5, 6, 9, 0]


def make_scheduler(num_blocks: int, num_groups: int = 1) -> Scheduler:
    pools = BlockPools([BlockPool(num_blocks, 4) for _ in range(num_groups)], [0, 6][:num_groups])
    return Scheduler(SchedulerConfig(3, 9, 200), pools, b"f" * 16, frozenset())


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.booleans()), min_size=1, max_size=8),
    num_blocks=st.integers(14, 24),
    num_groups=st.integers(1, 2),
    joins=st.lists(st.booleans(), max_size=60),
)
def test_changes_leave_a_rank_where_the_leaders_tables_are(shapes, num_blocks, num_groups, joins):
    """A rank that follows from the start, and one that joins now and then, know all blocks that a step reads."""
    scheduler = make_scheduler(num_blocks, num_groups)
    for i, (num_tokens, max_tokens, is_slow) in enumerate(shapes):
        ids = [(7 * i + j) % 50 for j in range(num_tokens)]
        request = Request(
            f"r{i}", ids, num_tokens, SamplingParams(max_tokens=max_tokens, seed=i), arrival_time_s=float(i)
        )
        request.window_tokens = 2 if is_slow else 1 << 40
        scheduler.add(request)
    follower, joining = RankState(3, 64, num_groups), RankState(3, 64, num_groups)
    for step in range(300):
        has_joined = step == 0 or (step < len(joins) and joins[step])
        if has_joined:
            joining = RankState(3, 64, num_groups)
            scheduler.rows.resend()
        plan = scheduler.schedule()
        sent = decode_plan(encode_plan(plan, step + 1, has_joined))
        for state in (follower, joining):
            state.apply(sent)
            for chunk in plan.chunks():
                assert state.sampling.seed[chunk.row] == chunk.request.sampling.seed
                assert state.num_prompt_tokens[chunk.row] == chunk.request.num_prompt_tokens
                for group, table in enumerate(chunk.request.block_tables):
                    known = state.block_tables[group][chunk.row]
                    assert known[table.num_released : len(table.block_ids)].tolist() == table.held
        ended = [TransferDone(t.transfer_id, len(t.block_ids)) for t in (*plan.loads, *plan.stores)]
        result = scheduler.update(plan, ModelRunnerOutput([3] * sum(plan.num_logits), transfers=ended))
        for request, _ in result.finished:
            scheduler.finish(request)
        if step % 5 == 4:
            for request in scheduler.requests.values():
                request.window_tokens += 3
        scheduler.pool.check()
        if not scheduler.has_work():
            break
    assert not scheduler.requests
    assert scheduler.pool.num_referenced == 0
