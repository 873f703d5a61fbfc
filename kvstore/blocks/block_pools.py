"""The block pools of a model's cache groups as one: a prefix is cached when every group can go on from it.

A group whose layers see a window of tokens needs the last blocks of a prefix only, and gives back what has left the
window. So each group has a pool of its own, and each request a block table per group, whose first entries may have been
given back. A group may also keep no more than the first blocks of each request. Pure; knows nothing of tensors, of
requests, or of what a name means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.blocks.block_pool import BlockPool


@dataclass(slots=True)
class BlockTable:
    """The blocks of one request in one group. Entries below num_released are stale: their blocks may be reused."""

    block_ids: list[int] = field(default_factory=list)
    num_released: int = 0

    @property
    def held(self) -> list[int]:
        """The blocks that the request refers to."""
        return self.block_ids[self.num_released :] if self.num_released else self.block_ids


class BlockPools:
    """Pools with one block size. windows: of each group, in tokens; 0: all tokens are seen. limits: of each group, how
    many of a request's first blocks it keeps; 0: all. The engine owns it."""

    def __init__(
        self, pools: Sequence[BlockPool], windows: Sequence[int] = (0,), limits: Sequence[int] | None = None
    ) -> None:
        if len(pools) != len(windows) or len({pool.block_size for pool in pools}) != 1:
            raise ValueError(f"{len(pools)} pools with {len(windows)} windows, or with different block sizes")
        self.pools = tuple(pools)
        self.windows = tuple(windows)
        self.limits = (0,) * len(pools) if limits is None else tuple(limits)
        self._growing = [group for group, limit in enumerate(self.limits) if not limit]
        self.block_size = pools[0].block_size
        self.has_windows = any(windows)
        self.num_groups = len(pools)

    # -------------------------------------------------------------------------------------------------------- counting
    @property
    def num_blocks(self) -> int:
        """Of the first group, which keeps most."""
        return self.pools[0].num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that could be handed out in the first group."""
        return self.pools[0].num_free

    @property
    def num_referenced(self) -> int:
        """Blocks with at least one reference, in all groups."""
        return sum(pool.num_referenced for pool in self.pools)

    def first_needed(self, group: int, num_tokens: int) -> int:
        """The first block that a group needs to compute the last of `num_tokens` again, or what follows it."""
        window = self.windows[group]
        return max(0, num_tokens - window) // self.block_size if window else 0

    @property
    def max_blocks(self) -> int:
        """Of one request: as many as the groups have that keep all of them."""
        groups = zip(self.pools, self.windows, self.limits, strict=True)
        return min((pool.num_blocks for pool, window, limit in groups if not window and not limit), default=1 << 62)

    def num_entries(self, tables: Sequence[BlockTable]) -> int:
        """Blocks for which every group's table has an entry, where the group has one for all."""
        if len(tables) == 1:
            return len(tables[0].block_ids)
        return min(len(tables[group].block_ids) for group in self._growing)

    def _bounded(self, group: int, num_blocks: int) -> int:
        """How many of a request's first blocks the group keeps."""
        limit = self.limits[group]
        return min(num_blocks, limit) if limit else num_blocks

    def check(self) -> None:
        """Re-derives the books of all pools; raises AssertionError when they disagree."""
        for pool in self.pools:
            pool.check()

    # ------------------------------------------------------------------------------------------------------- prefixes
    def num_matched(self, names: Sequence[bytes]) -> int:
        """Blocks of the longest prefix of `names` from which every group could go on."""
        count = len(names)
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            if not window:
                wanted = self._bounded(group, count)
                found = len(pool.match_prefix(names[:wanted]))
                count = count if found == wanted else found
        while self.has_windows and count > 0:
            shorter = min(self._num_matched_in_window(group, names, count) for group in range(self.num_groups))
            if shorter == count:
                break
            count = shorter
        return count

    def _num_matched_in_window(self, group: int, names: Sequence[bytes], count: int) -> int:
        """`count`, or a smaller one that may do, when the group lacks a block that it needs after `count` blocks."""
        first = self.first_needed(group, count * self.block_size)
        for index in range(count - 1, first - 1, -1):
            if self.windows[group] and not self.pools[group].match_prefix(names[index : index + 1]):
                return index
        return count

    def take_prefix(self, names: Sequence[bytes]) -> list[BlockTable]:
        """Tables that hold a prefix, which num_matched found; what a window does not need is not held."""
        tables = []
        for group, pool in enumerate(self.pools):
            first = self.first_needed(group, len(names) * self.block_size)
            block_ids = pool.match_prefix(names[first : self._bounded(group, len(names))])
            pool.acquire(block_ids)
            tables.append(BlockTable([0] * first + block_ids, first))
        return tables

    # ------------------------------------------------------------------------------------------------ blocks of tables
    def can_extend(self, tables: Sequence[BlockTable], num_blocks: int, groups: Sequence[int]) -> bool:
        """Whether the tables of these groups could have so many entries now."""
        return self.num_missing(tables, num_blocks, groups) <= 0

    def num_missing(self, tables: Sequence[BlockTable], num_blocks: int, groups: Sequence[int]) -> int:
        """Blocks that must become free in some group before its table can have so many entries; none if not > 0."""
        lacks = [self._bounded(group, num_blocks) - len(tables[group].block_ids) for group in groups]
        return max(
            (lack - self.pools[group].num_free for group, lack in zip(groups, lacks, strict=True) if lack > 0),
            default=0,
        )

    def extend(self, tables: Sequence[BlockTable], num_blocks: int, groups: Sequence[int]) -> None:
        """Give the tables of these groups blocks until they have so many entries."""
        for group in groups:
            missing = self._bounded(group, num_blocks) - len(tables[group].block_ids)
            if missing > 0:
                tables[group].block_ids += self.pools[group].allocate(missing)

    def reserve_window_blocks(
        self, tables: Sequence[BlockTable], num_blocks: int, num_tokens: int
    ) -> dict[int, int] | None:
        """Blocks for what windows see behind `num_tokens`; by group, the first of them. None: there are too few.

        The tables then have num_blocks entries, of which those behind the window are not held.
        """
        firsts: dict[int, int] = {}
        for group, window in enumerate(self.windows):
            first = max(self.first_needed(group, num_tokens), len(tables[group].block_ids))
            if window and first < num_blocks:
                firsts[group] = first
        if not all(self.pools[group].can_allocate(num_blocks - first) for group, first in firsts.items()):
            return None
        for group, first in firsts.items():
            table = tables[group]
            if first > len(table.block_ids):  # what is held lies behind the window
                self.pools[group].release(table.held)
                table.block_ids += [0] * (first - len(table.block_ids))
                table.num_released = first
            table.block_ids += self.pools[group].allocate(num_blocks - first)
        return firsts

    def register(self, tables: Sequence[BlockTable], index: int, name: bytes) -> None:
        """The entries at `index` hold the content of `name` now."""
        for pool, table in zip(self.pools, tables, strict=True):
            if table.num_released <= index < len(table.block_ids):
                pool.register(table.block_ids[index], name)

    def release_behind_windows(self, tables: Sequence[BlockTable], num_tokens: int) -> None:
        """Give back what no token from `num_tokens` on can see."""
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            first = min(self.first_needed(group, num_tokens), len(table.block_ids))
            if first > table.num_released:
                pool.release(table.block_ids[table.num_released : first])
                table.num_released = first

    def release(self, tables: Sequence[BlockTable]) -> None:
        """Give back all that the tables hold."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.release(table.held)
            table.block_ids, table.num_released = [], 0

    # ---------------------------------------------------------------------------------------------------------- events
    def record_changes(self, is_on: bool) -> list[bytes]:
        """As BlockPool.record_changes, of the first group."""
        return self.pools[0].record_changes(is_on)

    def take_changes(self) -> dict[bytes, bool] | None:
        """As BlockPool.take_changes, of the first group."""
        return self.pools[0].take_changes()
