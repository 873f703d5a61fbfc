"""A layer's keys and values on a ladder of forms; see workers.kv.schemes.ladder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from costs.packed_kv import PackedBits
from kernels.attention.rungs import Reach, RungBlocks
from workers.errors import ModelError
from workers.kv.schemes.ladder import LadderScheme, PackedForm
from workers.kv.schemes.scheme import LayerBlocks
from workers.model.batch import Batch
from workers.model.layers.layer_cache import AttentionTerms


@dataclass(frozen=True, slots=True, eq=False)
class _Rung:
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

    def blocks(self, batch: Batch, sequences: slice) -> RungBlocks:
        """For attention of some of the batch's sequences."""
        return RungBlocks(self.parts, self.bits, self.reach, batch.groups[self.group].block_table[sequences])


class LadderLayer:
    """As LayerCache."""

    def __init__(self, blocks: Sequence[LayerBlocks], scheme: LadderScheme) -> None:
        """blocks: in the order of the scheme's groups."""
        (exact,) = (each for each in blocks if not each.group.takes_full_blocks)
        self._block_size = exact.parts[0].shape[3]
        self._exact = _Rung(exact.group.index, exact.parts, None, Reach(farthest=scheme.window_tokens))
        self._others = list(_other_rungs(blocks, scheme))
        on_cuda = exact.parts[0].is_cuda
        if on_cuda and any(rung.bits and min(rung.bits.keys, rung.bits.values) == 1 for rung in self._others):
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
            for rung in self._others:
                self._write_full_blocks(rung, slots, rung.target_slots(batch))
        return rotated

    def _write_full_blocks(self, rung: _Rung, slots: Tensor, target_slots: Tensor) -> None:
        kv_cache = self._exact.parts[0]
        if rung.bits is None:
            kernels.copy_full_blocks(kv_cache, slots, target_slots, rung.parts[0])
        else:
            key_codes, key_scales, value_codes, value_scales = rung.parts
            packed = key_codes, key_scales, value_codes, value_scales
            kernels.pack_full_blocks(kv_cache, slots, target_slots, packed, rung.bits)

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
        return kernels.ladder_attention(
            q,
            [rung.blocks(batch, sequences) for rung in (*self._others, self._exact)],
            starts,
            batch.seq_lens[sequences],
            max_query_len,
            terms.scale,
            window=terms.window,
            sinks=terms.sinks,
            soft_cap=terms.soft_cap,
            batch_invariant=terms.batch_invariant,
        )


def _other_rungs(blocks: Sequence[LayerBlocks], scheme: LadderScheme) -> Iterator[_Rung]:
    windows = [rung.window_tokens for rung in scheme.rungs] + [scheme.window_tokens]
    ladder = [each for each in blocks if not each.group.first_tokens][:-1]
    sink_tokens = scheme.sink_tokens if len(blocks) > len(ladder) + 1 else 0
    for index, each in enumerate(ladder):
        form = each.group.form
        assert isinstance(form, PackedForm)
        reach = Reach(windows[index + 1], windows[index], first_key=sink_tokens)
        yield _Rung(each.group.index, each.parts, form.bits, reach)
    for each in blocks:
        if each.group.first_tokens:
            reach = Reach(scheme.window_tokens, end_key=sink_tokens)
            block_size = each.parts[0].shape[3]
            yield _Rung(each.group.index, each.parts, None, reach, each.group.limit(block_size) * block_size)
