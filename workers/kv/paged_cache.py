"""A rank's paged KV cache: one tensor per cache group, with the layers and heads that the rank owns.

Knows nothing of requests; which block belongs to whom is the block pools' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import ModelError
from workers.kv.blocks import BlockMemory, block_memory
from workers.kv.grid import FragmentGrid, fragment_grid
from workers.model.cache_spec import CacheGroup, group_of_layer
from workers.parallel import Shard


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a rank keeps per block."""

    groups: Sequence[CacheGroup]
    held_layers: range  # of the rank's stage
    shard: Shard
    block_size: int
    dtype: torch.dtype

    def layers(self, group: CacheGroup) -> list[int]:
        """Those of the group that the rank's stage has."""
        return [layer for layer in group.layers if layer in self.held_layers]

    def heads(self, group: CacheGroup) -> range:
        """KV heads of the whole model that the rank keeps; a latent row is kept by every rank."""
        if group.spec.is_latent:
            return range(1)
        held = self.shard.slice_of(group.spec.num_kv_heads)
        return range(held.start, held.stop)

    def block_bytes(self, group: CacheGroup) -> int:
        """Of one block on this rank."""
        spec = group.spec
        rows = len(self.layers(group)) * len(self.heads(group)) * spec.num_planes * self.block_size
        return rows * spec.head_dim * self.dtype.itemsize

    def blocks_that_fit(self, free_bytes: int, most: Sequence[int]) -> list[int]:
        """Blocks of each group: as many in all of them, but in none more than `most`, from which nobody would gain.

        Raises ModelError when there is no memory for one block of each.
        """
        sizes = [self.block_bytes(group) for group in self.groups]
        counts = [0] * len(sizes)
        open_groups, left = set(range(len(sizes))), free_bytes
        while open_groups:
            total = sum(sizes[group] for group in open_groups)
            each = left // total if total else max(most)
            full = {group for group in open_groups if most[group] <= each}
            for group in full or open_groups:
                counts[group] = min(each, most[group])
                left -= counts[group] * sizes[group]
            open_groups -= full or open_groups
        if min(counts) < 1:
            raise ModelError(f"no memory for one KV block of {sum(sizes)} bytes ({free_bytes} bytes are free)")
        return counts


class PagedCache:
    """Tensors [layers, blocks, heads, K|V, block_size, head_dim]; K|V has one entry in a latent cache."""

    def __init__(self, layout: CacheLayout, num_blocks: Sequence[int], device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = list(num_blocks)
        self.tensors: list[Tensor] = []
        for group, count in zip(layout.groups, num_blocks, strict=True):
            spec = group.spec
            shape = (
                len(layout.layers(group)), count, len(layout.heads(group)), spec.num_planes, layout.block_size,
                spec.head_dim,
            )  # fmt: skip
            # Zeros, not empty: attention multiplies masked slots by 0, and 0 x NaN is NaN.
            self.tensors.append(torch.zeros(shape, dtype=layout.dtype, device=device))

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.tensors[0].device

    def of_layers(self) -> list[Tensor]:
        """The cache of each layer of the stage, [blocks, heads, K|V, block_size, head_dim]."""
        index_of = {
            layer: (group.index, index)
            for group in self.layout.groups
            for index, layer in enumerate(self.layout.layers(group))
        }
        assert set(index_of) == set(self.layout.held_layers) <= set(group_of_layer(self.layout.groups))
        return [self.tensors[group][index] for group, index in (index_of[layer] for layer in self.layout.held_layers)]

    def grids(self, layers_per_fragment: int) -> list[FragmentGrid]:
        """What the rank owns of each group. Raises ModelError when fragments do not fit the stage."""
        layout = self.layout
        return [
            fragment_grid(group, layout.held_layers, layers_per_fragment, layout.heads(group))
            for group in layout.groups
        ]

    def memories(self, layers_per_fragment: int, encoding: str) -> list[BlockMemory]:
        """The fragments of each group as bytes."""
        grids = self.grids(layers_per_fragment)
        return [
            block_memory(tensor, grid.layers_per_fragment, encoding)
            for tensor, grid in zip(self.tensors, grids, strict=True)
        ]
