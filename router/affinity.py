"""The router's own memory of which worker has seen which KV blocks.

It is a guess: workers evict on their own, and other routers send them work too. Its bound is the worker's own number of
blocks and its order the worker's own (least recently used goes first, tails before heads), so the guess stays close.
Pure; knows nothing of tokens, costs or connections.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class SeenBlocks:
    """Names of the blocks that one worker probably holds. Whenever a block is in, so are its ancestors."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max(1, max_blocks)
        self._names: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._names)

    def match_prefix(self, names: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt are in; not counted as use. O(log len(names)), for ancestors are in."""
        low, high = 0, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            if names[middle - 1] in self._names:
                low = middle
            else:
                high = middle - 1
        return low

    def remember(self, names: Sequence[bytes]) -> None:
        """The worker was given a prompt with these blocks, in order from its start."""
        # From the tail to the head: the head is the most recently used, so eviction takes tails first and never leaves
        # a block without its ancestors. A prompt longer than the bound keeps its head.
        for name in reversed(names[: self._max_blocks]):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._max_blocks:
            self._names.popitem(last=False)
