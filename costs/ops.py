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
    seq_lens: Sequence[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    window: int = 0,
    kv_token_bytes: int | None = None,
) -> OpCost:
    """One query token per sequence; seq_lens includes it."""
    query_lens = [1 if n else 0 for n in seq_lens]
    return prefill_attention(
        query_lens, seq_lens, num_q_heads, num_kv_heads, head_dim, dtype_bytes, window, kv_token_bytes
    )


def prefill_attention(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    window: int = 0,
    kv_token_bytes: int | None = None,
) -> OpCost:
    """Causal: the last query_lens[i] tokens of sequence i ask, each of those before it and of itself.

    With a window each asks that many, its own included. kv_token_bytes: K, V and scales of a cached token under one KV
    head, where that is not 2 * head_dim * dtype_bytes.
    """
    if kv_token_bytes is None:
        kv_token_bytes = 2 * head_dim * dtype_bytes
    query_bytes = 2 * sum(query_lens) * num_q_heads * head_dim * dtype_bytes  # read q, write the output
    asking = [(n, length, window or length) for n, length in zip(query_lens, seq_lens, strict=True) if n]
    num_read = sum(min(length, n - 1 + seen) for n, length, seen in asking)
    pairs = sum(_seen_by_first(length, seen) - _seen_by_first(length - n, seen) for n, length, seen in asking)
    return OpCost(query_bytes + num_read * num_kv_heads * kv_token_bytes, 4 * pairs * num_q_heads * head_dim)


def tree_attention(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    depths: Sequence[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    window: int = 0,
    kv_token_bytes: int | None = None,
) -> OpCost:
    """The last query_lens[i] tokens of sequence i are a tree; each asks its ancestors, itself and all before the tree.

    depths: of each node of all trees, the number of its ancestors. What is read is what as many tokens in a row read.
    """
    read = prefill_attention(
        query_lens, seq_lens, num_q_heads, num_kv_heads, head_dim, dtype_bytes, window, kv_token_bytes
    ).memory_bytes
    positions = [end - n for n, end in zip(query_lens, seq_lens, strict=True) for _ in range(n)]
    seen = [before + depth + 1 for before, depth in zip(positions, depths, strict=True)]
    pairs = sum(min(n, window or n) for n in seen)
    return OpCost(read, 4 * pairs * num_q_heads * head_dim)


def _seen_by_first(num_tokens: int, window: int) -> int:
    """Keys that a sequence's first tokens see between them."""
    ramp = min(num_tokens, window)
    return ramp * (ramp + 1) // 2 + (num_tokens - ramp) * window


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


def copy(num_bytes: int) -> OpCost:
    """Each byte is read and written."""
    return OpCost(2 * num_bytes, 0)


def mla_decode_attention(
    seq_lens: Sequence[int], num_heads: int, latent_dim: int, rope_dim: int, dtype_bytes: int
) -> OpCost:
    """Absorbed: a token's latent and rotary part are read once for all heads."""
    width, num_tokens = latent_dim + rope_dim, sum(seq_lens)
    query_bytes = sum(n > 0 for n in seq_lens) * num_heads * (width + latent_dim) * dtype_bytes
    return OpCost(query_bytes + num_tokens * width * dtype_bytes, 2 * num_tokens * num_heads * (width + latent_dim))


def mla_prefill_attention(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_heads: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
    dtype_bytes: int,
) -> OpCost:
    """Expanded: each head has keys and values of its own, but for the rotary part of a key."""
    asking = [(n, length) for n, length in zip(query_lens, seq_lens, strict=True) if n]
    query_elements = sum(query_lens) * num_heads * (nope_dim + rope_dim + v_dim)
    kv_elements = sum(length for _, length in asking) * (num_heads * (nope_dim + v_dim) + rope_dim)
    pairs = sum(_seen_by_first(length, length) - _seen_by_first(length - n, length) for n, length in asking)
    flops = 2 * pairs * num_heads * (nope_dim + rope_dim + v_dim)
    return OpCost((query_elements + kv_elements) * dtype_bytes, flops)


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
