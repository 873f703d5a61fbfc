"""The short probe at a worker's start that fetch-or-recompute is decided by: one prefill chunk, one store, one pull.

All ranks run it together, as they run any step. The blocks that it stores have one name per model, so that a cluster
keeps one copy of them. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from costs.transfer import TransferCost
from kvstore.names import block_name, root_name
from workers.step import BlockTransfer, ModelRunner, ScheduledRequest, SchedulerOutput

_CHUNK_TOKENS = 128
_MANY_BLOCKS = 8
_RUNS = 3


def calibrate(
    runner: ModelRunner, kv_fingerprint: bytes, block_size: int, num_blocks: int, max_chunk_tokens: int
) -> TransferCost | None:
    """What this rank took; None when its tiers keep nothing now. Writes into blocks that no request owns yet.

    What is stored here is pulled from the nearest tier: for farther ones the measured pull is too fast.
    """
    most = min(_MANY_BLOCKS, num_blocks)
    num_tokens = min(_CHUNK_TOKENS, max_chunk_tokens, num_blocks * block_size)
    chunk = ScheduledRequest("", [0] * num_tokens, 0, 0, range(-(-num_tokens // block_size)), None)
    chunk_s = _least_s(runner, SchedulerOutput([chunk]))
    names = [block_name(root_name(kv_fingerprint, b"probe"), [i] * block_size) for i in range(most)]
    stored = runner.start(SchedulerOutput(stores=[_transfer(names, block_size)]))().num_stored_blocks
    if list(stored) != [most]:
        return None
    if list(runner.start(SchedulerOutput(loads=[_transfer(names, block_size)]))().num_loaded_blocks) != [most]:
        return None
    one_s, many_s = (
        _least_s(runner, SchedulerOutput(loads=[_transfer(names[:count], block_size)])) for count in (1, most)
    )
    per_block_s = max(0.0, many_s - one_s) / max(1, most - 1)
    return TransferCost(chunk_s / num_tokens, max(0.0, one_s - per_block_s), per_block_s)


def _transfer(names: Sequence[bytes], block_size: int) -> BlockTransfer:
    return BlockTransfer("", names, range(len(names)), [block_size] * len(names))


def _least_s(runner: ModelRunner, plan: SchedulerOutput, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least of a few runs: what disturbs a run only makes it longer."""
    took_s = []
    for _ in range(_RUNS):
        began_s = clock()
        runner.start(plan)()
        took_s.append(clock() - began_s)
    return min(took_s)
