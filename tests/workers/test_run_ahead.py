"""Async scheduling: the same tokens as when every step waits for the one before it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block_pool import BlockPool
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.config import EngineConfig
from workers.engine import Engine
from workers.request import FinishReason, Request, RequestRole, SamplingParams
from workers.scheduler import Scheduler, SchedulerConfig
from workers.step import ModelRunnerOutput, SchedulerOutput, pending_place

BLOCK_SIZE, VOCAB, EOS = 4, 23, 22


class PagedRunner:
    """Runs steps late and in order, on a paged cache of tokens. The next token is a digest of all that it reads there.

    A wrong place, a stray write or a block that is reused too early changes it.
    """

    def __init__(self, num_blocks: int) -> None:
        self.cache = [-1] * (num_blocks * BLOCK_SIZE)
        self.queue: list[tuple[SchedulerOutput, list[int]]] = []
        self.last: list[int] = []
        self.most_in_flight = 0

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        sampled: list[int] = []
        self.queue.append((plan, sampled))
        self.most_in_flight = max(self.most_in_flight, len(self.queue))

        def wait() -> ModelRunnerOutput:
            while any(s is sampled for _, s in self.queue):
                self._run(*self.queue.pop(0))
            return ModelRunnerOutput(
                sampled, [len(t.block_ids) for t in plan.loads], [len(t.block_ids) for t in plan.stores]
            )

        return wait

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        return self.start(plan)()

    def stop(self) -> None:
        assert not self.queue

    def _run(self, plan: SchedulerOutput, sampled: list[int]) -> None:
        for r in plan.requests:
            slots = [block * BLOCK_SIZE + i for block in r.block_table for i in range(BLOCK_SIZE)]
            for i, token in enumerate(r.token_ids, r.start_position):
                place = pending_place(token)
                if i >= r.write_from:
                    self.cache[slots[i]] = token if place is None else self.last[place]
            context = [self.cache[slot] for slot in slots[: r.start_position + len(r.token_ids)]]
            assert -1 not in context, "reads only what was written"
            if r.sample is not None:
                sampled.append(zlib.crc32(bytes([*context, r.sample.position])) % VOCAB)
        self.last = list(sampled)


def make(num_blocks: int, budget: int, is_async: bool, max_num_seqs: int = 3) -> tuple[Engine, PagedRunner]:
    runner = PagedRunner(num_blocks)
    config = SchedulerConfig(max_num_seqs, budget, num_blocks * BLOCK_SIZE)
    scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK_SIZE), b"f" * 16, frozenset({EOS}))
    return Engine(scheduler, runner, VOCAB, lambda: 0.0, is_async), runner


def request(name: str, length: int, max_tokens: int, start: int = 0, **options) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **options)
    return Request(name, [(start + i) % 20 for i in range(length)], length, sampling)


def run(engine: Engine, requests: list[Request], per_step: int) -> tuple[dict, dict]:
    """Submits so many requests before each step; all tokens and all ends."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    ends: dict[str, FinishReason] = {}
    coming = list(requests)
    for _ in range(2000):
        for new in coming[:per_step]:
            engine.submit(new)
        del coming[:per_step]
        events = engine.step()
        if events is None and not coming:
            break
        for token in events.tokens if events else ():
            assert token.position == len(tokens[token.request_id])
            tokens[token.request_id].append(token.token_id)
        ends.update((end.request_id, end.reason) for end in events.ended if events)
    assert set(ends) == set(tokens)
    assert engine.scheduler.pool.num_referenced == 0
    engine.scheduler.pool.check()
    engine.close()
    return tokens, ends


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 14), st.integers(0, 3), st.booleans()), min_size=1, max_size=7
    ),
    num_blocks=st.integers(7, 16),
    budget=st.integers(1, 12),
    per_step=st.integers(1, 3),
)
def test_tokens_and_ends_are_those_of_waiting(shapes, num_blocks, budget, per_step):
    results = []
    for is_async in (False, True):
        engine, runner = make(num_blocks, budget, is_async)
        requests = [
            request(f"r{i}", length, max_tokens, 3 * start, ignore_eos=ignore_eos)
            for i, (length, max_tokens, start, ignore_eos) in enumerate(shapes)
        ]
        results.append(run(engine, requests, per_step))
        assert runner.most_in_flight <= 1 + is_async
    assert results[0] == results[1]


def test_the_next_step_is_started_before_the_last_is_through():
    engine, runner = make(16, 8, is_async=True)
    engine.submit(request("a", 3, 8, ignore_eos=True))
    assert engine.step().tokens == []  # started
    assert len(runner.queue) == 1
    first = engine.step()
    assert [t.position for t in first.tokens] == [0]
    assert len(runner.queue) == 1  # the second is in flight already
    (chunk,) = runner.queue[0][0].requests
    assert (list(chunk.token_ids), chunk.start_position, chunk.sample.position) == ([-1], 3, 1)


def test_what_stops_is_computed_once_in_vain_and_says_nothing_more():
    for stop in range(VOCAB):  # whatever the first token is, one of them is it
        engine, _ = make(16, 8, is_async=True)
        tokens, ends = run(engine, [request("a", 3, 8, ignore_eos=True, stop_token_ids=frozenset({stop}))], 1)
        if not tokens["a"]:
            assert ends == {"a": FinishReason.STOP}
            assert engine.counters.num_steps == 2
            return
    raise AssertionError("no token stopped it")


def test_max_tokens_and_the_context_are_not_overrun():
    engine, runner = make(16, 8, is_async=True)
    plans: list[SchedulerOutput] = []
    start = runner.start
    runner.start = lambda plan: (plans.append(plan), start(plan))[1]
    tokens, ends = run(engine, [request("a", 3, 4, ignore_eos=True)], 1)
    assert (len(tokens["a"]), ends) == (4, {"a": FinishReason.LENGTH})
    assert sum(len(plan.requests) for plan in plans) == 4  # the prompt and three tokens: none in vain
    engine, _ = make(2, 8, is_async=True)
    tokens, ends = run(engine, [request("a", 3, 100, ignore_eos=True)], 1)
    assert (len(tokens["a"]), ends) == (5, {"a": FinishReason.LENGTH})


def test_cancelled_in_flight_and_its_id_taken_again():
    engine, _ = make(16, 8, is_async=True)
    engine.submit(request("a", 3, 50, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert engine.cancel("a").reason is FinishReason.CANCELLED
    other = request("a", 5, 6, start=9, ignore_eos=True)  # while the first one's step still runs
    alone, _ = make(16, 8, is_async=False)
    expected, _ = run(alone, [request("a", 5, 6, start=9, ignore_eos=True)], 1)
    assert run(engine, [other], 1)[0] == expected


def test_a_slow_client_stops_its_request_in_time():
    engine, _ = make(16, 8, is_async=True)
    slow = request("a", 3, 50, ignore_eos=True)
    slow.window_tokens = 2
    engine.submit(slow)
    got = [len(events.tokens) for _ in range(6) if (events := engine.step()) is not None]
    assert sum(got) == 2
    engine.credit("a", 3)
    got = [len(events.tokens) for _ in range(8) if (events := engine.step()) is not None]
    assert sum(got) == 3


@pytest.mark.parametrize("role", [RequestRole.PREFILL, RequestRole.DECODE])
def test_a_step_that_moves_blocks_is_waited_for(role):
    engine, runner = make(16, 8, is_async=True)
    mine = request("a", 9, 4, ignore_eos=True)
    mine.role = role
    engine.submit(mine)
    if role is RequestRole.DECODE:
        engine.scheduler.kv_available("a", 3)
        engine.continue_request("a", [7])
        runner.cache[:12] = range(12)  # the tiers' blocks
    reasons = []
    for _ in range(30):
        moving = [plan for plan, _ in runner.queue if plan.loads or plan.stores]
        events = engine.step()
        if moving:
            assert not runner.queue, "nothing is started beside it"
        reasons += [end.reason for end in events.ended] if events else []
    assert reasons == [FinishReason.PREFILLED if role is RequestRole.PREFILL else FinishReason.LENGTH]


@pytest.mark.parametrize("tp", [1, 2])
def test_the_models_tokens_are_the_same(tp, tmp_path: Path):
    path = make_checkpoint("gqa", tmp_path)
    generator = torch.Generator().manual_seed(1)
    whole = prompts() + [torch.randint(97, (n,), generator=generator).tolist() for n in (1, 30)]
    with EngineGroup(tp, 1) as group:
        for sampling, num_blocks, chunk, graphs in (
            (SamplingParams(max_tokens=12, ignore_eos=True), 14, 512, True),
            (SamplingParams(1.2, 0.9, seed=3, max_tokens=12, stop_token_ids=frozenset(range(20))), 64, 7, False),
        ):
            waiting = EngineConfig(
                str(path), "float32", "cpu", tp=tp, block_size=4, num_blocks=num_blocks,
                max_num_batched_tokens=chunk, max_num_seqs=4, cuda_graphs=graphs,
            )  # fmt: skip
            expected = group.run(waiting, whole, sampling)
            found = group.run(replace(waiting, async_scheduling=True), whole, sampling)
            assert found.completions == expected.completions
            assert (len({len(c) for c in found.completions}) > 1) == bool(sampling.stop_token_ids)


def test_it_needs_a_single_stage():
    with pytest.raises(ValueError, match=r"^async_scheduling: needs pp=1"):
        EngineConfig("dir", pp=2, async_scheduling=True)
