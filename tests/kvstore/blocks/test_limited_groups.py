"""Groups that keep the first blocks of each request only, beside one that keeps all and one with a window."""

from __future__ import annotations

import pytest

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools, BlockTable

SIZE = 4
NAMES = [bytes([i]) * 16 for i in range(6)]


def make(num_blocks: int = 12) -> BlockPools:
    return BlockPools([BlockPool(num_blocks, SIZE) for _ in range(3)], (0, 8, 0), (0, 0, 2))


def computed(pools: BlockPools, num_blocks: int) -> list[BlockTable]:
    tables = pools.take_prefix([])
    pools.extend(tables, num_blocks, range(3))
    for index in range(num_blocks):
        pools.register(tables, index, NAMES[index])
        pools.release_behind_windows(tables, (index + 1) * SIZE)
    return tables


def test_tables_end_where_the_limit_is() -> None:
    pools = make()
    tables = computed(pools, 5)
    assert [len(table.block_ids) for table in tables] == [5, 5, 2]
    assert pools.num_entries(tables) == 5
    assert pools.max_blocks == 12
    assert pools.num_referenced == 5 + 2 + 2
    pools.release(tables)
    pools.check()
    assert pools.num_referenced == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_a_prefix_is_found_with_the_first_blocks(num_blocks: int) -> None:
    pools = make()
    pools.release(computed(pools, num_blocks))
    assert pools.num_matched(NAMES) == num_blocks
    tables = pools.take_prefix(NAMES[:num_blocks])
    assert [len(table.block_ids) for table in tables] == [num_blocks, num_blocks, min(2, num_blocks)]
    pools.release(tables)
    pools.check()


def test_without_the_first_blocks_there_is_no_prefix() -> None:
    pools = BlockPools([BlockPool(12, SIZE), BlockPool(12, SIZE), BlockPool(2, SIZE)], (0, 8, 0), (0, 0, 2))
    pools.release(computed(pools, 5))
    assert pools.num_matched(NAMES) == 5
    pools.pools[2].release(pools.pools[2].allocate(2))  # another request had them meanwhile
    assert pools.num_matched(NAMES) == 0


def test_blocks_that_are_missing_count_up_to_the_limit() -> None:
    pools = make(num_blocks=6)
    tables = pools.take_prefix([])
    assert pools.can_extend(tables, 6, range(3))
    assert pools.num_missing(tables, 7, range(3)) == 1
    pools.extend(tables, 2, range(3))
    taken = pools.pools[2].allocate(4)
    assert pools.can_extend(tables, 6, range(3))  # the full group of first blocks is not asked again
    pools.pools[2].release(taken)
    pools.release(tables)
