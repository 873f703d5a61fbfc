"""What the layers of a model keep in the KV cache, and which of them share blocks. Without torch.

Layers with equal specs are one group: they have one block table per request and one pool of blocks, because their
blocks are needed for equally long. Knows nothing of devices, shards or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ELEMENT_BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}


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
class BlockPart:
    """What a block has of one kind of number: a tensor [layers, blocks, kv_heads, planes, slots, width] of a group."""

    dtype: str  # torch's name
    planes: int
    slots: int
    width: int
    is_per_token: bool = True  # a slot is a token's, so that a block that is not full has the first ones only

    @property
    def num_bytes(self) -> int:
        """Of one block, layer and KV head."""
        return self.planes * self.slots * self.width * ELEMENT_BYTES[self.dtype]


class BlockForm(Protocol):
    """The numbers that stand for the keys and values of a block. A frozen dataclass."""

    def parts(self, spec: CacheSpec, block_size: int, dtype: str) -> tuple[BlockPart, ...]:
        """dtype: that of the activations."""


@dataclass(frozen=True, slots=True)
class ExactForm:
    """Keys and values as they were computed."""

    def parts(self, spec: CacheSpec, block_size: int, dtype: str) -> tuple[BlockPart, ...]:
        """As in BlockForm."""
        return (BlockPart(dtype, spec.num_planes, block_size, spec.head_dim),)


EXACT_FORM = ExactForm()


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers of the whole model that share blocks."""

    index: int
    spec: CacheSpec
    layers: tuple[int, ...]  # ascending
    form: BlockForm = EXACT_FORM
    level: int = 0  # tells groups of the same layers apart, which keep the same tokens in several forms
    first_tokens: int = 0  # of each request, which alone are kept; 0: all
    takes_full_blocks: bool = False  # a block is written at once when all its tokens are known

    def limit(self, block_size: int) -> int:
        """Blocks that a request has at most; 0: no bound."""
        return -(-self.first_tokens // block_size)

    def num_blocks_held(self, num_tokens: int, block_size: int) -> int:
        """By a request with so many tokens that is being decoded, at most."""
        window = self.spec.window
        num_blocks = -(-num_tokens // block_size)
        if self.first_tokens:
            return min(num_blocks, self.limit(block_size))
        return min(num_blocks, (window - 1) // block_size + 2) if window else num_blocks

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Of one block, layer and KV head."""
        return sum(part.num_bytes for part in self.form.parts(self.spec, block_size, dtype))


def cache_groups(specs: Sequence[CacheSpec], form: BlockForm = EXACT_FORM) -> tuple[CacheGroup, ...]:
    """Groups of a model whose layers have these specs: those that keep all tokens first, then by their first layer."""
    layers_of: dict[CacheSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers_of.setdefault(spec, []).append(layer)
    ordered = sorted(layers_of.items(), key=lambda item: (item[0].window > 0, item[1][0]))
    return tuple(CacheGroup(index, spec, tuple(layers), form) for index, (spec, layers) in enumerate(ordered))
