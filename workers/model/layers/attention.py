"""Attention over a paged KV cache, on one rank's heads. Knows nothing of requests: it sees rows of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from workers.model.batch import Batch
from workers.model.layers.norm import HeadNorm
from workers.model.layers.source import LayerSource
from workers.model.parts import AttentionConfig
from workers.model.weight_format import Quantised


class Attention:
    """Projections, rotation, the cache, and the sums over it; see AttentionConfig."""

    def __init__(
        self, source: LayerSource, prefix: str, config: AttentionConfig, group: int, cos_sin: Tensor | None = None
    ) -> None:
        """group: which of the batch's groups it reads and writes. cos_sin: another rotation than config.rope's, in the
        layout of workers.model.layers.rope."""
        self.qkv = source.linear(config.qkv(prefix, source.model.hidden_size))
        self.output = source.linear(config.output(prefix, source.model.hidden_size))
        self._q_norm = self._k_norm = None
        if config.has_qk_norm:
            self._q_norm = HeadNorm(source, prefix + "q_norm.weight", config.head_dim)
            self._k_norm = HeadNorm(source, prefix + "k_norm.weight", config.head_dim)
        shard = source.arithmetic.shard
        self._sinks: Tensor | None = None
        if config.has_sinks:
            mine = shard.slice_of(config.num_attention_heads)
            self._sinks = source.tensor(prefix + "sinks", (config.num_attention_heads,), (mine,)).float()
        self._cos_sin = source.rope_table(config.rope, config.head_dim) if cos_sin is None else cos_sin
        self._group = group
        self._head_dim, self._scale = config.head_dim, config.scale or config.head_dim**-0.5
        self._window, self._soft_cap = config.window, config.soft_cap
        self._batch_invariant = source.arithmetic.batch_invariant
        self.attended_width = config.num_attention_heads // shard.tp * config.head_dim

    def queries(self, x: Tensor | Quantised, batch: Batch, kv_cache: Tensor) -> Tensor:
        """x [tokens, hidden_size] -> q [tokens, heads, head_dim]; this pass's keys and values go into the cache."""
        parts = torch.split(self.qkv(x), self.qkv.output_sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self._head_dim)) for t in parts)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        slots = batch.groups[self._group].slot_mapping
        return kernels.rope_and_write_kv(q, k, v, self._cos_sin, batch.positions, kv_cache, slots)

    def attend(self, q: Tensor, batch: Batch, kv_cache: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, heads * head_dim]; the only part in which rows meet."""
        n, outputs = batch.num_decodes, []
        table = batch.groups[self._group].block_table
        if n:
            outputs.append(
                kernels.decode_attention(
                    q[:n],
                    kv_cache,
                    table[:n],
                    batch.seq_lens[:n],
                    self._scale,
                    window=self._window,
                    sinks=self._sinks,
                    soft_cap=self._soft_cap,
                )
            )
        if len(q) > n:
            outputs.append(
                kernels.prefill_attention(
                    q[n:],
                    kv_cache,
                    table[n:],
                    batch.query_start_loc,
                    batch.seq_lens[n:],
                    batch.max_query_len,
                    self._scale,
                    window=self._window,
                    sinks=self._sinks,
                    soft_cap=self._soft_cap,
                    batch_invariant=self._batch_invariant,
                )
            )
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)
