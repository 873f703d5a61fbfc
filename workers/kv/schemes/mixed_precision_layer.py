"""A layer's keys and values in several forms; see workers.kv.schemes.mixed_precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from costs.packed_kv import PackedBits
from kernels.attention.precision_levels import LevelBlocks, Reach
from workers.errors import ModelError
from workers.kv.schemes.mixed_precision import MixedPrecisionScheme, PackedForm
from workers.kv.schemes.scheme import LayerBlocks
from workers.model.batch import Batch
from workers.model.layers.layer_cache import AttentionTerms


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """One form of the layer's blocks, and the keys that it stands for."""

    group: int
    parts: tuple[Tensor, ...]
    bits: PackedBits | None  # None: exact
    reach: Reach
    num_tokens: int = 0  # of each sequence, that are kept; 0: all

    def target_slots(self, batch: Batch) -> Tensor:
        """Where this pass's tokens lie in it; -1: nowhere."""
        slots = batch.groups[self.group].slot_mapping
        return torch.where(batch.positions < self.num_tokens, slots, -1) if self.num_tokens else slots

    def blocks(self, batch: Batch, sequences: slice, channels: Tensor | None) -> LevelBlocks:
        """For attention of some of the batch's sequences."""
        channels = channels if self.bits is not None and self.bits.has_channel_scales else None
        table = batch.groups[self.group].block_table[sequences]
        return LevelBlocks(self.parts, self.bits, self.reach, table, channels)


class MixedPrecisionLayer:
    """As LayerCache."""

    def __init__(self, blocks: Sequence[LayerBlocks], scheme: MixedPrecisionScheme) -> None:
        """blocks: in the order of the scheme's groups."""
        (exact,) = (each for each in blocks if not each.group.takes_full_blocks)
        self._block_size = exact.parts[0].shape[3]
        self._exact = _Level(exact.group.index, exact.parts, None, Reach(farthest=scheme.window_tokens))
        self._others = list(_other_levels(blocks, scheme))
        on_cuda = exact.parts[0].is_cuda
        if on_cuda and any(level.bits and min(level.bits.keys, level.bits.values) == 1 for level in self._others):
            raise ModelError(f"kv_cache_dtype: {scheme.name} runs on CPUs only")
        if on_cuda and (self._block_size < 16 or self._block_size & (self._block_size - 1)):
            raise ModelError(f"block_size: must be a power of two from 16 on with kv_cache_dtype={scheme.name}")

    def write(self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        slots = batch.groups[self._exact.group].slot_mapping
        kv_cache = self._exact.parts[0]
        rotated = kernels.rope_and_write_kv(q, k, v, cos_sin, batch.positions, kv_cache, slots)
        is_last = (slots >= 0) & (slots % self._block_size == self._block_size - 1)
        if kv_cache.is_cuda or bool(is_last.any()):
            for level in self._others:
                self._write_full_blocks(level, slots, level.target_slots(batch), terms.channel_scales)
        return rotated

    def _write_full_blocks(self, level: _Level, slots: Tensor, target_slots: Tensor, channels: Tensor | None) -> None:
        kv_cache = self._exact.parts[0]
        if level.bits is None:
            kernels.copy_full_blocks(kv_cache, slots, target_slots, level.parts[0])
        else:
            key_codes, key_scales, value_codes, value_scales = level.parts
            packed = key_codes, key_scales, value_codes, value_scales
            channels = channels if level.bits.has_channel_scales else None
            kernels.pack_full_blocks(kv_cache, slots, target_slots, packed, level.bits, channels)

    def attend_decodes(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        n = batch.num_decodes
        starts = torch.arange(n + 1, dtype=torch.int32, device=q.device)
        return self._attend(q, batch, terms, slice(n), starts, 1)

    def attend_prefills(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        sequences = slice(batch.num_decodes, None)
        return self._attend(q, batch, terms, sequences, batch.query_start_loc, batch.max_query_len)

    def _attend(
        self, q: Tensor, batch: Batch, terms: AttentionTerms, sequences: slice, starts: Tensor, max_query_len: int
    ) -> Tensor:
        return kernels.mixed_precision_attention(
            q,
            [level.blocks(batch, sequences, terms.channel_scales) for level in (*self._others, self._exact)],
            starts,
            batch.seq_lens[sequences],
            max_query_len,
            terms.scale,
            window=terms.window,
            sinks=terms.sinks,
            soft_cap=terms.soft_cap,
            batch_invariant=terms.batch_invariant,
        )


def _other_levels(blocks: Sequence[LayerBlocks], scheme: MixedPrecisionScheme) -> Iterator[_Level]:
    windows = [level.window_tokens for level in scheme.levels] + [scheme.window_tokens]
    by_distance = [each for each in blocks if not each.group.first_tokens][:-1]
    sink_tokens = scheme.sink_tokens if len(blocks) > len(by_distance) + 1 else 0
    for index, each in enumerate(by_distance):
        form = each.group.form
        assert isinstance(form, PackedForm)
        reach = Reach(windows[index + 1], windows[index], first_key=sink_tokens)
        yield _Level(each.group.index, each.parts, form.bits, reach)
    for each in blocks:
        if each.group.first_tokens:
            reach = Reach(scheme.window_tokens, end_key=sink_tokens)
            block_size = each.parts[0].shape[3]
            yield _Level(each.group.index, each.parts, None, reach, each.group.limit(block_size) * block_size)
