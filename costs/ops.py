"""Bytes and flops of each kernel operation, from shapes alone.

The least traffic that any implementation can do: every input is read once, every output is written once, and what
stays in registers or shared memory is free. Block tables and lengths (4 bytes per block) are left out: they never
reach one percent. A multiply-add counts as two flops. Knows nothing of devices: how long it takes is hardware's
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_POSITION_BYTES = 8  # positions and slots are int64
_ROTARY_BYTES = 4  # the cosine and sine table is fp32
_COUNT_BYTES = 4  # counts of seen tokens are int32
_SCALE_BYTES = 4  # scales of quantised numbers are fp32


@dataclass(frozen=True, slots=True)
class OpCost:
    memory_bytes: int
    flops: int
    unit: Literal["bf16", "fp8", "int8"] = "bf16"  # whose rate bounds the flops; of a sum, that of its first part

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(self.memory_bytes + other.memory_bytes, self.flops + other.flops, self.unit)


def decode_attention(
    seq_lens: Sequence[int], num_q_heads: int, num_kv_heads: int, head_dim: int, dtype_bytes: int
) -> OpCost:
    """One query token per sequence; seq_lens includes it."""
    return prefill_attention(
        [1 if n else 0 for n in seq_lens], seq_lens, num_q_heads, num_kv_heads, head_dim, dtype_bytes
    )


def prefill_attention(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
) -> OpCost:
    """Causal: the last query_lens[i] tokens of sequence i ask, each of those before it and of itself."""
    query_bytes = 2 * sum(query_lens) * num_q_heads * head_dim * dtype_bytes  # read q, write the output
    asking = [(n, length) for n, length in zip(query_lens, seq_lens, strict=True) if n]
    kv_bytes = 2 * sum(length for _, length in asking) * num_kv_heads * head_dim * dtype_bytes
    pairs = sum(n * (length - n) + n * (n + 1) // 2 for n, length in asking)
    return OpCost(query_bytes + kv_bytes, 4 * pairs * num_q_heads * head_dim)


def rms_norm(num_tokens: int, hidden_size: int, dtype_bytes: int) -> OpCost:
    """Per element: square, sum, times the row's factor, times the weight."""
    return OpCost((2 * num_tokens + 1) * hidden_size * dtype_bytes, 4 * num_tokens * hidden_size)


def add_rms_norm(num_tokens: int, hidden_size: int, dtype_bytes: int) -> OpCost:
    """As rms_norm, and reads and writes the residual."""
    return OpCost((4 * num_tokens + 1) * hidden_size * dtype_bytes, 5 * num_tokens * hidden_size)


def rope_and_write_kv(num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype_bytes: int) -> OpCost:
    """q, k and v are read, rotated q is written, k and v go to the cache. Per element: two products and a sum."""
    moved = 2 * num_tokens * (num_q_heads + 2 * num_kv_heads) * head_dim * dtype_bytes
    tables = num_tokens * (head_dim * _ROTARY_BYTES + 2 * _POSITION_BYTES)
    return OpCost(moved + tables, 3 * num_tokens * (num_q_heads + num_kv_heads) * head_dim)


def swiglu(num_tokens: int, intermediate_size: int, dtype_bytes: int) -> OpCost:
    """Per output: negate, exp, add, divide, multiply."""
    elements = num_tokens * intermediate_size
    return OpCost(3 * elements * dtype_bytes, 5 * elements)


def quantised(plain: OpCost, elements: int, dtype_bytes: int, num_scales: int) -> OpCost:
    """An operation whose `elements` results leave as 8 bits with scales. Per result: compare, multiply."""
    saved = elements * (dtype_bytes - 1) - num_scales * _SCALE_BYTES
    return OpCost(plain.memory_bytes - saved, plain.flops + 2 * elements)


def vocab_argmax(num_rows: int, num_ids: int, dtype_bytes: int) -> OpCost:
    """Reads the logits once; per logit a comparison."""
    return OpCost(num_rows * num_ids * dtype_bytes, num_rows * num_ids)


def sample(num_rows: int, num_ids: int, dtype_bytes: int) -> OpCost:
    """Reads the logits once. Per logit: scale, two logarithms, add, compare; the generator's integers do not count."""
    return OpCost(num_rows * num_ids * dtype_bytes, 5 * num_rows * num_ids)


def apply_penalties(num_rows: int, num_ids: int) -> OpCost:
    """Reads the counts of the rows that have penalties; seen tokens are too few to count. Per count a comparison."""
    return OpCost(num_rows * num_ids * _COUNT_BYTES, num_rows * num_ids)


def embedding(num_tokens: int, hidden_size: int, dtype_bytes: int) -> OpCost:
    """Reads a row per token and writes it; ids are int64."""
    return OpCost(num_tokens * (2 * hidden_size * dtype_bytes + _POSITION_BYTES), num_tokens * hidden_size)
