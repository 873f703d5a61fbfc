"""Small steps take one thread, where all of them would hardly be faster."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from workers.runtime.step_threads import StepThreads


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def steps_of(law: Callable[[int, int], float]) -> Callable[[int], None]:
    """Steps that last as a law says, in seconds, of their tokens and threads."""
    return lambda num_tokens: time.sleep(law(num_tokens, torch.get_num_threads()))


def used(threads: StepThreads, num_tokens: int) -> int:
    threads.set_for(num_tokens, 100)
    return torch.get_num_threads()


def test_a_step_takes_all_threads_from_where_they_pay() -> None:
    threads = StepThreads(4)
    assert used(threads, 1) == 4
    threads.measure(steps_of(lambda n, t: 0.004 + 0.001 * n / t), [1, 4, 16])
    assert [used(threads, n) for n in (1, 2, 16, 1, 512)] == [1, 4, 4, 1, 4]


def test_where_threads_do_not_help_every_measured_step_takes_one() -> None:
    threads = StepThreads(2)
    threads.measure(steps_of(lambda n, t: 0.002), [1, 4, 16])
    assert [used(threads, n) for n in (1, 16, 17)] == [1, 1, 2]


def test_a_long_context_takes_all_threads() -> None:
    threads = StepThreads(2)
    threads.measure(steps_of(lambda n, t: 0.002), [1, 4])
    threads.set_for(1, 5000)
    assert torch.get_num_threads() == 2


def test_what_threads_save_must_be_more_than_the_others_work() -> None:
    """1 ms for a step, and more with its tokens: a tenth of a long step is worth it, a third of a short one is not."""
    threads = StepThreads(2)
    threads.measure(steps_of(lambda n, t: 0.0015 * n if t == 1 else 0.001 * n), [1, 20])
    assert [used(threads, n) for n in (1, 20)] == [1, 2]
    threads = StepThreads(2)
    threads.measure(steps_of(lambda n, t: 0.040 if t == 1 else 0.036), [1])
    assert used(threads, 1) == 2


def test_ranks_agree_on_the_least() -> None:
    counts: list[int] = []
    threads = StepThreads(2)
    threads.measure(steps_of(lambda n, t: 0.002), [1, 4, 16], lambda count: counts.append(count) or 2)
    assert counts == [3]
    assert [used(threads, n) for n in (4, 5)] == [1, 2]


def test_where_they_always_help_none_does() -> None:
    threads = StepThreads(2)
    threads.measure(steps_of(lambda n, t: 0.012 * n / t), [1, 4, 16])
    assert [used(threads, n) for n in (1, 16, 512)] == [2, 2, 2]


def test_one_thread_is_not_measured() -> None:
    def run(num_tokens: int) -> None:
        raise AssertionError

    threads = StepThreads(1)
    threads.measure(run, [1, 4])
    assert used(threads, 1) == 1
