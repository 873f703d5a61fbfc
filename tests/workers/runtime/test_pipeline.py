"""Several plans in flight: the same tokens as with one, each request in one at a time, and all about equally large."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.engine.test_async_scheduling import request, run
from tests.workers.paged_runner import make


@pytest.mark.parametrize("is_async", [False, True])
@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 14), st.integers(0, 3), st.booleans()), min_size=1, max_size=9
    ),
    num_blocks=st.integers(7, 24),
    budget=st.integers(1, 12),
    per_step=st.integers(1, 4),
    num_stages=st.integers(2, 4),
)
def test_tokens_and_ends_are_those_of_one_stage(is_async, shapes, num_blocks, budget, per_step, num_stages):
    """With prefix hits, chunks, and preemption where there are few blocks."""
    results = []
    for stages, is_ahead in ((1, False), (num_stages, is_async)):
        engine, runner = make(num_blocks, budget, is_ahead, max_num_seqs=5, num_stages=stages)
        requests = [
            request(f"r{i}", length, max_tokens, 3 * start, ignore_eos=ignore_eos)
            for i, (length, max_tokens, start, ignore_eos) in enumerate(shapes)
        ]
        results.append(run(engine, requests, per_step))
        assert runner.most_in_flight <= stages + is_ahead
    assert results[0] == results[1]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_all_plans_in_flight_are_about_equally_large(is_async, num_stages):
    engine, runner = make(200, 64, is_async, max_num_seqs=12, num_stages=num_stages)
    for i in range(11):
        engine.submit(request(f"r{i}", 3, 40, start=i, ignore_eos=True))
    sizes: list[list[int]] = []
    for step in range(60):
        engine.step()
        if 10 <= step < 50:
            sizes.append([plan.num_requests for plan, _ in runner.queue])
    assert {len(plans) for plans in sizes} == {num_stages - 1 + is_async}
    fewest, most = 11 // num_stages, -(-11 // num_stages)
    assert {size for plans in sizes for size in plans} <= {fewest - 1, fewest, most}
    assert engine.counters.num_steps >= 50, "one request more or less in a plan, but never none"


def test_waiting_requests_without_blocks_do_not_bring_running_ones_together():
    """The share of a plan was counted with those that cannot be admitted: then one plan took all, and the next none."""
    engine, runner = make(16, 64, False, max_num_seqs=12, num_stages=2)
    for i in range(12):
        engine.submit(request(f"r{i}", 9, 4, start=i, ignore_eos=True))
    sizes: list[int] = []
    for _ in range(8):
        engine.step()
        sizes += [plan.num_requests for plan, _ in runner.queue]
    assert sizes[1:7] == [3, 2, 3, 2, 3, 2], "5 of 12 requests fit at a time"


def test_chunks_of_a_prompt_follow_each_other_without_a_wait():
    engine, runner = make(40, 8, False, max_num_seqs=4, num_stages=3)
    engine.submit(request("long", 40, 4, ignore_eos=True))
    assert [engine.step() is not None for _ in range(2)] == [True, True]
    assert [plan.start_positions.tolist() for plan, _ in runner.queue] == [[0], [8]]
