"""Bytes and flops of one step of a whole dense decoder (grouped-query attention, SwiGLU), from its sizes alone.

As in costs.ops the least traffic is counted: each weight is read once a step, each cached key and value once, and
activations not at all. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costs.ops import OpCost, prefill_attention


@dataclass(frozen=True, slots=True)
class DenseModel:
    """Sizes under the names of a Hugging Face config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)


def model_step(
    model: DenseModel, query_lens: Sequence[int], seq_lens: Sequence[int], num_sampled: int, dtype_bytes: int
) -> OpCost:
    """A step in which sequence i computes its last query_lens[i] of seq_lens[i] tokens, and num_sampled are chosen."""
    num_tokens = sum(query_lens)
    parameters = model.num_hidden_layers * model.layer_parameters
    head = model.vocab_size * model.hidden_size
    matrices = OpCost((parameters + head) * dtype_bytes, 2 * (num_tokens * parameters + num_sampled * head))
    attention = prefill_attention(
        query_lens, seq_lens, model.num_attention_heads, model.num_key_value_heads, model.head_dim, dtype_bytes
    )
    layers = model.num_hidden_layers
    return matrices + OpCost(layers * attention.memory_bytes, layers * attention.flops)
