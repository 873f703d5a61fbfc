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
        num_full = min(last, len(request.block_names))
        if kind is TransferKind.STORE:
            request.num_stores_in_flight += 1
            plan.ends_prompts |= is_last
        elif not self.writes_back:
            return
        elif self._transfers.num_written_back_blocks >= MAX_WRITTEN_BACK_BLOCKS:
            self.num_dropped_write_backs += last - first
            return
        if first <= request.num_tier_blocks:
            request.num_tier_blocks = max(request.num_tier_blocks, num_full)
        plan.stores += self._transfers.start(kind, request, names[first:last], first, self._groups, num_named_tokens)

    def num_storable(self, request: Request) -> int:
        """Full blocks of a running request, from the first on, that the tiers have or could be given now; 0 where
        nothing is written back."""
        if not self.writes_back:
            return 0
        num_full = min(request.num_computed_tokens // self._pool.block_size, len(request.block_names))
        num_released = max(table.num_released for table in request.block_tables)
        return num_full if num_released <= request.num_tier_blocks else min(num_full, request.num_tier_blocks)

    def store_now(self, plan: SchedulerOutput, request: Request, num_full: int) -> bool:
        """Copy to the tiers what they lack of the first blocks; False when they are too slow for that."""
        first = request.num_tier_blocks
        if num_full <= first:
            return True
        if self._transfers.num_written_back_blocks + num_full - first > MAX_WRITTEN_BACK_BLOCKS:
            return False
        names, num_tokens = request.block_names[first:num_full], num_full * self._pool.block_size
        kind = TransferKind.WRITE_BACK
        plan.stores += self._transfers.start(kind, request, names, first, self._groups, num_tokens)
        request.num_tier_blocks = num_full
        request.num_stored_blocks = max(request.num_stored_blocks, num_full)
        return True
