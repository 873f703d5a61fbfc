"""An executor over paged caches of tokens, one per cache group: what it chooses is a digest of all that it reads.

A wrong row, a stray write, or a block that is reused too early changes a token. Plans reach it over the wire form.
Transfers go to and from a tier in memory, and end a step after they began. It stands for a pipeline of num_stages too:
then it asserts that a plan takes no token from one that is not through all stages.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.engine.engine import Engine
from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import BlockTransfer, ModelRunnerOutput, SchedulerOutput, StepPlan, TransferDone
from workers.runtime.rank_state import RankState

BLOCK_SIZE, VOCAB, EOS = 4, 23, 22
Tier = dict[tuple[int, bytes], list[int]]


class PagedRunner:
    """windows: of each group; 0: all tokens are read."""

    def __init__(self, num_blocks: int, max_num_seqs: int, windows: Sequence[int] = (0,), num_stages: int = 1) -> None:
        self.windows = windows
        self.caches = [[-1] * (num_blocks * BLOCK_SIZE) for _ in windows]
        self.queue: list[tuple[StepPlan, list[int]]] = []
        self.state = RankState(max_num_seqs, 64, len(windows))
        self.last = [0] * max_num_seqs
        self.num_stages = num_stages
        self.chosen_in = [0] * max_num_seqs  # sequence number of the plan
        self.fails: Callable[[StepPlan], bool] = lambda plan: False
        self.error: tuple[list[int], MemoryError] | None = None  # of the step with these tokens
        self.num_recoveries = 0
        self.sequence = 0
        self.is_full = True
        self.most_in_flight = 0
        self.begun: list[BlockTransfer] = []
        self.tier: Tier = {}
        self.loads: list[BlockTransfer] = []
        self.is_lost: Callable[[int, bytes], bool] = lambda group, name: False

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        self.sequence += 1
        sent = decode_plan(encode_plan(plan, self.sequence, self.is_full))
        self.is_full = False
        sampled: list[int] = []
        ended = [self._end(transfer) for transfer in self.begun]
        self.begun = [*plan.loads, *plan.stores]
        self.loads += plan.loads
        self.queue.append((sent, sampled))
        self.most_in_flight = max(self.most_in_flight, len(self.queue))

        def wait() -> ModelRunnerOutput:
            while any(s is sampled for _, s in self.queue):
                self._run_next()
            if self.error is not None and self.error[0] is sampled:
                raise self.error[1]
            return ModelRunnerOutput(sampled, transfers=ended)

        return wait

    @property
    def has_ended_transfers(self) -> bool:
        return bool(self.begun)

    def resend(self) -> None:
        self.is_full = True

    def recover(self) -> str:
        """Nothing that moves or is computed is left, and the rows are forgotten."""
        self.num_recoveries += 1
        self.error = None
        self.queue.clear()
        self.begun = []
        self.is_full = True
        self.state = RankState(len(self.last), 64, len(self.windows))
        return ""

    def stop(self) -> None:
        assert not self.queue

    def _end(self, transfer: BlockTransfer) -> TransferDone:
        """Loads are of the tier as it is now, stores of what the earlier steps left in the cache."""
        while self.queue:
            self._run_next()
        if self.error is not None:  # its step was refused, and nothing of it begun
            return TransferDone(transfer.transfer_id, 0)
        cache, count = self.caches[transfer.group], 0
        is_store = transfer not in self.loads
        for name, block_id, num_tokens in zip(
            transfer.block_names, transfer.block_ids, transfer.num_tokens, strict=True
        ):
            slots = slice(block_id * BLOCK_SIZE, block_id * BLOCK_SIZE + num_tokens)
            if is_store:
                assert -1 not in cache[slots]
                self.tier[transfer.group, name] = cache[slots]
            elif (transfer.group, name) not in self.tier or self.is_lost(transfer.group, name):
                break
            else:
                cache[slots] = self.tier[transfer.group, name]
            count += 1
        return TransferDone(transfer.transfer_id, count)

    def _run_next(self) -> None:
        """An error is that of its step, whoever makes it run."""
        plan, sampled = self.queue.pop(0)
        try:
            if self.error is None:
                self._run(plan, sampled)
        except MemoryError as error:
            self.error = sampled, error

    def _run(self, plan: StepPlan, sampled: list[int]) -> None:
        self.state.apply(plan)
        if self.fails(plan):
            raise MemoryError("no memory left for this step")
        known = iter(plan.token_ids.tolist())
        for i, row in enumerate(plan.rows.tolist()):
            start, count = int(plan.start_positions[i]), int(plan.num_tokens[i])
            for position in range(start, start + count):
                is_known = position - start < plan.num_known[i]
                assert is_known or plan.sequence - self.chosen_in[row] >= self.num_stages, (
                    "it has not passed all stages"
                )
                token = next(known) if is_known else self.last[row]
                if position >= plan.write_from[i]:
                    for group, cache in enumerate(self.caches):
                        cache[self._slot(group, row, position)] = token
            for end in range(start + count - int(plan.num_logits[i]) + 1, start + count + 1):
                sampled.append(self._choose(row, end))
                self.last[row], self.chosen_in[row] = sampled[-1], plan.sequence

    def _choose(self, row: int, end: int) -> int:
        read: list[int] = []
        for group, (cache, window) in enumerate(zip(self.caches, self.windows, strict=True)):
            first = max(0, end - window) if window else 0
            read += [cache[self._slot(group, row, position)] for position in range(first, end)]
        assert -1 not in read, "reads only what was written"
        counter = end - int(self.state.num_prompt_tokens[row])
        return zlib.crc32(bytes([*read, counter % 256])) % VOCAB

    def _slot(self, group: int, row: int, position: int) -> int:
        block_id = int(self.state.block_tables[group][row][position // BLOCK_SIZE])
        return block_id * BLOCK_SIZE + position % BLOCK_SIZE


def make(
    num_blocks: int,
    budget: int,
    is_async: bool,
    max_num_seqs: int = 3,
    windows: Sequence[int] = (0,),
    **options: Any,
) -> tuple[Engine, PagedRunner]:
    runner = PagedRunner(num_blocks, max_num_seqs, windows, options.get("num_stages", 1))
    context = num_blocks * BLOCK_SIZE if 0 in windows else 200
    pools = BlockPools([BlockPool(num_blocks, BLOCK_SIZE) for _ in windows], windows)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs, budget, context, **options), pools, b"f" * 16, frozenset({EOS}))
    return Engine(scheduler, runner, VOCAB, lambda: 0.0, is_async), runner
