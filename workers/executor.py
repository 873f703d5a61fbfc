"""How a plan reaches all ranks of a worker.

The leader (rank 0) broadcasts each plan as int32 words and carries out its own share; the others follow in a loop.
Knows nothing of scheduling.
"""

from __future__ import annotations

import numpy as np
import torch

from workers.parallel import ParallelGroups
from workers.step import ModelRunner, ModelRunnerOutput, SchedulerOutput, decode_plan, encode_plan

FIXED_WORDS = 4096  # most decode steps fit; a longer plan takes a second message
_STOP = -1  # in place of the number of requests


class GroupExecutor:
    """The leader's side."""

    def __init__(self, runner: ModelRunner, groups: ParallelGroups) -> None:
        self._runner = runner
        self._groups = groups

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Send the plan to the other ranks, if there are any, and do our share."""
        if self._groups.world_size > 1:
            self._groups.broadcast_words(torch.from_numpy(encode_plan(plan)), FIXED_WORDS)
        return self._runner.execute(plan)

    def stop(self) -> None:
        """End the followers' loops."""
        if self._groups.world_size > 1:
            self._groups.broadcast_words(torch.tensor([_STOP], dtype=torch.int32), FIXED_WORDS)


def follow(runner: ModelRunner, groups: ParallelGroups) -> None:
    """The other ranks' side: carry out plans until the leader says stop; RuntimeError when the leader is lost."""
    while True:
        words = groups.broadcast_words(None, FIXED_WORDS).numpy()
        if words[0] == _STOP:
            return
        runner.execute(decode_plan(np.ascontiguousarray(words)))
