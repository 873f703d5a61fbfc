"""Keys and values as they are computed. Without torch until layers are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.kv.schemes.scheme import LayerBlocks
from workers.model.cache_spec import CacheGroup, CacheSpec, cache_groups

if TYPE_CHECKING:
    from workers.model.layers.layer_cache import LayerCache


@dataclass(frozen=True, slots=True)
class ExactScheme:
    """A block is one tensor of the activations' dtype."""

    def groups(self, specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
        """As in KVScheme."""
        return cache_groups(specs)

    def layer_cache(self, blocks: Sequence[LayerBlocks]) -> LayerCache:
        """As in KVScheme."""
        from workers.kv.schemes.paged_layer import PagedLayer

        (only,) = blocks
        return PagedLayer(only.group.index, only.parts[0])


EXACT_SCHEME = ExactScheme()
