"""Attention over a paged KV cache, on one rank's heads. Knows nothing of requests: it sees rows of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.errors import ModelError
from workers.model.batch import Batch
from workers.model.layers.layer_cache import AttentionTerms, LayerCache
from workers.model.layers.norm import HeadNorm
from workers.model.layers.source import LayerSource
from workers.model.parts import AttentionConfig, kv_channel_names, kv_scale_names
from workers.model.weight_format import Quantised


class Attention:
    """Projections, rotation, the cache, and the sums over it; see AttentionConfig."""

    def __init__(
        self, source: LayerSource, prefix: str, config: AttentionConfig, cos_sin: Tensor | None = None
    ) -> None:
        """cos_sin: another rotation than config.rope's, in the layout of workers.model.layers.rope."""
        self.qkv = source.linear(config.qkv(prefix, source.model.hidden_size))
        self.output = source.linear(config.output(prefix, source.model.hidden_size))
        self._q_norm = self._k_norm = None
        if config.has_qk_norm:
            self._q_norm = HeadNorm(source, prefix + "q_norm.weight", config.head_dim)
            self._k_norm = HeadNorm(source, prefix + "k_norm.weight", config.head_dim)
        shard = source.arithmetic.shard
        sinks: Tensor | None = None
        if config.has_sinks:
            mine = shard.slice_of(config.num_attention_heads)
            sinks = source.tensor(prefix + "sinks", (config.num_attention_heads,), (mine,)).float()
        self._cos_sin = source.rope_table(config.rope, config.head_dim) if cos_sin is None else cos_sin
        self._head_dim = config.head_dim
        self._terms = AttentionTerms(
            scale=config.scale or config.head_dim**-0.5,
            window=config.window,
            sinks=sinks,
            soft_cap=config.soft_cap,
            head_scales=kv_head_scales(source, prefix, config.num_key_value_heads),
            channel_scales=kv_channel_scales(source, prefix, config.num_key_value_heads, config.head_dim),
            batch_invariant=source.arithmetic.batch_invariant,
        )
        self.attended_width = config.num_attention_heads // shard.tp * config.head_dim

    def queries(self, x: Tensor | Quantised, batch: Batch, kv_cache: LayerCache) -> Tensor:
        """x [tokens, hidden_size] -> q [tokens, heads, head_dim]; this pass's keys and values go into the cache."""
        parts = torch.split(self.qkv(x), self.qkv.output_sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self._head_dim)) for t in parts)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        return kv_cache.write(q, k, v, self._cos_sin, batch, self._terms)

    def attend(self, q: Tensor, batch: Batch, kv_cache: LayerCache) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, heads * head_dim]; the only part in which rows meet."""
        n, outputs = batch.num_decodes, []
        if n:
            outputs.append(kv_cache.attend_decodes(q[:n], batch, self._terms))
        if len(q) > n:
            outputs.append(kv_cache.attend_prefills(q[n:], batch, self._terms))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


def kv_head_scales(source: LayerSource, prefix: str, num_kv_heads: int) -> Tensor:
    """fp32 [the rank's KV heads, 2]: what the checkpoint says a cached number is to be multiplied with; else 1."""
    mine = source.arithmetic.shard.slice_of(num_kv_heads)
    found = [source.stored_scale(names) for names in kv_scale_names(prefix)]
    columns = [torch.ones(num_kv_heads) if scale is None else scale.expand(num_kv_heads) for scale in found]
    return torch.stack(columns, 1)[mine].contiguous().to(source.arithmetic.groups.device)


def kv_channel_scales(source: LayerSource, prefix: str, num_kv_heads: int, head_dim: int) -> Tensor | None:
    """fp32 [the rank's KV heads, keys | values, scale | shift, head_dim]; None: the checkpoint has none.

    Raises ModelError where it has some of them, or scales that are not positive.
    """
    names, mine = kv_channel_names(prefix), source.arithmetic.shard.slice_of(num_kv_heads)
    found = [source.optional_numbers(name, (num_kv_heads, head_dim), (mine,)) for name in names]
    there = [tensor for tensor in found if tensor is not None]
    if not there:
        return None
    for name, tensor in zip(names, found, strict=True):
        if tensor is None:
            raise ModelError(f"no tensor {name}, though others of {prefix}*_channel_* are there")
        if name.endswith("scale") and not bool((tensor > 0).all()):
            raise ModelError(f"{name}: a scale must be positive")
    channels: Tensor = torch.stack(there, 1).unflatten(1, (2, 2)).contiguous()
    return channels
