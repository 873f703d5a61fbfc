"""The short probe at a worker's start that fetch-or-recompute is decided by: one prefill chunk, one store, one pull.

All ranks run it together, as they run any step. The blocks that it stores have one name per model, so that a cluster
keeps one copy of them. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from costs.transfer import TransferCost
from kvstore.names import block_name, root_name
from workers.engine.direct_plan import DirectChunk, direct_plan, run_transfers
from workers.engine.step import BlockTransfer, ModelRunner

_CHUNK_TOKENS = 128
_MANY_BLOCKS = 8
_RUNS = 3


def calibrate(
    runner: ModelRunner, kv_fingerprint: bytes, block_size: int, num_blocks: Sequence[int], max_chunk_tokens: int
) -> TransferCost | None:
    """What this rank took; None when its tiers keep nothing now. Writes into blocks that no request owns yet.

    num_blocks: of each cache group. What is stored here is pulled from the nearest tier: for farther ones the measured
    pull is too fast.
    """
    most, groups = min(_MANY_BLOCKS, *num_blocks), range(len(num_blocks))
    num_tokens = min(_CHUNK_TOKENS, max_chunk_tokens, min(num_blocks) * block_size)
    blocks = range(-(-num_tokens // block_size))
    chunk = direct_plan([DirectChunk([0] * num_tokens, 0, 0, [blocks for _ in groups])])
    chunk_s = _least_s(lambda: runner.start(chunk)())
    names = [block_name(root_name(kv_fingerprint, b"probe"), [i] * block_size) for i in range(most)]

    def transfers(count: int) -> list[BlockTransfer]:
        full = [block_size] * count
        return [BlockTransfer(1 + group, group, names[:count], range(count), full) for group in groups]

    if run_transfers(runner, stores=transfers(most)) != [most for _ in groups]:
        return None
    if run_transfers(runner, loads=transfers(most)) != [most for _ in groups]:
        return None
    one_s = _least_s(lambda: run_transfers(runner, loads=transfers(1)))
    many_s = _least_s(lambda: run_transfers(runner, loads=transfers(most)))
    per_block_s = max(0.0, many_s - one_s) / max(1, most - 1)
    return TransferCost(chunk_s / num_tokens, max(0.0, one_s - per_block_s), per_block_s)


def _least_s(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The least of a few runs: what disturbs a run only makes it longer."""
    took_s = []
    for _ in range(_RUNS):
        began_s = clock()
        work()
        took_s.append(clock() - began_s)
    return min(took_s)
