"""Which heads and layers of a cache group a rank owns, and the keys of their fragments.

A fragment is one block x some layers of one cache group x one KV head, [layer][K|V][slot][head_dim], or what
workers.kv.codec makes of it. So workers with different tp and pp exchange blocks. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.names import fragment_key
from workers.errors import ModelError
from workers.model.cache_spec import CacheGroup

LAYERS_PER_LEVEL = 1 << 13  # more than any model has; a key has 16 bits for both


@dataclass(frozen=True, slots=True)
class FragmentGrid:
    """A rank's part of one cache group."""

    layers: Sequence[int]  # of the whole model, ascending
    layers_per_fragment: int  # divides their number
    first_kv_head: int
    num_kv_heads: int
    level: int = 0

    def keys(self, block_name: bytes) -> list[bytes]:
        """Keys of this rank's fragments of a block: groups of layers, and heads within a group."""
        above = self.level * LAYERS_PER_LEVEL
        return [
            fragment_key(block_name, above + first_layer, self.layers_per_fragment, self.first_kv_head + head)
            for first_layer in self.layers[:: self.layers_per_fragment]
            for head in range(self.num_kv_heads)
        ]


def fragment_grid(group: CacheGroup, held: range, layers_per_fragment: int, heads: range) -> FragmentGrid:
    """The part of a group that a rank with these layers and heads owns. layers_per_fragment: 0: all of a stage.

    Raises ModelError when fragments would begin elsewhere than those of a rank that holds all layers.
    """
    layers = [layer for layer in group.layers if layer in held]
    per_fragment = layers_per_fragment or max(1, len(layers))
    first = group.layers.index(layers[0]) if layers else 0
    if first % per_fragment or len(layers) % per_fragment:
        raise ModelError(
            f"layers_per_fragment={per_fragment} does not fit the stage's layers {held.start}..{held.stop - 1}"
        )
    return FragmentGrid(layers, per_fragment, heads.start, len(heads), group.level)
