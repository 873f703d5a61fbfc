"""Llama (LlamaForCausalLM): one pipeline stage of it, over a paged KV cache.

Grouped-query attention, rotary embedding in the Hugging Face layout with Llama 3's frequency scaling, SwiGLU, tied or
untied head. Knows nothing of requests: it sees rows of tokens and says where their keys and values go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from workers.config import ModelConfig, RopeScaling
from workers.layers import ColumnParallelLinear, RowParallelLinear, VocabParallel
from workers.loader import Weights
from workers.parallel import ParallelGroups, stage_layers


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one forward pass: first the sequences with one token each, then those with several."""

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    slot_mapping: Tensor  # int64 [tokens]; -1: already in the cache
    num_decodes: int  # the first rows, one token each
    block_table: Tensor  # int32 [sequences, max_blocks]
    seq_lens: Tensor  # int32 [sequences], this pass's tokens included
    query_start_loc: Tensor  # int32 [prefills + 1], counted from the first prefill row
    max_query_len: int  # of the prefills
    sample_rows: Tensor  # int64: rows whose logits are wanted


def rope_cos_sin(config: ModelConfig, num_positions: int, device: torch.device) -> Tensor:
    """fp32 [num_positions, head_dim]: cosines in the first half of a row, sines in the second."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is not None:
        inv_freq = _scale_llama3(inv_freq, config.rope_scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _scale_llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (arXiv:2407.21783)."""
    old = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    ramp = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    mixed = (1 - ramp) * inv_freq / scaling.factor + ramp * inv_freq
    mixed = torch.where(wavelength > old / low, inv_freq / scaling.factor, mixed)
    return torch.where(wavelength < old / high, inv_freq, mixed)


class LlamaLayer:
    """One decoder layer on one rank."""

    def __init__(self, config: ModelConfig, weights: Weights, groups: ParallelGroups, index: int) -> None:
        c, tp = config, groups.shard.tp
        prefix = f"model.layers.{index}."
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv_names = [attn + f"{p}_proj.weight" for p in "qkv"]
        self.qkv = ColumnParallelLinear(weights, groups, qkv_names, [query, key, key], c.hidden_size)
        self.o = RowParallelLinear(weights, groups, attn + "o_proj.weight", c.hidden_size, query)
        gate_up = [mlp + "gate_proj.weight", mlp + "up_proj.weight"]
        self.gate_up = ColumnParallelLinear(weights, groups, gate_up, [c.intermediate_size] * 2, c.hidden_size)
        self.down = RowParallelLinear(weights, groups, mlp + "down_proj.weight", c.hidden_size, c.intermediate_size)
        self.input_norm = weights.read(prefix + "input_layernorm.weight", (c.hidden_size,))
        self.post_norm = weights.read(prefix + "post_attention_layernorm.weight", (c.hidden_size,))
        self.num_heads, self.num_kv_heads, self.head_dim = (
            c.num_attention_heads // tp,
            c.num_key_value_heads // tp,
            c.head_dim,
        )
        self.eps, self.scale = c.rms_norm_eps, c.head_dim**-0.5

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, kv_cache: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [tokens, hidden_size] and the residual stream before it; returns both after the layer."""
        if residual is None:
            residual, x = hidden, kernels.rms_norm(hidden, self.input_norm, self.eps)
        else:
            x, residual = kernels.add_rms_norm(hidden, residual, self.input_norm, self.eps)
        x = self.o(self._attention(self.qkv(x), batch, kv_cache, cos_sin))
        x, residual = kernels.add_rms_norm(x, residual, self.post_norm, self.eps)
        return self.down(kernels.swiglu(self.gate_up(x))), residual

    def _attention(self, qkv: Tensor, batch: Batch, kv_cache: Tensor, cos_sin: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in torch.split(qkv, self.qkv.output_sizes, dim=-1))
        q = kernels.rope_and_write_kv(q, k, v, cos_sin, batch.positions, kv_cache, batch.slot_mapping)
        n, outputs = batch.num_decodes, []
        if n:
            outputs.append(
                kernels.decode_attention(q[:n], kv_cache, batch.block_table[:n], batch.seq_lens[:n], self.scale)
            )
        if len(q) > n:
            outputs.append(
                kernels.prefill_attention(
                    q[n:],
                    kv_cache,
                    batch.block_table[n:],
                    batch.query_start_loc,
                    batch.seq_lens[n:],
                    batch.max_query_len,
                    self.scale,
                )
            )
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


class LlamaStage:
    """The layers of one pipeline stage; the first also embeds, the last also has the head."""

    def __init__(self, config: ModelConfig, weights: Weights, groups: ParallelGroups) -> None:
        self.config = config
        self._groups = groups
        shard = groups.shard
        self.layer_range = stage_layers(config.num_hidden_layers, shard.pp, shard.stage)
        embed, vocab, hidden = "model.embed_tokens.weight", config.vocab_size, config.hidden_size
        self.embedding = self.head = None
        if shard.is_first_stage or (shard.is_last_stage and config.tie_word_embeddings):
            self.embedding = VocabParallel(weights, groups, embed, vocab, hidden)
        if shard.is_last_stage:
            self.head = (
                self.embedding
                if config.tie_word_embeddings
                else VocabParallel(weights, groups, "lm_head.weight", vocab, hidden)
            )
            self.norm = weights.read("model.norm.weight", (hidden,))
        self.layers = [LlamaLayer(config, weights, groups, i) for i in self.layer_range]

    def forward(self, batch: Batch, kv_caches: list[Tensor], cos_sin: Tensor) -> Tensor | None:
        """Run the stage. kv_caches: one [blocks, kv_heads, 2, block_size, head_dim] per layer of the stage.

        Returns the wanted rows' logits [rows, vocab / tp] on the last stage, None on the others.
        """
        shard = self._groups.shard
        residual: Tensor | None = None
        if shard.is_first_stage:
            assert self.embedding is not None
            hidden = self.embedding.embed(batch.token_ids)
        else:
            shape = (2, len(batch.token_ids), self.config.hidden_size)
            hidden, residual = self._groups.recv_from_previous_stage(shape, self.layers[0].input_norm.dtype)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, batch, kv_cache, cos_sin)
        assert residual is not None  # every stage has a layer
        if not shard.is_last_stage:
            self._groups.send_to_next_stage(torch.stack((hidden, residual)))
            return None
        assert self.head is not None
        rows = batch.sample_rows
        normed, _ = kernels.add_rms_norm(hidden[rows], residual[rows], self.norm, self.config.rms_norm_eps)
        return self.head.logits(normed)
