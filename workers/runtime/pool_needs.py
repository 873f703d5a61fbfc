"""How many blocks each cache group of a rank gets. Knows nothing of devices or weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.config import EngineConfig
from workers.errors import ModelError
from workers.kv.paged_cache import CacheLayout
from workers.model.cache_spec import CacheGroup


@dataclass(frozen=True, slots=True)
class PoolNeeds:
    """What requests may hold, by the engine's bounds."""

    config: EngineConfig
    block_size: int
    context_tokens: int
    num_chunks: int  # of one request, planned before the first of them is through: see Engine.step

    def num_blocks(self, layout: CacheLayout, free_bytes: Callable[[], int]) -> list[int]:
        """Of each group. Raises ModelError when they do not suffice for one request."""
        needs = [self._least(group) for group in layout.groups]
        if self.config.num_blocks:
            counts = [self.config.num_blocks] * len(needs)
        else:
            counts = layout.blocks_that_fit(free_bytes(), [self._most(group) for group in layout.groups])
        for group, need, count in zip(layout.groups, needs, counts, strict=True):
            if count < need:
                raise ModelError(
                    f"num_blocks={count}: a window of {group.spec.window} tokens beside a step of"
                    f" {self.config.max_num_batched_tokens} takes {need} blocks"
                )
        return counts

    def _least(self, group: CacheGroup) -> int:
        """What one request may hold in a group with a window, while its longest chunks are computed; in another the
        same number need not fit, since the request's length is bounded by it."""
        window = group.spec.window
        if not window:
            return group.limit(self.block_size)
        num_tokens = min(window + self.num_chunks * self.config.max_num_batched_tokens, self.context_tokens)
        return -(-num_tokens // self.block_size) + 2

    def _most(self, group: CacheGroup) -> int:
        """More than so many blocks nobody gains from; twice what is in use leaves some for prefixes."""
        most_seqs = self.config.max_num_seqs
        if group.first_tokens:
            return 2 * group.limit(self.block_size) * most_seqs
        if not group.spec.window:
            return 1 << 31
        if group.level:  # a step has one longest chunk: the others' blocks are better spent on what is kept for long
            held = group.num_blocks_held(self.context_tokens, self.block_size)
            return 2 * held * most_seqs + self._least(group)
        return 2 * self._least(group) * most_seqs
