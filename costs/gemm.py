"""Bytes and flops of matrix products with weights and of expert layers, from shapes alone.

As in `costs.ops`: the least traffic that any implementation can do, a multiply-add counts as two flops. Knows nothing
of devices.
"""

from __future__ import annotations

from costs.ops import OpCost


def linear(num_tokens: int, n: int, k: int, dtype_bytes: int) -> OpCost:
    """x [num_tokens, k] times weight [n, k], everything in one dtype."""
    return OpCost((num_tokens * (k + n) + n * k) * dtype_bytes, 2 * num_tokens * n * k)


def w4a16_gemm(num_tokens: int, n: int, k: int, group_size: int, has_zeros: bool, dtype_bytes: int) -> OpCost:
    """Half a byte a weight; a scale, and where there are zero points a byte, per group."""
    weight_bytes = n * k // 2 + n * (k // group_size) * (dtype_bytes + int(has_zeros))
    return OpCost(num_tokens * (k + n) * dtype_bytes + weight_bytes, 2 * num_tokens * n * k)


def w8a8_gemm(num_tokens: int, n: int, k: int, num_scales: int, out_bytes: int) -> OpCost:
    """A byte for each operand's element, four for each scale."""
    return OpCost((num_tokens + n) * k + 4 * num_scales + num_tokens * n * out_bytes, 2 * num_tokens * n * k)
