"""Blocks on their way to or from the tiers, as the scheduler sees them: started with a step, over some steps later.

A transfer refers to its blocks, so that no other request gets them before it is over, whatever becomes of its own.
Knows nothing of tiers or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvstore.blocks.block_pools import BlockPools
from workers.engine.request import Request
from workers.engine.step import BlockTransfer, TransferDone

_MAX_ID = (1 << 31) - 1  # a plan holds int32


class TransferKind(Enum):
    """What waits for a transfer."""

    LOAD = "load"  # a request that begins with these blocks
    STORE = "store"  # a request whose token is sent when the tiers have them
    WRITE_BACK = "write_back"  # nothing: the blocks are for a later turn or a failover


@dataclass(eq=False, slots=True)
class Transfer:
    """Some blocks of a request, in one or more cache groups at once."""

    kind: TransferKind
    request: Request
    generation: int  # the request's num_preemptions when it began
    groups: Sequence[int]
    block_names: Sequence[bytes]
    num_blocks: int  # whole in all groups that are through; at first, all
    parts: dict[int, BlockTransfer] = field(default_factory=dict)  # not through, by id

    @property
    def is_whole(self) -> bool:
        """Everything came, or was stored."""
        return self.num_blocks == len(self.block_names)


class Transfers:
    """All that are not over."""

    def __init__(self, pools: BlockPools) -> None:
        self._pools = pools
        self._of_part: dict[int, Transfer] = {}
        self._last_id = 0
        self._reads: set[int] = set()  # of adapters, which have no blocks
        self.num_transfers = 0
        self.num_loading_blocks = 0
        self.num_written_back_blocks = 0  # being written back

    def __bool__(self) -> bool:
        return bool(self._of_part or self._reads)

    def begin_read(self) -> int:
        """Something else than blocks is read beside the steps; its id."""
        self._last_id = self._last_id % _MAX_ID + 1
        self._reads.add(self._last_id)
        return self._last_id

    def end_read(self, transfer_id: int) -> None:
        """It is over on all ranks."""
        self._reads.remove(transfer_id)

    def forget_reads(self) -> None:
        """The ranks have given them up."""
        self._reads.clear()

    def part_ids(self) -> list[int]:
        """Of all transfers."""
        return list(self._of_part)

    def start(
        self,
        kind: TransferKind,
        request: Request,
        names: Sequence[bytes],
        first: int,
        groups: Sequence[int],
        num_named_tokens: int,
    ) -> list[BlockTransfer]:
        """Begin to move the request's blocks first, first + 1, ...; one part per cache group.

        The last of them may be a short one, which ends with num_named_tokens.
        """
        size, last = self._pools.block_size, first + len(names)
        transfer = Transfer(kind, request, request.num_preemptions, groups, names, len(names))
        num_tokens = [min(size, num_named_tokens - i * size) for i in range(first, last)]
        for group in groups:
            self._last_id = self._last_id % _MAX_ID + 1
            block_ids = request.block_tables[group].block_ids[first:last]
            if not block_ids:
                continue  # the group keeps none of these
            self._pools.pools[group].acquire(block_ids)
            is_copied, count = kind is TransferKind.WRITE_BACK, len(block_ids)
            part = BlockTransfer(self._last_id, group, names[:count], block_ids, num_tokens[:count], is_copied)
            transfer.parts[self._last_id] = part
            self._of_part[self._last_id] = transfer
        self.num_transfers += 1
        request.num_sends_in_flight += kind is not TransferKind.LOAD
        self._count(transfer, len(names))
        return list(transfer.parts.values())

    def release_copied(self, stores: Sequence[BlockTransfer]) -> None:
        """The step that began these stores is through: what is copied needs its blocks no longer."""
        for part in stores:
            if part.is_copied:
                self._pools.pools[part.group].release(part.block_ids)

    def end(self, done: TransferDone) -> Transfer | None:
        """A part is over on all ranks; the transfer, when it was its last part."""
        transfer = self._of_part.pop(done.transfer_id)
        part = transfer.parts.pop(done.transfer_id)
        pool = self._pools.pools[part.group]
        if transfer.kind is TransferKind.LOAD:  # verified, so anybody may have them
            for block_id, name, num_tokens in zip(
                part.block_ids[: done.num_blocks], part.block_names, part.num_tokens, strict=False
            ):
                if num_tokens == self._pools.block_size:
                    pool.register(block_id, name)
        if not part.is_copied:
            pool.release(part.block_ids)
        if done.num_blocks < len(part.block_ids):
            transfer.num_blocks = min(transfer.num_blocks, done.num_blocks)
        if transfer.parts:
            return None
        self.num_transfers -= 1
        transfer.request.num_sends_in_flight -= transfer.kind is not TransferKind.LOAD
        self._count(transfer, -len(transfer.block_names))
        return transfer

    def _count(self, transfer: Transfer, num_blocks: int) -> None:
        if transfer.kind is TransferKind.LOAD:
            self.num_loading_blocks += num_blocks
        elif transfer.kind is TransferKind.WRITE_BACK:
            self.num_written_back_blocks += num_blocks
