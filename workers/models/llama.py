"""Llama, Qwen 3 and Qwen 3 with experts: one pipeline stage of such a model, over a paged KV cache.

Grouped-query attention, rotary embedding in the Hugging Face layout with Llama 3's frequency scaling, queries and keys
normed per head or not, SwiGLU or a mixture of experts, tied or untied head. Knows nothing of requests: it sees rows of
tokens and says where their keys and values go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import kernels
from workers.config import ModelConfig, RopeScaling
from workers.errors import ModelError
from workers.layers import Arithmetic, ColumnParallelLinear, RowParallelLinear, VocabParallel
from workers.loader import Weights
from workers.model.batch import Batch
from workers.parallel import ParallelGroups, stage_layers


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


class SwiGlu:
    """down(silu(gate(x)) * up(x)), each rank with its share of the width."""

    def __init__(self, config: ModelConfig, weights: Weights, arithmetic: Arithmetic, prefix: str) -> None:
        hidden, width = config.hidden_size, config.intermediate_size
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        self.gate_up = ColumnParallelLinear(weights, arithmetic, names, [width] * 2, hidden)
        self.down = RowParallelLinear(weights, arithmetic, prefix + "down_proj.weight", hidden, width)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(kernels.swiglu(self.gate_up(x)))


class Experts:
    """Each token's best experts by a router, their SwiGLUs weighted and added; each rank has its share of every width.

    The router is whole on every rank, and in fp32 from its logits on, as in Qwen3MoeSparseMoeBlock.
    """

    def __init__(self, config: ModelConfig, weights: Weights, arithmetic: Arithmetic, prefix: str) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        mine = arithmetic.shard.slice_of(width)
        self._arithmetic = arithmetic
        self._top_k, self._sums_to_one = config.num_experts_per_tok, config.norm_topk_prob
        self.router = weights.read(prefix + "gate.weight", (config.num_experts, hidden))
        gate_up, down = [], []
        for expert in range(config.num_experts):
            of = f"{prefix}experts.{expert}."
            gate, up = (weights.read(of + f"{part}_proj.weight", (width, hidden), rows=mine) for part in ("gate", "up"))
            gate_up.append(torch.cat((gate, up)))
            down.append(weights.read(of + "down_proj.weight", (hidden, width), columns=mine))
        self.gate_up, self.down = torch.stack(gate_up), torch.stack(down)

    def __call__(self, x: Tensor) -> Tensor:
        chances = torch.softmax(self._arithmetic.linear(x, self.router).float(), dim=-1)
        weights, experts = chances.topk(self._top_k, dim=-1)
        if self._sums_to_one:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        mixed = kernels.moe_experts(x, self.gate_up, self.down, experts.int(), weights)
        return self._arithmetic.all_reduce(mixed)


class LlamaLayer:
    """One decoder layer on one rank."""

    def __init__(self, config: ModelConfig, weights: Weights, arithmetic: Arithmetic, index: int) -> None:
        c, tp = config, arithmetic.shard.tp
        prefix = f"model.layers.{index}."
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv_names = [attn + f"{p}_proj.weight" for p in "qkv"]
        self.qkv = ColumnParallelLinear(weights, arithmetic, qkv_names, [query, key, key], c.hidden_size)
        self.o = RowParallelLinear(weights, arithmetic, attn + "o_proj.weight", c.hidden_size, query)
        self.mlp = Experts(c, weights, arithmetic, mlp) if c.num_experts else SwiGlu(c, weights, arithmetic, mlp)
        self.q_norm = weights.read(attn + "q_norm.weight", (c.head_dim,)) if c.has_qk_norm else None
        self.k_norm = weights.read(attn + "k_norm.weight", (c.head_dim,)) if c.has_qk_norm else None
        self.input_norm = weights.read(prefix + "input_layernorm.weight", (c.hidden_size,))
        self.post_norm = weights.read(prefix + "post_attention_layernorm.weight", (c.hidden_size,))
        self.num_heads, self.num_kv_heads, self.head_dim = (
            c.num_attention_heads // tp,
            c.num_key_value_heads // tp,
            c.head_dim,
        )
        self.eps, self.scale = c.rms_norm_eps, c.head_dim**-0.5
        self._batch_invariant = arithmetic.batch_invariant

    def before_attention(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, kv_cache: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [tokens, hidden_size] and the residual stream before it; returns q [tokens, heads, head_dim] and the
        residual stream, with this pass's keys and values in the cache."""
        if residual is None:
            residual, x = hidden, kernels.rms_norm(hidden, self.input_norm, self.eps)
        else:
            x, residual = kernels.add_rms_norm(hidden, residual, self.input_norm, self.eps)
        parts = torch.split(self.qkv(x), self.qkv.output_sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm_heads(q, self.q_norm), self._norm_heads(k, self.k_norm)
        return kernels.rope_and_write_kv(
            q, k, v, cos_sin, batch.positions, kv_cache, batch.groups[0].slot_mapping
        ), residual

    def _norm_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        return kernels.rms_norm(x.reshape(-1, self.head_dim), weight, self.eps).view(x.shape)

    def attention(self, q: Tensor, batch: Batch, kv_cache: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, heads * head_dim]; the only part in which rows meet."""
        n, outputs = batch.num_decodes, []
        if n:
            outputs.append(
                kernels.decode_attention(
                    q[:n], kv_cache, batch.groups[0].block_table[:n], batch.seq_lens[:n], self.scale
                )
            )
        if len(q) > n:
            outputs.append(
                kernels.prefill_attention(
                    q[n:],
                    kv_cache,
                    batch.groups[0].block_table[n:],
                    batch.query_start_loc,
                    batch.seq_lens[n:],
                    batch.max_query_len,
                    self.scale,
                    batch_invariant=self._batch_invariant,
                )
            )
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)

    def after_attention(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden and the residual stream after the layer."""
        x, residual = kernels.add_rms_norm(self.o(attended), residual, self.post_norm, self.eps)
        return self.mlp(x), residual


class LlamaStage:
    """The layers of one pipeline stage; the first also embeds, the last also has the head."""

    def __init__(
        self, config: ModelConfig, weights: Weights, groups: ParallelGroups, batch_invariant: bool = False
    ) -> None:
        self.config = config
        self.batch_invariant = batch_invariant
        if batch_invariant and config.num_experts:
            raise ModelError("batch_invariant: a mixture of experts groups its rows by the batch")
        arithmetic = Arithmetic(groups, batch_invariant)
        shard = groups.shard
        self.is_first, self.is_last = shard.is_first_stage, shard.is_last_stage
        self.layer_range = stage_layers(config.num_hidden_layers, shard.pp, shard.stage)
        embed, vocab, hidden = "model.embed_tokens.weight", config.vocab_size, config.hidden_size
        self.embedding = self.head = None
        if shard.is_first_stage or (shard.is_last_stage and config.tie_word_embeddings):
            self.embedding = VocabParallel(weights, arithmetic, embed, vocab, hidden)
        if shard.is_last_stage:
            self.head = (
                self.embedding
                if config.tie_word_embeddings
                else VocabParallel(weights, arithmetic, "lm_head.weight", vocab, hidden)
            )
            self.norm = weights.read("model.norm.weight", (hidden,))
        self.layers = [LlamaLayer(config, weights, arithmetic, i) for i in self.layer_range]

    def enter(self, batch: Batch, received: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """hidden, and the residual stream where there is one already. received: see forward."""
        if received is not None:
            return received[0], received[1]
        assert self.embedding is not None
        return self.embedding.embed(batch.token_ids), None

    def leave(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        """What forward returns."""
        if not self.is_last:
            return torch.stack((hidden, residual))
        assert self.head is not None
        rows = batch.logit_rows
        normed, _ = kernels.add_rms_norm(hidden[rows], residual[rows], self.norm, self.config.rms_norm_eps)
        return self.head.logits(normed)

    def forward(self, batch: Batch, kv_caches: list[Tensor], cos_sin: Tensor, received: Tensor | None) -> Tensor:
        """Run the stage. kv_caches: one [blocks, kv_heads, 2, block_size, head_dim] per layer of the stage.

        received: [2, tokens, hidden_size] from the stage before; None on the first. Returns the same for the stage
        behind, or the wanted rows' logits [rows, vocab / tp] on the last.
        """
        hidden, residual = self.enter(batch, received)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            q, residual = layer.before_attention(hidden, residual, batch, kv_cache, cos_sin)
            hidden, residual = layer.after_attention(layer.attention(q, batch, kv_cache), residual)
        assert residual is not None  # every stage has a layer
        return self.leave(hidden, residual, batch)
