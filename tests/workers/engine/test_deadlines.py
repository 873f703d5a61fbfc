"""Requests whose deadline is over are dropped before they cost a step; and requests that never fit are refused."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from tests.processes import wait_until
from tests.workers.engine.fake_runner import BLOCK_SIZE, EOS, VOCAB, FakeRunner, finish_all, make_engine, make_request
from workers.config import POLICIES, SchedulingOptions
from workers.engine.engine import Engine
from workers.engine.loop import EngineLoop, LoopEvents, Submit
from workers.engine.request import FinishReason, Request, RequestEnd, RequestRole
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.errors import InvalidRequest


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("role", list(RequestRole))
def test_one_that_expires_while_it_waits_costs_nothing(policy, role):
    engine, runner = make_engine(max_num_seqs=1, scheduling=SchedulingOptions(policy=policy))
    now = [0.0]
    engine._clock = lambda: now[0]
    engine.submit(make_request("running", 6, max_tokens=30, ignore_eos=True))
    engine.step()
    late = make_request("late", 9, role=role, arrival=1.0, start=20)
    late.deadline_s = 5.0
    engine.submit(late)
    now[0] = 4.9
    assert list(engine.expire()) == []
    engine.step()
    now[0] = 5.0
    (end,) = engine.expire()
    assert (end.request_id, end.reason) == ("late", FinishReason.CANCELLED)
    assert (end.num_computed_prompt_tokens, end.num_transferred_blocks, end.first_step_time_s) == (0, 0, None)
    assert set(finish_all(engine)) == {"running"}
    assert {request.request_id for plan in runner.plans for request in plan.requests} == {"running"}
    assert engine.scheduler.pool.num_referenced == 0


def test_one_that_expires_with_a_step_in_flight_gets_no_other():
    """With async scheduling its next step may be under way: that one is computed in vain, and none after it."""
    runner = FakeRunner()
    scheduler = Scheduler(SchedulerConfig(4, 8, 48), BlockPools([BlockPool(16, BLOCK_SIZE)]), b"f" * 16, frozenset())
    now = [0.0]
    engine = Engine(scheduler, runner, VOCAB, lambda: now[0], async_scheduling=True)
    request = make_request("r", 3, max_tokens=30)
    request.deadline_s = 5.0
    engine.submit(request)
    engine.step()
    engine.step()
    num_plans, now[0] = len(runner.plans), 5.0
    assert [end.request_id for end in engine.expire()] == ["r"]
    for _ in range(5):
        engine.step()
    assert len(runner.plans) == num_plans
    assert scheduler.pool.num_referenced == 0


@given(st.lists(st.tuples(st.sampled_from(["submit", "cancel", "wait"]), st.integers(0, 9)), max_size=40))
def test_all_that_are_due_expire_and_no_others(changes):
    engine, _ = make_engine(num_blocks=512, max_num_seqs=64, context=48)
    now, due_s = 0.0, {}
    engine._clock = lambda: now
    for index, (change, number) in enumerate(changes):
        if change == "submit":
            request = make_request(f"r{index}", 3)
            request.deadline_s = due_s[request.request_id] = now + number if number else math.inf
            engine.submit(request)
        elif change == "cancel" and due_s:
            request_id = list(due_s)[number % len(due_s)]
            engine.cancel(request_id)
            del due_s[request_id]
        else:
            now += number
        expected = {request_id for request_id, at_s in due_s.items() if at_s <= now}
        assert {end.request_id for end in engine.expire()} == expected
        due_s = {request_id: at_s for request_id, at_s in due_s.items() if request_id not in expected}


class Counted(dict[str, Request]):
    """Requests, and how often all of them were looked at."""

    num_looks = 0

    def values(self):
        self.num_looks += 1
        return super().values()


def test_requests_are_looked_at_only_when_one_is_due():
    engine, _ = make_engine()
    now = [0.0]
    engine._clock = lambda: now[0]
    requests = engine.scheduler.requests = Counted(engine.scheduler.requests)
    for number, deadline_s in enumerate((7.0, 5.0, math.inf)):
        request = make_request(f"r{number}", 3)
        request.deadline_s = deadline_s
        engine.submit(request)

    def expired_at(now_s: float) -> tuple[list[str], bool]:
        """Who expires, and whether all requests were looked at for it."""
        before, now[0] = requests.num_looks, now_s
        return [end.request_id for end in engine.expire()], requests.num_looks > before

    assert [expired_at(now_s) for now_s in (0.0, 4.9, 5.0, 6.9, 9.0, 99.0)] == [
        ([], False), ([], False), (["r1"], True), ([], False), (["r0"], True), ([], False)
    ]  # fmt: skip


class Running:
    """A loop whose only row is taken, and what it ended."""

    def __init__(self) -> None:
        self.engine, self.runner = make_engine(num_blocks=64, max_num_seqs=1, budget=64, context=200)
        self.ended: dict[str, RequestEnd] = {}
        self.failures: list[BaseException] = []
        self.loop = EngineLoop(
            self.engine, None, lambda: [], lambda _: False, self._note, self.failures.append, time.monotonic
        )
        self.engine._clock = time.monotonic
        self.loop.start()

    def _note(self, events: LoopEvents) -> None:
        self.ended |= {end.request_id: end for end in events.step.ended}


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.loop.stop()
    assert made.failures == []


def test_the_loop_drops_it_before_it_plans_a_step(running: Running) -> None:
    """Also where nothing happens: an idle engine looks at its deadlines, too."""
    stalled = make_request("stalled", 6, max_tokens=30)
    stalled.window_tokens = 1  # it holds the row and computes nothing more
    running.loop.post(Submit(stalled))
    wait_until(lambda: running.loop.load.num_generated_tokens == 1, "it stalls")
    late = make_request("late", 9, role=RequestRole.DECODE, start=20)
    late.deadline_s = time.monotonic() + 0.2
    running.loop.post(Submit(late))
    wait_until(lambda: "late" in running.ended, "it expires")
    end = running.ended["late"]
    assert end.reason is FinishReason.CANCELLED
    assert (end.num_computed_prompt_tokens, end.first_step_time_s) == (0, None)
    over = make_request("over", 9, start=30)
    over.deadline_s = time.monotonic() - 1.0  # it was over when it came
    running.loop.post(Submit(over))
    wait_until(lambda: "over" in running.ended, "it expires")
    assert running.ended["over"].first_step_time_s is None


# --------------------------------------------------------------------------------------------- what can never be served


def engine_of(num_blocks: list[int], windows: list[int], context: int) -> Engine:
    pools = BlockPools([BlockPool(count, BLOCK_SIZE) for count in num_blocks], windows)
    scheduler = Scheduler(SchedulerConfig(4, 8, context), pools, b"f" * 16, frozenset({EOS}))
    return Engine(scheduler, FakeRunner(), VOCAB, lambda: 0.0)


@pytest.mark.parametrize("role", list(RequestRole))
@pytest.mark.parametrize(
    ("num_blocks", "windows", "context", "limit"),
    [([6], [0], 1000, 24), ([6], [0], 20, 20), ([9, 6], [0, 0], 1000, 24), ([9, 12], [0, 8], 1000, 36)],
)
def test_a_request_that_never_fits_is_refused_and_the_longest_that_does_is_served(
    role, num_blocks, windows, context, limit
):
    """The blocks of a group that keeps all tokens bound what a request may have, whatever the model allows."""
    engine = engine_of(num_blocks, windows, context)
    with pytest.raises(InvalidRequest, match=rf"^token_ids: {limit} tokens leave no space in a context of {limit}$"):
        engine.submit(make_request("long", limit, role=role))
    assert not engine.scheduler.has_work()
    engine.submit(make_request("fits", limit - 1, max_tokens=9, role=role))
    if role is RequestRole.DECODE:
        assert engine.continue_request("fits", []) is None
    assert finish_all(engine) == {"fits": FinishReason.LENGTH}


def test_requests_grow_to_the_last_block_and_end_there():
    """They were preempted for ever: each alone wanted more blocks than there are."""
    engine = engine_of([6], [0], 1000)
    for i in range(3):
        engine.submit(make_request(f"r{i}", 5, max_tokens=900, arrival=float(i), start=10 * i, ignore_eos=True))
    assert set(finish_all(engine).values()) == {FinishReason.LENGTH}
    assert engine.scheduler.pool.num_referenced == 0
