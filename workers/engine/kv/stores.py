"""Which computed blocks go to the tiers: what prefill publishes, and what is written back for later. Pure.

Knows nothing of tiers.
"""

from __future__ import annotations

from kvstore.blocks.block_pools import BlockPools
from workers.engine.kv.block_naming import RequestNames
from workers.engine.kv.transfers import TransferKind, Transfers
from workers.engine.request import Request, RequestRole
from workers.engine.step import SchedulerOutput

MAX_WRITTEN_BACK_BLOCKS = 256  # copied, and on their way to the tiers for a later turn


class Stores:
    """Of one engine. writes_back: publish what requests other than prefill compute, too."""

    def __init__(self, pool: BlockPools, transfers: Transfers, names: RequestNames, writes_back: bool) -> None:
        self._pool = pool
        self._transfers = transfers
        self._names = names
        self._groups = range(pool.num_groups)
        self.writes_back = writes_back
        self.num_dropped_write_backs = 0  # blocks: the tiers are slower than decoding

    def plan(self, plan: SchedulerOutput, request: Request, end: int, is_last: bool) -> None:
        """Publish the blocks that are full when the step is through, which computes up to `end`."""
        first, last = request.num_stored_blocks, end // self._pool.block_size
        if self._pool.has_windows:  # a block is published with all groups, or not at all
            first = max(first, *(table.num_released for table in request.block_tables))
        if request.role is RequestRole.PREFILL:
            kind, num_named_tokens = TransferKind.STORE, request.num_given_tokens
            names = self._names.of_prompt(request)
            last = len(names) if is_last else last
        else:
            kind, num_named_tokens = TransferKind.WRITE_BACK, end
            names = request.block_names
            last = min(last, len(names))  # a block has no name while a token in it is still being chosen
        if last <= first:
            return
        request.num_stored_blocks = last
        if kind is TransferKind.STORE:
            request.num_stores_in_flight += 1
            plan.ends_prompts |= is_last
        elif not self.writes_back:
            return
        elif self._transfers.num_written_back_blocks >= MAX_WRITTEN_BACK_BLOCKS:
            self.num_dropped_write_backs += last - first
            return
        plan.stores += self._transfers.start(kind, request, names[first:last], first, self._groups, num_named_tokens)
