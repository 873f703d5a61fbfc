"""A layer's cache as one tensor of the activations' dtype or of 8-bit numbers, which the attention kernels read.

Knows nothing of blocks, groups of layers or fragments.
"""

from __future__ import annotations

from torch import Tensor

import kernels
from kernels.attention.decode_cpu import DecodePlan
from kernels.attention.prefill_cpu import PrefillPlan
from workers.model.batch import Batch
from workers.model.layers.layer_cache import AttentionTerms


class PagedLayer:
    """As LayerCache, over kv_cache [blocks, kv_heads, 2, block_size, head_dim] of one of the batch's groups."""

    def __init__(
        self, group: int, kv_cache: Tensor, token_scales: Tensor | None = None, has_head_scales: bool = False
    ) -> None:
        """token_scales: fp32 [blocks, kv_heads, 2, block_size], of an int8 cache. has_head_scales: an fp8 cache."""
        self._group = group
        self._kv_cache = kv_cache
        self._token_scales = token_scales
        self._has_head_scales = has_head_scales

    @property
    def is_quantised(self) -> bool:
        """Whether it keeps 8 bits."""
        return self._has_head_scales or self._token_scales is not None

    def write(self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        slots = batch.groups[self._group].slot_mapping
        args = (q, k, v, cos_sin, batch.positions, self._kv_cache, slots)
        if self._token_scales is not None:
            return kernels.rope_and_write_kv_int8(*args, self._token_scales)
        if self._has_head_scales:
            return kernels.rope_and_write_kv_fp8(*args, terms.head_scales)
        return kernels.rope_and_write_kv(*args)

    def attend_decodes(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        n = batch.num_decodes
        block_table, seq_lens = batch.groups[self._group].block_table[:n], batch.seq_lens[:n]
        plan = None
        if not q.is_cuda:
            key = DecodePlan, (self._group, terms.window)
            plan = batch.plan(key, lambda: DecodePlan.of(block_table, seq_lens, self._kv_cache, q.dtype, terms.window))
        return kernels.decode_attention(
            q,
            self._kv_cache,
            block_table,
            seq_lens,
            terms.scale,
            window=terms.window,
            sinks=terms.sinks,
            soft_cap=terms.soft_cap,
            kv_scales=self._scales(terms),
            plan=plan,
        )

    def attend_prefills(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        n, starts = batch.num_decodes, batch.query_start_loc
        block_table, seq_lens = batch.groups[self._group].block_table[n:], batch.seq_lens[n:]
        plan = None
        if not (q.is_cuda or terms.batch_invariant):
            key = PrefillPlan, (self._group, terms.window)
            plan = batch.plan(
                key, lambda: PrefillPlan.of(block_table, starts, seq_lens, self._kv_cache, q.dtype, terms.window)
            )
        return kernels.prefill_attention(
            q,
            self._kv_cache,
            block_table,
            starts,
            seq_lens,
            batch.max_query_len,
            terms.scale,
            window=terms.window,
            sinks=terms.sinks,
            soft_cap=terms.soft_cap,
            kv_scales=self._scales(terms),
            batch_invariant=terms.batch_invariant,
            plan=plan,
        )

    def _scales(self, terms: AttentionTerms) -> Tensor | None:
        return terms.head_scales if self._has_head_scales else self._token_scales
