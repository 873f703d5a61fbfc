"""Requests that wait for blocks from the tiers: which blocks each still pulls, and when it may begin.

Groups that keep all tokens are pulled first, as their blocks are announced. What came of them says where the request
goes on from, and only then is it known which blocks the groups with windows need. Knows nothing of tiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from costs.transfer import TransferCost
from kvstore.blocks.block_pools import BlockPools
from workers.engine.kv.block_naming import RequestNames
from workers.engine.kv.transfers import Transfer, TransferKind, Transfers
from workers.engine.request import Request, RequestRole, RequestStatus
from workers.engine.step import BlockTransfer

MAX_LOADING_BLOCKS = 256  # of all requests at a time: later ones wait for their turn
MAX_BLOCKS_PER_LOAD = 64  # a long prompt's first blocks need not wait for its last


class Pulls:
    """Of the requests that are WAITING_FOR_KV."""

    def __init__(self, pool: BlockPools, transfers: Transfers, names: RequestNames) -> None:
        self._pool = pool
        self._transfers = transfers
        self._names = names
        self.whole_groups = [group for group, window in enumerate(pool.windows) if not window]
        self._window_groups = [group for group, window in enumerate(pool.windows) if window]

    def num_awaited(self, request: Request) -> int:
        """How many blocks, from the first on, are or will be in the tiers."""
        if request.role is RequestRole.DECODE:
            num_blocks = -(-request.num_pull_tokens // self._pool.block_size)
        else:
            num_blocks = min(request.num_available_blocks, request.num_pull_tokens // self._pool.block_size)
        return min(num_blocks, request.max_pulled_blocks)

    def is_ready(self, request: Request) -> bool:
        """All announced blocks are in the block tables, and no more will be announced."""
        if not request.is_announced or request.num_ready_blocks < self.num_awaited(request):
            return False
        return not self._window_groups or request.has_window_blocks or self.num_awaited(request) == 0

    def ready(self, waiting_for_kv: Iterable[Request]) -> list[Request]:
        """Those that need not wait any longer."""
        return [r for r in waiting_for_kv if not r.has_load_in_flight and self.is_ready(r)]

    def is_stuck(self, waiting_for_kv: Iterable[Request]) -> bool:
        """Some have all but the blocks that their windows need, and there are none for them."""
        return any(
            r.is_announced and not r.has_load_in_flight and r.num_ready_blocks >= self.num_awaited(r)
            for r in waiting_for_kv
            if not self.is_ready(r)
        )

    def pending(self, waiting_for_kv: Iterable[Request]) -> Iterator[tuple[str, list[bytes]]]:
        """Those of which more blocks may be announced, and the names that they still lack."""
        for request in waiting_for_kv:
            if not request.is_announced:
                yield request.request_id, self._names.to_pull(request)[request.num_ready_blocks :]

    def certain(self, queued: Iterable[Request], cost: TransferCost) -> Iterator[tuple[str, list[bytes]]]:
        """Those of queued requests that are known to pull or not to pull, with the names; none when they do not."""
        for request in queued:
            if request.awaits_lookup or request.is_leaving or not request.is_announced:
                continue
            is_decode = request.role is RequestRole.DECODE
            all_names = self._names.to_pull(request) if is_decode else request.block_names
            names = all_names[: self.num_awaited(request)]
            names = names[self._pool.num_matched(names) :]
            pays = is_decode or cost.fetch_pays(len(names), self._pool.block_size)
            yield request.request_id, names if pays else []

    def start(self, waiting_for_kv: Iterable[Request]) -> list[BlockTransfer]:
        """Pull announced blocks; after the last announcement, try the missing ones once."""
        loads: list[BlockTransfer] = []
        for request in waiting_for_kv:
            max_blocks = MAX_LOADING_BLOCKS - self._transfers.num_loading_blocks
            if max_blocks <= 0:
                break
            if not request.has_load_in_flight:
                loads += self._start_one(request, min(max_blocks, MAX_BLOCKS_PER_LOAD))
        return loads

    def _start_one(self, request: Request, max_blocks: int) -> list[BlockTransfer]:
        awaited, first = self.num_awaited(request), request.num_ready_blocks
        wanted = awaited if request.is_announced else min(awaited, request.num_available_blocks)
        if wanted > first and not self.whole_groups:
            request.num_ready_blocks = first = wanted  # nothing but windows: their last blocks are all that is pulled
        if wanted > first:
            names = self._names.to_pull(request)[first : min(wanted, first + max_blocks)]
            return self._load(request, names, first, self.whole_groups)
        if request.is_announced and first >= awaited > 0 and self._window_groups and not request.has_window_blocks:
            return self._start_windows(request)
        return []

    def _start_windows(self, request: Request) -> list[BlockTransfer]:
        """Pull what the windows need behind the blocks that came; nothing while there are too few free blocks."""
        end = min(request.num_ready_blocks * self._pool.block_size, request.num_pull_tokens)
        firsts = self._pool.reserve_window_blocks(request.block_tables, request.num_ready_blocks, end)
        if firsts is None:
            return []
        request.num_kv_tokens = max(request.num_kv_tokens, end)
        names, loads = self._names.to_pull(request), []
        for group, first in firsts.items():
            loads += self._load(request, names[first : request.num_ready_blocks], first, [group])
        request.has_window_blocks = not loads
        return loads

    def _load(self, request: Request, names: list[bytes], first: int, groups: list[int]) -> list[BlockTransfer]:
        request.num_loads_in_flight += 1
        return self._transfers.start(TransferKind.LOAD, request, names, first, groups, request.num_pull_tokens)

    def end(self, transfer: Transfer) -> int:
        """A load is over; how many blocks its request got by it."""
        request = transfer.request
        if request.num_preemptions != transfer.generation or request.status is not RequestStatus.WAITING_FOR_KV:
            return 0
        request.num_loads_in_flight -= 1
        if transfer.groups[0] in self._window_groups:
            if not transfer.is_whole:
                request.max_pulled_blocks = 0
            elif not request.has_load_in_flight and request.max_pulled_blocks:
                request.has_window_blocks = True
            return 0
        size = self._pool.block_size
        request.num_ready_blocks += transfer.num_blocks
        request.num_transferred_blocks += transfer.num_blocks
        num_kv_tokens = min(request.num_ready_blocks * size, request.num_pull_tokens)
        request.num_kv_tokens = max(request.num_kv_tokens, num_kv_tokens)
        request.num_registered_blocks = max(request.num_registered_blocks, request.num_kv_tokens // size)
        if not transfer.is_whole and request.is_announced:
            request.max_pulled_blocks = request.num_ready_blocks
        elif not transfer.is_whole:
            request.num_available_blocks = request.num_ready_blocks  # announced and gone: ask again
        return transfer.num_blocks
