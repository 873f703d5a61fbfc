"""Bytes and flops of one step of a whole decoder (grouped-query attention, SwiGLU or experts), from its sizes alone.

As in costs.ops the least traffic is counted: each weight is read once a step, each cached key and value once, and
activations not at all. Of a layer's experts those are read that some token is expected to choose, if each token chose
at random. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costs.ops import OpCost, prefill_attention


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """Sizes under the names of a Hugging Face config.json. Without experts the last three are 0."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0

    @property
    def attention_parameters(self) -> int:
        """Of the matrices around one layer's attention."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys)

    def mlp(self, num_tokens: int, dtype_bytes: int) -> OpCost:
        """One layer's."""
        if not self.num_experts:
            parameters = 3 * self.hidden_size * self.intermediate_size
            return OpCost(parameters * dtype_bytes, 2 * num_tokens * parameters)
        of_one, router = 3 * self.hidden_size * self.moe_intermediate_size, self.hidden_size * self.num_experts
        share = 1 - (1 - self.num_experts_per_tok / self.num_experts) ** num_tokens  # of the experts, chosen by anybody
        read = int(share * self.num_experts * of_one) + router
        return OpCost(read * dtype_bytes, 2 * num_tokens * (self.num_experts_per_tok * of_one + router))


def model_step(
    model: DecoderSizes, query_lens: Sequence[int], seq_lens: Sequence[int], num_sampled: int, dtype_bytes: int
) -> OpCost:
    """A step in which sequence i computes its last query_lens[i] of seq_lens[i] tokens, and num_sampled are chosen."""
    num_tokens = sum(query_lens)
    around = model.attention_parameters
    layer = (
        OpCost(around * dtype_bytes, 2 * num_tokens * around)
        + model.mlp(num_tokens, dtype_bytes)
        + prefill_attention(
            query_lens, seq_lens, model.num_attention_heads, model.num_key_value_heads, model.head_dim, dtype_bytes
        )
    )
    layers, head = model.num_hidden_layers, model.vocab_size * model.hidden_size
    return OpCost(layers * layer.memory_bytes + head * dtype_bytes, layers * layer.flops + 2 * num_sampled * head)
