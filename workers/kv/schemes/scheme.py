"""What a scheme of the paged cache says: the groups of blocks that layers have, and how attention uses them.

Without torch until layers are made. Knows nothing of any particular scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from workers.errors import ModelError
from workers.model.cache_spec import CacheGroup, CacheSpec

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.layers.layer_cache import LayerCache


@dataclass(frozen=True, slots=True, eq=False)
class LayerBlocks:
    """What one layer has in one cache group."""

    group: CacheGroup
    parts: tuple[Tensor, ...]  # of each part of the group's form: [blocks, kv_heads, planes, slots, width]


class KVScheme(Protocol):
    """A way to keep keys and values. A frozen dataclass, all of whose fields are in the fingerprint of KV blocks."""

    def groups(self, specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
        """The cache groups of layers with these specs. Raises ModelError for layers that it cannot keep."""

    def layer_cache(self, blocks: Sequence[LayerBlocks]) -> LayerCache:
        """How attention writes and reads a layer, given what it has in each of its groups."""


def refuse_latent(name: str, specs: Sequence[CacheSpec]) -> None:
    """Raise ModelError when a layer keeps latent rows."""
    if any(spec.is_latent for spec in specs):
        raise ModelError(f"kv_cache_dtype: must be auto for a latent cache, which is kept as computed, not {name!r}")
