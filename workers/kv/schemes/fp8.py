"""Keys and values in fp8 (e4m3), divided by a fixed scale of each KV head. Without torch until layers are made.

The scales come from the checkpoint (`self_attn.k_scale`, `v_scale`), else they are 1: what is beyond +-448 times the
scale becomes that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.kv.schemes.scheme import LayerBlocks, refuse_latent
from workers.model.cache_spec import BlockPart, CacheGroup, CacheSpec, cache_groups

if TYPE_CHECKING:
    from workers.model.layers.layer_cache import LayerCache


@dataclass(frozen=True, slots=True)
class Fp8Form:
    """A byte for each number; the scales are the layer's, not the block's."""

    def parts(self, spec: CacheSpec, block_size: int, dtype: str) -> tuple[BlockPart, ...]:
        """As in BlockForm."""
        return (BlockPart("float8_e4m3fn", spec.num_planes, block_size, spec.head_dim),)


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """A block is one tensor of bytes."""

    def groups(self, specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
        """As in KVScheme."""
        refuse_latent("fp8", specs)
        return cache_groups(specs, Fp8Form())

    def layer_cache(self, blocks: Sequence[LayerBlocks]) -> LayerCache:
        """As in KVScheme."""
        from workers.kv.schemes.paged_layer import PagedLayer

        (only,) = blocks
        return PagedLayer(only.group.index, only.parts[0], has_head_scales=True)
