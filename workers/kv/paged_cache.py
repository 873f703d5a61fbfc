"""A rank's paged KV cache: tensors per cache group, with the layers and heads that the rank owns.

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
from workers.kv.parted_blocks import PartedBlocks
from workers.kv.schemes.exact import EXACT_SCHEME
from workers.kv.schemes.scheme import KVScheme, LayerBlocks
from workers.model.cache_spec import BlockPart, CacheGroup
from workers.model.layers.layer_cache import LayerCache
from workers.parallel import Shard


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a rank keeps per block."""

    groups: Sequence[CacheGroup]
    held_layers: range  # of the rank's stage
    shard: Shard
    block_size: int
    dtype: torch.dtype  # of the activations
    scheme: KVScheme = EXACT_SCHEME  # that made the groups

    def layers(self, group: CacheGroup) -> list[int]:
        """Those of the group that the rank's stage has."""
        return [layer for layer in group.layers if layer in self.held_layers]

    def heads(self, group: CacheGroup) -> range:
        """KV heads of the whole model that the rank keeps; a latent row is kept by every rank."""
        if group.spec.is_latent:
            return range(1)
        held = self.shard.slice_of(group.spec.num_kv_heads)
        return range(held.start, held.stop)

    def parts(self, group: CacheGroup) -> tuple[BlockPart, ...]:
        """What a block of the group has per layer and head."""
        return group.form.parts(group.spec, self.block_size, self._dtype_name)

    def block_bytes(self, group: CacheGroup) -> int:
        """Of one block on this rank."""
        num_heads = len(self.layers(group)) * len(self.heads(group))
        return num_heads * group.block_bytes(self.block_size, self._dtype_name)

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

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
    """For each part of a group's form a tensor [layers, blocks, heads, planes, slots, width]."""

    def __init__(self, layout: CacheLayout, num_blocks: Sequence[int], device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = list(num_blocks)
        self.device = device
        # Zeros, not empty: attention multiplies masked slots by 0, and 0 x NaN is NaN.
        self.tensors: list[tuple[Tensor, ...]] = [
            tuple(
                torch.zeros(
                    (len(layout.layers(group)), count, len(layout.heads(group)), part.planes, part.slots, part.width),
                    dtype=getattr(torch, part.dtype),
                    device=device,
                )
                for part in layout.parts(group)
            )
            for group, count in zip(layout.groups, num_blocks, strict=True)
        ]

    def of_layers(self) -> list[LayerCache]:
        """The cache of each layer of the stage."""
        layout = self.layout
        blocks: dict[int, list[LayerBlocks]] = {layer: [] for layer in layout.held_layers}
        for group, tensors in zip(layout.groups, self.tensors, strict=True):
            for index, layer in enumerate(layout.layers(group)):
                blocks[layer].append(LayerBlocks(group, tuple(tensor[index] for tensor in tensors)))
        return [layout.scheme.layer_cache(blocks[layer]) for layer in layout.held_layers]

    def grids(self, layers_per_fragment: int) -> list[FragmentGrid]:
        """What the rank owns of each group. Raises ModelError when fragments do not fit the stage."""
        layout = self.layout
        return [
            fragment_grid(group, layout.held_layers, layers_per_fragment, layout.heads(group))
            for group in layout.groups
        ]

    def memories(self, layers_per_fragment: int, encoding: str) -> list[BlockMemory]:
        """The fragments of each group as bytes."""
        return [
            self._memory(group, tensors, grid.layers_per_fragment, encoding)
            for group, tensors, grid in zip(
                self.layout.groups, self.tensors, self.grids(layers_per_fragment), strict=True
            )
        ]

    def _memory(
        self, group: CacheGroup, tensors: tuple[Tensor, ...], layers_per_fragment: int, encoding: str
    ) -> BlockMemory:
        if len(tensors) == 1 and not group.takes_full_blocks:
            return block_memory(tensors[0], layers_per_fragment, encoding)
        assert encoding == "none", encoding  # blocks travel as they lie: see EngineConfig
        full_block_tokens = self.layout.block_size if group.takes_full_blocks else 0
        return PartedBlocks(tensors, self.layout.parts(group), layers_per_fragment, full_block_tokens)
