"""How a plan reaches all ranks of a worker.

The leader (rank 0) broadcasts each plan as int32 words and carries out its own share; the others follow in a loop.
Knows nothing of scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.step import ModelRunner, ModelRunnerOutput, SchedulerOutput, StepPlan
from workers.parallel import ParallelGroups

FIXED_WORDS = 4096  # most decode steps fit; a longer plan takes a second message
_STOP = -1  # in place of a plan's sequence number
_MAX_SEQUENCE = (1 << 31) - 1


class GroupExecutor:
    """The leader's side.

    num_threads: with it, steps are started in a thread of their own, as on a device that computes while the host
    launches, and that thread computes with so many. One thread, so that steps and the messages of all ranks keep their
    order. None: steps are started in the caller's thread.
    """

    def __init__(self, runner: ModelRunner, groups: ParallelGroups, num_threads: int | None = None) -> None:
        self._runner = runner
        self._groups = groups
        self._sequence = 0
        self._is_full = True  # no rank has seen a plan of this executor
        self._thread: ThreadPoolExecutor | None = None
        if num_threads is not None:
            self._thread = ThreadPoolExecutor(1, "step", torch.set_num_threads, (num_threads,))

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """Send the plan to all ranks, and begin this rank's part; the returned call waits for its end."""
        self._sequence = self._sequence % _MAX_SEQUENCE + 1
        polls = self._runner.ended_transfers() if self._groups.world_size > 1 else ()
        words = encode_plan(plan, self._sequence, self._is_full, polls)
        self._is_full = False
        if self._thread is None:
            return self._start(torch.from_numpy(words))
        started = self._thread.submit(self._start, torch.from_numpy(words))
        return lambda: started.result()()

    def _start(self, words: torch.Tensor) -> Callable[[], ModelRunnerOutput]:
        return self._runner.start(_plan_of(self._groups.broadcast_words(words, FIXED_WORDS)))

    @property
    def has_ended_transfers(self) -> bool:
        """As in Executor."""
        return bool(self._runner.ended_transfers())

    def resend(self) -> None:
        """A rank has lost its rows: the next plan is full. The scheduler must resend its rows too."""
        self._is_full = True

    def stop(self) -> None:
        """End the followers' loops."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._groups.world_size > 1:
            self._groups.broadcast_words(torch.tensor([_STOP], dtype=torch.int32), FIXED_WORDS)


def follow(runner: ModelRunner, groups: ParallelGroups) -> None:
    """The other ranks' side: carry out plans until the leader says stop; RuntimeError when the leader is lost."""
    while True:
        words = groups.broadcast_words(None, FIXED_WORDS)
        if words[0] == _STOP:
            return
        runner.start(_plan_of(words))


def _plan_of(words: torch.Tensor) -> StepPlan:
    return decode_plan(np.ascontiguousarray(words.numpy()))
