"""Brings the tokens that the last pipeline stage chose to the first one, and to the leader, which is its first rank.

One message per step, and a second one where rows report something. The first stage does not wait for it before a later
plan has a token that is still being chosen. Knows nothing of models.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from workers.engine.step import StepPlan
from workers.parallel import Arriving, ParallelGroups

log = logging.getLogger(__name__)

Read = Callable[[], list[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """The tokens of one step."""

    number: int
    rows: npt.NDArray[np.integer]
    token_ids: Arriving


def _nothing() -> list[Any]:
    return []


class TokenRelay:
    """Of one rank of a worker with several stages.

    is_handed_on: whether plans leave out tokens that are being chosen, as with async scheduling. Then every rank of the
    first stage needs them, else the leader alone.
    """

    def __init__(self, groups: ParallelGroups, max_num_seqs: int, is_handed_on: bool) -> None:
        shard = groups.shard
        takes_part = is_handed_on or shard.tp_rank == 0
        self._groups = groups
        self._is_handed_on = is_handed_on
        self._sends = takes_part and shard.is_last_stage
        self._receives = takes_part and shard.is_first_stage
        self._thread: ThreadPoolExecutor | None = None
        if self._sends and groups.device.type == "cuda":  # the copy from the device is waited for beside the next step
            self._thread = ThreadPoolExecutor(1, "tokens")
        self._last_tokens = np.zeros(max_num_seqs, np.int32)  # of each row of the state
        self._chosen_in = np.zeros(max_num_seqs, np.int64)  # number of the step
        self._number = 0
        self._arriving: deque[_Chosen] = deque()

    def reset(self) -> None:
        """A step raised: nothing arrives any more."""
        self._arriving.clear()

    def complete(self, plan: StepPlan) -> StepPlan:
        """On the first stage: the plan with the tokens that were being chosen when it was made."""
        if not self._receives or len(plan.token_ids) == plan.num_tokens.sum():
            return plan
        pending = np.flatnonzero(plan.num_known < plan.num_tokens)
        rows = plan.rows[pending]
        self._take(int(self._chosen_in[rows].max()))
        token_ids = np.insert(plan.token_ids, np.cumsum(plan.num_known)[pending], self._last_tokens[rows])
        return replace(plan, token_ids=token_ids, num_known=plan.num_tokens)

    def _take(self, number: int) -> None:
        while self._arriving and self._arriving[0].number <= number:
            chosen = self._arriving.popleft()
            # After NO_TOKEN the results of the next step are not used. Of several tokens of a row the last one stays.
            self._last_tokens[chosen.rows] = chosen.token_ids.get().numpy().clip(min=0)

    def send(self, token_ids: Read, numbers: Read, has_numbers: bool) -> None:
        """On the last stage: what these give, in the batch's order; ids int64 [rows] and numbers fp64."""
        if not self._sends:
            return

        def send() -> None:
            self._groups.send_to_first_stage(torch.tensor(token_ids(), dtype=torch.int64))
            if has_numbers and self._groups.shard.tp_rank == 0:
                self._groups.send_to_first_stage(torch.tensor(numbers(), dtype=torch.float64))

        if self._thread is None:
            send()
        else:
            self._thread.submit(send).add_done_callback(self._note_failure)

    def _note_failure(self, sent: Future[None]) -> None:
        """The first stage would wait for tokens that do not come."""
        if (error := sent.exception()) is not None:
            log.error("the tokens of a step were not sent", exc_info=error)
            self._groups.leave()

    def receive(self, rows: npt.NDArray[np.int64], numbers_shape: tuple[int, int]) -> tuple[Read, Read]:
        """On the first stage: what send sends for these rows, from a step that just began. Nothing on other ranks."""
        if not self._receives:
            return _nothing, _nothing
        token_ids = self._groups.begin_recv_from_last_stage((len(rows),), torch.int64)
        if self._is_handed_on:
            self._number += 1
            self._chosen_in[rows] = self._number
            self._arriving.append(_Chosen(self._number, rows, token_ids))
            if len(self._arriving) > self._groups.shard.pp + 1:
                # It is there: the leader has it, or would not have begun this step.
                self._take(self._arriving[0].number)
        if not numbers_shape[0] or self._groups.shard.tp_rank:
            return lambda: token_ids.get().tolist(), _nothing
        numbers = self._groups.begin_recv_from_last_stage(numbers_shape, torch.float64)
        return lambda: token_ids.get().tolist(), lambda: numbers.get().tolist()
