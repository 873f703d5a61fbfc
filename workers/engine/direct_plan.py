"""Plans that no scheduler made: for warm-up, calibration and benchmarks. Each is complete in itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.step import BlockTransfer, ModelRunner, RowState, SchedulerOutput, StepPlan
from workers.sampling.params import GREEDY, SamplingParams

_POLL_S = 0.0002


@dataclass(frozen=True, slots=True)
class DirectChunk:
    """A run of tokens to compute."""

    token_ids: Sequence[int]
    start_position: int
    write_from: int
    block_tables: Sequence[Sequence[int]]  # per cache group
    num_logits: int = 0
    sampling: SamplingParams = GREEDY
    num_prompt_tokens: int = 0
    adapter_slot: int = -1


def direct_plan(
    chunks: Sequence[DirectChunk] = (),
    loads: Sequence[BlockTransfer] = (),
    stores: Sequence[BlockTransfer] = (),
) -> StepPlan:
    """A full plan; the chunks take rows 0, 1, ..."""
    plan = SchedulerOutput(loads=list(loads), stores=list(stores))
    for row, chunk in enumerate(chunks):
        plan.rows.append(row)
        plan.start_positions.append(chunk.start_position)
        plan.num_tokens.append(len(chunk.token_ids))
        plan.write_from.append(chunk.write_from)
        plan.num_logits.append(chunk.num_logits)
        plan.num_prompt_logits.append(0)
        plan.num_known.append(len(chunk.token_ids))
        plan.token_ids += chunk.token_ids
        state = RowState(row, chunk.num_prompt_tokens, chunk.sampling, chunk.block_tables)
        plan.new_rows.append(replace(state, adapter_slot=chunk.adapter_slot))
    return decode_plan(encode_plan(plan, 0, True))


def run_transfers(
    runner: ModelRunner, loads: Sequence[BlockTransfer] = (), stores: Sequence[BlockTransfer] = ()
) -> list[int]:
    """Move blocks and wait for the end: of each transfer, how many are whole on every rank. On all ranks at once."""
    waiting = [transfer.transfer_id for transfer in (*loads, *stores)]
    ended = list(runner.start(direct_plan((), loads, stores))().transfers)
    while len(ended) < len(waiting):
        time.sleep(_POLL_S)
        polls = [transfer_id for transfer_id in waiting if all(done.transfer_id != transfer_id for done in ended)]
        ended += runner.start(direct_plan(), runner.poll(polls))().transfers
    counts = {done.transfer_id: done.num_blocks for done in ended}
    return [counts[transfer_id] for transfer_id in waiting]
