"""The books of device blocks: every rule once, then all of them under random histories."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvstore.blocks.block_pool import BlockPool, OutOfBlocks


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_allocate_takes_what_is_free_and_no_more() -> None:
    pool = BlockPool(4, 16)
    first = pool.allocate(3)
    assert sorted(first) == [0, 1, 2]
    assert (pool.num_free, pool.num_referenced) == (1, 3)
    assert not pool.can_allocate(2)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 of 4"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.allocate(0) == []


def test_a_prefix_is_found_until_its_first_gap() -> None:
    pool = BlockPool(8, 16)
    blocks = pool.allocate(3)
    for i in (0, 1, 2):
        pool.register(blocks[i], name(i))
    assert pool.match_prefix([name(0), name(1), name(9), name(2)]) == blocks[:2]
    assert pool.match_prefix([name(9), name(0)]) == []


def test_released_blocks_with_a_name_stay_as_cache() -> None:
    pool = BlockPool(4, 16)
    named, nameless = pool.allocate(2)
    pool.register(named, name(1))
    pool.release([named, nameless])
    assert (pool.num_cached, pool.num_free) == (1, 4)
    assert pool.match_prefix([name(1)]) == [named]
    pool.acquire([named])
    assert (pool.num_cached, pool.num_references(named)) == (0, 1)


def test_tails_are_evicted_before_heads_and_old_prompts_before_new_ones() -> None:
    pool = BlockPool(4, 16)
    old, new = pool.allocate(2), pool.allocate(2)
    for i, block_id in enumerate([*old, *new]):
        pool.register(block_id, name(i))
    pool.release(old)
    pool.release(new)
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert pool.match_prefix([name(0)]) == []


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2, 16)
    cached, other = pool.allocate(2)
    pool.register(cached, name(1))
    pool.release([cached, other])
    assert pool.allocate(1) == [other]
    assert pool.match_prefix([name(1)]) == [cached]


def test_the_first_block_of_a_name_keeps_it() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.allocate(2)
    assert pool.register(first, name(1))
    assert not pool.register(second, name(1))
    assert pool.name_of(second) is None
    pool.release([second])
    assert pool.num_cached == 0  # anonymous: free, not cache
    assert pool.match_prefix([name(1)]) == [first]


def test_a_block_that_grew_has_its_new_name_only() -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    pool.register(block, name(1))
    assert pool.register(block, name(2))
    assert pool.match_prefix([name(1)]) == []
    assert pool.match_prefix([name(2)]) == [block]


def test_a_forgotten_name_is_found_no_more() -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    pool.register(block, name(1))
    pool.forget(block)
    assert pool.match_prefix([name(1)]) == []
    pool.release([block])
    assert pool.num_cached == 0


def test_shared_blocks_are_freed_by_their_last_holder() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(1)
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_referenced == 1
    pool.release(blocks)
    assert pool.num_referenced == 0


def test_without_prefix_caching_nothing_is_ever_found() -> None:
    pool = BlockPool(4, 16, enable_prefix_caching=False)
    (block,) = pool.allocate(1)
    assert not pool.register(block, name(1))
    assert pool.match_prefix([name(1)]) == []
    pool.release([block])
    assert pool.num_cached == 0


@pytest.mark.parametrize("operation", ["acquire", "release", "register", "forget"])
def test_a_free_block_cannot_be_used(operation: str) -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError):
        {
            "acquire": lambda: pool.acquire([1]),
            "release": lambda: pool.release([1]),
            "register": lambda: pool.register(1, name(1)),
            "forget": lambda: pool.forget(1),
        }[operation]()
    pool.check()


def test_check_notices_a_block_that_is_free_and_held() -> None:
    pool = BlockPool(2, 16)
    (block,) = pool.allocate(1)
    pool._free.append(block)
    with pytest.raises(AssertionError, match="free list"):
        pool.check()


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0, 16)
    with pytest.raises(ValueError, match="block_size"):
        BlockPool(1, 0)


class PoolMachine(RuleBasedStateMachine):
    """Random holders of blocks beside a model that only counts who holds what."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 16)
        self.references: dict[int, int] = {}

    @rule(target=holds, count=st.integers(0, 5))
    def allocate(self, count: int) -> object:
        if not self.pool.can_allocate(count):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return multiple()
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        for block_id in blocks:
            assert block_id not in self.references, "a held block was handed out"
            self.references[block_id] = 1
        return blocks

    @rule(blocks=holds, number=st.integers(0, 5), position=st.integers(0, 4))
    def register(self, blocks: list[int], number: int, position: int) -> None:
        if position < len(blocks) and blocks[position] in self.references:
            before = self.pool.match_prefix([name(number)])
            has_name = self.pool.register(blocks[position], name(number))
            after = self.pool.match_prefix([name(number)])
            assert after == (before or [blocks[position]])
            assert has_name == (after == [blocks[position]])

    @rule(blocks=holds, position=st.integers(0, 4))
    def forget(self, blocks: list[int], position: int) -> None:
        if position < len(blocks) and blocks[position] in self.references:
            self.pool.forget(blocks[position])

    @rule(target=holds, numbers=st.lists(st.integers(0, 5), max_size=4))
    def share(self, numbers: list[int]) -> object:
        blocks = self.pool.match_prefix([name(number) for number in numbers])
        self.pool.acquire(blocks)
        for block_id in blocks:
            self.references[block_id] = self.references.get(block_id, 0) + 1
        return blocks

    @rule(blocks=consumes(holds))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block_id in blocks:
            self.references[block_id] -= 1
            if self.references[block_id] == 0:
                del self.references[block_id]

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        assert self.pool.num_referenced == len(self.references)
        assert self.pool.num_free == 8 - len(self.references)
        for block_id in range(8):
            assert self.pool.num_references(block_id) == self.references.get(block_id, 0)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
