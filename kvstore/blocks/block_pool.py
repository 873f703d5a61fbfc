"""Ownership of one device's KV blocks: references, names of cached blocks, and free blocks.

A block is in exactly one of three states:

    free         no references, no name                        allocate() takes these first
    cached       no references, a name; kept for later prompts allocate() evicts the least recently released of these
    referenced   one or more references; may have a name

Every operation costs O(1) per block. Pure; knows nothing of tensors, of requests, or of what a name means.
"""

from collections import OrderedDict
from collections.abc import Sequence


class OutOfBlocks(Exception):
    """More blocks were asked for than are free or evictable; nothing was allocated."""


class BlockPool:
    """Reference counts and prefix cache of `num_blocks` blocks, numbered from 0. The engine owns it: no locks."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks <= 0 or block_size <= 0:
            raise ValueError(f"num_blocks and block_size must be > 0, not {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_references = [0] * num_blocks
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers go out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._changes: dict[bytes, bool] | None = None  # by name whether it is held; None: not recorded

    @property
    def num_free(self) -> int:
        """Blocks that allocate() could hand out: free or only cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without references that are kept for their name."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free

    def num_references(self, block_id: int) -> int:
        """How many hold this block; one that is held more than once must not be written to."""
        return self._num_references[block_id]

    def name_of(self, block_id: int) -> bytes | None:
        """The name under which match_prefix finds the block; None when it has none."""
        return self._name_of[block_id]

    def match_prefix(self, names: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of `names` that is held here.

        A pure look-up: acquire() them before anything else is allocated.
        """
        block_ids: list[int] = []
        for name in names:
            block_id = self._block_of.get(name)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Adds one reference to each block; each must be cached or referenced already."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                assert block_id in self._cached, f"block {block_id} is free: allocate it"
                del self._cached[block_id]
            self._num_references[block_id] += 1

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether allocate() would succeed now."""
        return num_blocks <= self.num_free

    def allocate(self, num_blocks: int) -> list[int]:
        """Hands out nameless blocks with one reference each; evicts cached ones when the free ones do not suffice."""
        if num_blocks > self.num_free:
            raise OutOfBlocks(f"{num_blocks} blocks wanted, {self.num_free} of {self.num_blocks} can be allocated")
        block_ids: list[int] = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._cached.popitem(last=False)
                self._drop_name(block_id)
            self._num_references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def register(self, block_id: int, name: bytes) -> bool:
        """Says that a referenced block now holds the content of `name`, and no longer that of an older name.

        The first block of a name keeps it: a duplicate stays anonymous and is freed when released. True when this block
        has the name afterwards.
        """
        assert self._num_references[block_id] > 0, f"block {block_id} is not referenced"
        if self._name_of[block_id] == name:
            return True
        self._drop_name(block_id)
        if not self.enable_prefix_caching or name in self._block_of:
            return False
        self._name_of[block_id] = name
        self._block_of[name] = block_id
        if self._changes is not None:
            self._changes[name] = True
        return True

    def forget(self, block_id: int) -> None:
        """Takes a referenced block's name away, because its content is about to change or was found bad."""
        assert self._num_references[block_id] > 0, f"block {block_id} is not referenced"
        self._drop_name(block_id)

    def release(self, block_ids: Sequence[int]) -> None:
        """Takes one reference from each block of a sequence, last block first: tails are evicted before heads."""
        for block_id in reversed(block_ids):
            assert self._num_references[block_id] > 0, f"block {block_id} is not referenced"
            self._num_references[block_id] -= 1
            if self._num_references[block_id] == 0:
                if self._name_of[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = None

    def record_changes(self, is_on: bool) -> list[bytes]:
        """Begins (anew) or ceases to note which names come and go; the names that are held now."""
        self._changes = {} if is_on else None
        return list(self._block_of)

    def take_changes(self) -> dict[bytes, bool] | None:
        """Of the names that came or went since the last call, whether each is held now; None when there are none."""
        taken = self._changes
        if not taken:
            return None
        self._changes = {}
        return taken

    def check(self) -> None:
        """Re-derives the books from the per-block facts; raises AssertionError when they disagree."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id in range(self.num_blocks):
            references, name = self._num_references[block_id], self._name_of[block_id]
            assert references >= 0, f"block {block_id} has {references} references"
            assert (block_id in free) == (references == 0 and name is None), f"block {block_id}: free list is wrong"
            assert (block_id in cached) == (references == 0 and name is not None), f"block {block_id}: cache is wrong"
            assert name is None or self._block_of.get(name) == block_id, f"block {block_id}: its name leads elsewhere"
        num_named = sum(name is not None for name in self._name_of)
        assert num_named == len(self._block_of), f"{len(self._block_of)} names for {num_named} named blocks"

    def _drop_name(self, block_id: int) -> None:
        name = self._name_of[block_id]
        if name is not None:
            del self._block_of[name]
            self._name_of[block_id] = None
            if self._changes is not None:
                self._changes[name] = False
