"""Bytes and flops of each kernel operation, from shapes alone.

The least traffic that any implementation can do: every input is read once, every output is written once, and what
stays in registers or shared memory is free. Block tables and lengths (4 bytes per block) are left out: they never
reach one percent. A multiply-add counts as two flops. Knows nothing of devices: how long it takes is hardware's
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_POSITION_BYTES = 8  # positions and slots are int64
_ROTARY_BYTES = 4  # the cosine and sine table is fp32


@dataclass(frozen=True, slots=True)
class OpCost:
    memory_bytes: int
    flops: int

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(self.memory_bytes + other.memory_bytes, self.flops + other.flops)


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
