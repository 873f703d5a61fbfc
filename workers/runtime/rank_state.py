"""What a rank remembers from plan to plan: the block tables and sampling parameters of all rows.

Plans bring changes only. A rank that misses one cannot go on by changes: it refuses them until a full plan comes. Knows
nothing of devices or models.
"""

from __future__ import annotations

import numpy as np

from workers.engine.step import Ints, RowState, StepPlan
from workers.errors import EngineError
from workers.sampling.params import SamplingRows


class PlanGap(EngineError):
    """A plan of changes does not follow the last plan that this rank has seen."""


class RankState:
    """Rows 0 .. max_num_seqs - 1."""

    def __init__(self, max_num_seqs: int, max_blocks: int, num_groups: int = 1) -> None:
        """max_blocks: of one sequence."""
        self.block_tables: list[Ints] = [np.zeros((max_num_seqs, max_blocks), np.int32) for _ in range(num_groups)]
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self.sampling = SamplingRows.greedy(max_num_seqs)
        self.pools = np.zeros(max_num_seqs, np.bool_)  # rows whose hidden states are wanted
        self.adapter_slots = np.full(max_num_seqs, -1, np.int32)  # -1: no adapter
        self._sequence = 0
        self._is_behind = True

    def apply(self, plan: StepPlan) -> None:
        """Take a plan's changes. Raises PlanGap, and then nothing has changed."""
        if not plan.is_full and (self._is_behind or plan.sequence != self._sequence + 1):
            self._is_behind = True
            raise PlanGap(f"plan {plan.sequence} of changes follows plan {self._sequence}: a full plan is needed")
        self._sequence, self._is_behind = plan.sequence, False
        for state in plan.new_rows:
            self._take_row(state)
        for group, table in enumerate(self.block_tables):
            changes = plan.new_blocks[plan.new_blocks[:, 0] == group] if len(self.block_tables) > 1 else plan.new_blocks
            table[changes[:, 1], changes[:, 2]] = changes[:, 3]

    def _take_row(self, state: RowState) -> None:
        row = state.row
        for table, block_ids in zip(self.block_tables, state.block_tables, strict=True):
            table[row, : len(block_ids)] = block_ids
        self.num_prompt_tokens[row] = state.num_prompt_tokens
        self.sampling.put(row, state.sampling)
        self.pools[row] = state.pools
        self.adapter_slots[row] = state.adapter_slot
