"""What the layers of a model keep in the KV cache, and which of them share blocks. Without torch.

Layers with equal specs are one group: they have one block table per request and one pool of blocks, because their
blocks are needed for equally long. Knows nothing of devices, shards or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What one layer keeps per token: keys and values per head, or one latent row for all heads."""

    num_kv_heads: int  # of the whole model; 1 for a latent cache
    head_dim: int  # numbers in a row
    window: int = 0  # tokens that a query sees, itself included; 0: all before it
    is_latent: bool = False  # one row in place of a key and a value (DeepSeek-V2, arXiv:2405.04434)

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.head_dim < 1 or self.window < 0:
            raise ValueError(f"no layer keeps {self}")
        if self.is_latent and self.num_kv_heads != 1:
            raise ValueError("a latent cache has one row per token: num_kv_heads must be 1")

    @property
    def num_planes(self) -> int:
        """Rows per token and head: a key and a value, or one latent row."""
        return 1 if self.is_latent else 2


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers of the whole model that share blocks."""

    index: int
    spec: CacheSpec
    layers: tuple[int, ...]  # ascending


def cache_groups(specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
    """Groups of a model whose layers have these specs: those that keep all tokens first, then by their first layer."""
    layers_of: dict[CacheSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers_of.setdefault(spec, []).append(layer)
    ordered = sorted(layers_of.items(), key=lambda item: (item[0].window > 0, item[1][0]))
    return tuple(CacheGroup(index, spec, tuple(layers)) for index, (spec, layers) in enumerate(ordered))


def group_of_layer(groups: Sequence[CacheGroup]) -> dict[int, tuple[int, int]]:
    """For each layer the index of its group, and its index among the group's layers."""
    return {layer: (group.index, index) for group in groups for index, layer in enumerate(group.layers)}
