"""A step that raises costs the requests in it: the others get the tokens that they would have got."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.engine.test_async_scheduling import request
from tests.workers.engine_group import run_on
from tests.workers.paged_runner import BLOCK_SIZE, make
from workers.engine.engine import MAX_FAILED_STEPS
from workers.engine.request import FinishReason, RequestRole
from workers.errors import StepFailed


@pytest.mark.parametrize(("is_async", "num_stages"), [(False, 1), (True, 1), (False, 2), (True, 2), (True, 3)])
@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 14), st.integers(0, 3)), min_size=1, max_size=8),
    num_blocks=st.integers(7, 24),
    budget=st.integers(2, 12),
    failing=st.sets(st.integers(1, 40), max_size=6),
    writes_back=st.booleans(),
)
def test_the_others_go_on_with_the_same_tokens(is_async, num_stages, shapes, num_blocks, budget, failing, writes_back):
    """With blocks on their way to the tiers, and preempted requests whose blocks were swapped there."""

    def requests():
        return [request(f"r{i}", n, m, 3 * start, ignore_eos=True) for i, (n, m, start) in enumerate(shapes)]

    expected, _ = run_on(make(num_blocks, 12, False)[0], requests())
    engine, runner = make(num_blocks, budget, is_async, num_stages=num_stages, writes_back=writes_back)
    raised: list[bool] = []  # of each step that was carried out

    def fails(plan) -> bool:
        if plan.num_requests:
            raised.append(plan.sequence in failing and not all(raised[-2:] or [False]))
        return bool(plan.num_requests) and raised[-1]

    runner.fails = fails
    tokens, ends = run_on(engine, requests())
    assert runner.num_recoveries == sum(raised)
    failed = {name for name, end in ends.items() if end.reason is FinishReason.STEP_FAILED}
    assert len(failed) == 0 or any(raised)  # none where a later plan had preempted the step's requests
    for name, expected_tokens in expected.items():
        if name in failed:
            assert tokens[name] == expected_tokens[: len(tokens[name])]
            assert ends[name].error == "MemoryError: no memory left for this step"
        else:
            assert tokens[name] == expected_tokens


def test_only_the_requests_of_the_step_end():
    engine, runner = make(40, 12, False, num_stages=2, max_num_seqs=4)
    for name in "abcd":
        engine.submit(request(name, 3, 6, start=ord(name), ignore_eos=True))
    runner.fails = lambda plan: plan.sequence == 5
    ends: dict[str, FinishReason] = {}
    while (events := engine.step()) is not None:
        ends.update((end.request_id, end.reason) for end in events.ended)
    assert ends == {
        **dict.fromkeys("ab", FinishReason.STEP_FAILED),
        **dict.fromkeys("cd", FinishReason.LENGTH),
    }


@pytest.mark.parametrize("role", [RequestRole.PREFILL, RequestRole.DECODE])
def test_blocks_that_moved_when_a_step_raised_are_not_waited_for(role):
    engine, runner = make(60, 8, False, writes_back=True)
    mine, other = request("a", 9, 6, ignore_eos=True), request("other", 3, 30, start=5, ignore_eos=True)
    mine.role = role
    engine.submit(mine)
    engine.submit(other)
    if role is RequestRole.DECODE:
        names = engine.scheduler._names.of_prompt(mine)
        ids = mine.token_ids
        runner.tier = {(0, name): ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i, name in enumerate(names)}
        engine.scheduler.kv_available("a", 3)
        engine.continue_request("a", [7])
    was_moving: list[bool] = []

    def fails(plan) -> bool:
        is_first = bool(runner.begun) and plan.num_requests > 0 and not was_moving
        was_moving.extend([True] * is_first)
        return is_first

    runner.fails = fails
    reasons: dict[str, FinishReason] = {}
    for _ in range(80):
        events = engine.step()
        reasons.update((end.request_id, end.reason) for end in events.ended if events)
        if len(reasons) == 2:
            break
    assert was_moving
    assert FinishReason.STEP_FAILED in reasons.values()
    assert set(reasons) == {"a", "other"}
    while engine.step() is not None or engine.scheduler.transfers:
        pass
    engine.scheduler.pool.check()
    assert engine.scheduler.pool.num_referenced == 0


def test_three_in_a_row_end_the_engine_and_a_good_step_begins_the_count_anew():
    engine, runner = make(40, 12, False)
    runner.fails = lambda plan: plan.sequence not in (3, 6)
    for i in range(7):
        engine.submit(request(f"r{i}", 3, 4, start=i, ignore_eos=True))
        if i < 6:
            assert engine.step() is not None
    for i in range(10, 10 + MAX_FAILED_STEPS - 1):
        engine.step()
        engine.submit(request(f"r{i}", 3, 4, start=i, ignore_eos=True))
    with pytest.raises(StepFailed, match=r"^3 steps in a row failed; the last: MemoryError: no memory left"):
        engine.step()
