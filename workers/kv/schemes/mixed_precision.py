"""Keys and values in fewer bits the farther they lie back; the nearest are exact.

Each precision level is a cache group of its own over the same layers. Tokens are written to the exact level, whose
blocks are freed when they leave its window. A full block is quantized from the exact level into all others at once: its
bytes depend on its tokens alone, so that it is named and shared like any block. The distance between query and key
alone determines which level is read. The first tokens of a sequence (its attention sinks) may stay exact at any
distance. Torch is imported when layers are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from costs.packed_kv import PackedBits, channel_group
from workers.errors import ModelError
from workers.kv.schemes.scheme import LayerBlocks, refuse_latent
from workers.model.cache_spec import EXACT_FORM, BlockPart, CacheGroup, CacheSpec, cache_groups

if TYPE_CHECKING:
    from workers.model.layers.layer_cache import LayerCache


@dataclass(frozen=True, slots=True)
class PackedForm:
    """As kernels.kv.packed_blocks."""

    bits: PackedBits

    def parts(self, spec: CacheSpec, block_size: int, dtype: str) -> tuple[BlockPart, ...]:
        """As in BlockForm."""
        head_dim, num_groups = spec.head_dim, spec.head_dim // channel_group(spec.head_dim)
        token_scales = BlockPart("float16", 2, block_size, num_groups)
        key_scales = BlockPart("float16", 2, 1, head_dim, is_per_token=False)
        return (
            BlockPart("uint8", 1, block_size, head_dim * self.bits.keys // 8),
            token_scales if self.bits.has_token_keys else key_scales,
            BlockPart("uint8", 1, block_size, head_dim * self.bits.values // 8),
            token_scales,
        )


@dataclass(frozen=True, slots=True)
class PrecisionLevel:
    """What stands for keys up to a distance."""

    form: PackedForm
    window_tokens: int = 0  # 0: at any distance


@dataclass(frozen=True, slots=True)
class MixedPrecisionScheme:
    """The farthest level first; the exact one is not listed."""

    name: str
    levels: tuple[PrecisionLevel, ...]
    window_tokens: int  # that stay exact behind each token, itself included; at least a block
    sink_tokens: int  # at the beginning of a sequence, that stay exact

    def groups(self, specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
        """As in KVScheme: for all layers what is kept longest, then their other levels."""
        refuse_latent(self.name, specs)
        for spec in specs:
            self._check(spec)
        found = list[CacheGroup]()
        base = cache_groups(specs)
        for group in base:
            is_packed = self._is_packed(group.spec)
            form = self.levels[0].form if is_packed else EXACT_FORM
            found.append(replace(group, form=form, takes_full_blocks=is_packed))
        for group in base:
            if self._is_packed(group.spec):
                for nearer in self._nearer(group):
                    found.append(replace(nearer, index=len(found)))
        return tuple(found)

    def _is_packed(self, spec: CacheSpec) -> bool:
        """Layers that see no farther than the exact window have nothing to pack."""
        return not 0 < spec.window <= self.window_tokens

    def _nearer(self, group: CacheGroup) -> Iterator[CacheGroup]:
        """The levels behind the first, the exact one, and the sinks."""
        number = 0
        for number, level in enumerate(self.levels[1:], 1):
            spec = replace(group.spec, window=min(level.window_tokens, group.spec.window or level.window_tokens))
            yield replace(group, spec=spec, form=level.form, level=number, takes_full_blocks=True)
        spec = replace(group.spec, window=self.window_tokens)
        yield replace(group, spec=spec, level=number + 1)
        if self.sink_tokens and not group.spec.window:  # a window of the model's own leaves the first tokens behind
            first = group.spec
            yield replace(group, spec=first, level=number + 2, first_tokens=self.sink_tokens, takes_full_blocks=True)

    def _check(self, spec: CacheSpec) -> None:
        for level in self.levels:
            bits = level.form.bits
            if any(spec.head_dim * each % 8 for each in (bits.keys, bits.values)):
                raise ModelError(f"kv_cache_dtype: {self.name} does not pack heads of {spec.head_dim} numbers")

    def layer_cache(self, blocks: Sequence[LayerBlocks]) -> LayerCache:
        """As in KVScheme."""
        from workers.kv.schemes.mixed_precision_layer import MixedPrecisionLayer
        from workers.kv.schemes.paged_layer import PagedLayer

        if len(blocks) == 1:
            return PagedLayer(blocks[0].group.index, blocks[0].parts[0])
        return MixedPrecisionLayer(blocks, self)
