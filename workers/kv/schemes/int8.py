"""Keys and values in int8, with an fp32 scale of each token and KV head. Without torch until layers are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.kv.schemes.scheme import LayerBlocks, refuse_latent
from workers.model.cache_spec import BlockPart, CacheGroup, CacheSpec, cache_groups

if TYPE_CHECKING:
    from workers.model.layers.layer_cache import LayerCache


@dataclass(frozen=True, slots=True)
class Int8Form:
    """The rounded numbers, and beside them the scales of their rows."""

    def parts(self, spec: CacheSpec, block_size: int, dtype: str) -> tuple[BlockPart, ...]:
        """As in BlockForm."""
        rows = BlockPart("int8", spec.num_planes, block_size, spec.head_dim)
        return rows, BlockPart("float32", spec.num_planes, block_size, 1)


@dataclass(frozen=True, slots=True)
class Int8Scheme:
    """A block is a tensor of bytes and one of scales."""

    def groups(self, specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
        """As in KVScheme."""
        refuse_latent("int8", specs)
        return cache_groups(specs, Int8Form())

    def layer_cache(self, blocks: Sequence[LayerBlocks]) -> LayerCache:
        """As in KVScheme."""
        from workers.kv.schemes.paged_layer import PagedLayer

        (only,) = blocks
        rows, scales = only.parts
        return PagedLayer(only.group.index, rows, token_scales=scales.squeeze(-1))
