"""Async scheduling: the same tokens as when every step waits for the one before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.engine_group import EngineGroup, run_on
from tests.workers.paged_runner import BLOCK_SIZE, VOCAB, make
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import FinishReason, Request, RequestRole
from workers.engine.step import SchedulerOutput
from workers.runtime.rank_state import RankState
from workers.sampling.params import SamplingParams


def request(name: str, length: int, max_tokens: int, start: int = 0, **options) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **options)
    return Request(name, [(start + i) % 20 for i in range(length)], length, sampling)


def run(engine: Engine, requests: list[Request], per_step: int) -> tuple[dict, dict]:
    """Submits so many requests before each step; all tokens and all ends."""
    tokens, ends = run_on(engine, requests, per_step)
    engine.close()
    return tokens, {name: end.reason for name, end in ends.items()}


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
    assert len(engine.step().tokens) == 0  # started
    assert len(runner.queue) == 1
    first = engine.step()
    assert [t.position for t in first.tokens] == [0]
    assert len(runner.queue) == 1  # the second is in flight already
    plan, _ = runner.queue[0]
    assert (plan.rows.tolist(), plan.start_positions.tolist(), plan.num_logits.tolist()) == ([0], [3], [1])
    assert plan.num_known.tolist() == [0]  # only the device knows the token


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
def test_steps_go_on_while_blocks_move(role):
    """Steps that moved blocks were waited for, and nothing was planned beside them."""
    engine, runner = make(40, 8, is_async=True)
    engine.submit(request("other", 3, 40, start=5, ignore_eos=True))
    mine = request("a", 9, 4, ignore_eos=True)
    mine.role = role
    engine.submit(mine)
    if role is RequestRole.DECODE:
        names = engine.scheduler._names.of_prompt(mine)
        ids = mine.token_ids
        runner.tier = {(0, name): ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i, name in enumerate(names)}
        engine.scheduler.kv_available("a", 3)
        engine.continue_request("a", [7])
    reasons: list[FinishReason] = []
    num_beside = 0
    for _ in range(30):
        moving = bool(runner.begun)
        events = engine.step()
        num_beside += moving and bool(runner.queue)
        reasons += [end.reason for end in events.ended if end.request_id == "a"] if events else []
        if reasons:
            break
    assert num_beside > 0
    assert reasons == [FinishReason.PREFILLED if role is RequestRole.PREFILL else FinishReason.LENGTH]


@pytest.mark.parametrize("is_async", [False, True])
@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(0, 2)), min_size=1, max_size=4),
    num_blocks=st.integers(7, 16),
    budget=st.integers(2, 12),
    drafts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 22)), max_size=40),
    resends=st.lists(st.booleans(), max_size=20),
)
def test_drafts_and_ranks_that_join_change_no_token(is_async, shapes, num_blocks, budget, drafts, resends):
    """Speculation by equality: right drafts, wrong ones and none give the same tokens; so do full plans and changes."""

    def requests() -> list[Request]:
        return [request(f"r{i}", n, m, 3 * start, ignore_eos=True) for i, (n, m, start) in enumerate(shapes)]

    plain, _ = make(num_blocks, 12, is_async=False)
    expected, _ = run(plain, requests(), 3)
    engine, runner = make(num_blocks, budget, is_async)
    for new in requests():
        engine.submit(new)
    tokens: dict[str, list[int]] = {name: [] for name in expected}
    for step in range(3000):
        for name, (num_tokens, wrong) in zip(sorted(engine.scheduler.requests), drafts[step : step + 4], strict=False):
            coming = expected[name][len(tokens[name]) :][:num_tokens]
            engine.scheduler.propose(name, [*coming[:-1], wrong] if wrong % 2 else coming)
        if step < len(resends) and resends[step] and not engine._in_flight:
            engine.resend_state()
            runner.state = RankState(3, num_blocks)  # it joins, and knows nothing
        events = engine.step()
        if events is None and not engine.scheduler.has_work():
            break
        for token in events.tokens if events else ():
            assert token.position == len(tokens[token.request_id])
            tokens[token.request_id].append(token.token_id)
    assert tokens == expected
    assert engine.scheduler.pool.num_referenced == 0
    engine.scheduler.pool.check()


def test_right_drafts_take_fewer_steps():
    plain, _ = make(16, 12, is_async=False)
    expected, _ = run(plain, [request("a", 3, 13, ignore_eos=True)], 1)
    for is_async in (False, True):
        engine, _ = make(16, 12, is_async)
        engine.submit(request("a", 3, 13, ignore_eos=True))
        tokens: list[int] = []
        for _ in range(100):
            engine.scheduler.propose("a", expected["a"][len(tokens) :][:3])
            events = engine.step()
            if events is None:
                break
            tokens += [token.token_id for token in events.tokens]
        assert tokens == expected["a"]
        assert engine.counters.num_steps < 6, is_async


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
