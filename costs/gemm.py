"""Bytes and flops of matrix products with weights and of expert layers, from shapes alone.

As in `costs.ops`: the least traffic that any implementation can do, a multiply-add counts as two flops. Knows nothing
of devices.
"""

from __future__ import annotations

from typing import Literal

from costs.ops import OpCost


def linear(num_tokens: int, n: int, k: int, dtype_bytes: int) -> OpCost:
    """x [num_tokens, k] times weight [n, k], everything in one dtype."""
    return OpCost((num_tokens * (k + n) + n * k) * dtype_bytes, 2 * num_tokens * n * k)


def weight_only_gemm(
    num_tokens: int, n: int, k: int, bits: int, group_size: int, bytes_per_group: int, dtype_bytes: int
) -> OpCost:
    """`bits` a weight; a scale, and what else there is (a zero point's byte, an offset), per group."""
    weight_bytes = n * k * bits // 8 + n * (k // group_size) * (dtype_bytes + bytes_per_group)
    return OpCost(num_tokens * (k + n) * dtype_bytes + weight_bytes, 2 * num_tokens * n * k)


def w8a8_gemm(num_tokens: int, n: int, k: int, num_scales: int, out_bytes: int, unit: Literal["fp8", "int8"]) -> OpCost:
    """A byte for each operand's element, four for each scale."""
    return OpCost((num_tokens + n) * k + 4 * num_scales + num_tokens * n * out_bytes, 2 * num_tokens * n * k, unit)


def w4a8_gemm(num_tokens: int, n: int, k: int, scale_bytes: int, zero_bytes: int) -> OpCost:
    """A byte for an activation, four for a row's scale, half a byte a weight, bf16 out."""
    weight_bytes = n * k // 2 + scale_bytes + zero_bytes
    return OpCost(num_tokens * (k + 2 * n + 4) + weight_bytes, 2 * num_tokens * n * k, "int8")


def w2a8_gemm(num_tokens: int, n: int, k: int) -> OpCost:
    """A byte for an activation, four for a scale, a quarter of a byte a weight, bf16 out."""
    return OpCost(num_tokens * (k + 2 * n + 4) + n * k // 4 + 4 * n, 2 * num_tokens * n * k, "int8")


def sparse24_gemm(num_tokens: int, n: int, k: int) -> OpCost:
    """All in 16 bits; of every four weights two, and four bits for where they belong. Products with zeros count not."""
    return OpCost(2 * num_tokens * (k + n) + n * k * 9 // 8, num_tokens * n * k)


def add_outliers(num_tokens: int, n: int, num_inputs: int, num_flags: int) -> OpCost:
    """The weights, a byte each, and 16-bit activations of `num_inputs` inputs; bf16 results are read and written."""
    moved = num_inputs * (n + 2 * num_tokens) + num_flags + (4 * n + 4 * num_tokens * n if num_inputs else 0)
    return OpCost(moved, 2 * num_tokens * n * num_inputs)


def add_low_rank(num_tokens: int, n: int, k: int, rank: int, dtype_bytes: int) -> OpCost:
    """Both matrices and the activations are read, the result is read and written; what lies between is free."""
    return OpCost((rank * (k + n) + num_tokens * (k + 2 * n)) * dtype_bytes, 2 * num_tokens * rank * (k + n))


def add_lora(
    num_rows: int, num_adapters: int, n_and_k: tuple[int, int], width: int, rank: int, dtype_bytes: int
) -> OpCost:
    """Of rows with an adapter: x is read, the result read and written; the matrices of each adapter are read once.

    width: rows of a `down`, one rank for each of the matrices that are multiplied together.
    """
    n, k = n_and_k
    moved = num_rows * (k + 2 * n) + num_adapters * (width * k + n * rank)
    return OpCost(moved * dtype_bytes, 2 * num_rows * (width * k + n * rank))


def group_by_expert(num_tokens: int, top_k: int, num_experts: int, block: int) -> OpCost:
    """Ids are read, a row number per slot and an expert per block are written. Per id: compare, rank, store."""
    num_rows = num_tokens * top_k
    num_blocks = min(num_rows, num_rows // block + min(num_rows, num_experts))
    return OpCost(4 * (num_rows + num_blocks * (block + 1)), 3 * num_rows)


def moe_experts(
    num_tokens: int, num_routed: int, num_active: int, hidden_size: int, width: int, dtype_bytes: int
) -> OpCost:
    """`num_routed` (token, expert) pairs to `num_active` experts: each active expert's three matrices are read once."""
    weight_bytes = 3 * num_active * hidden_size * width * dtype_bytes
    moved = 2 * num_tokens * hidden_size * dtype_bytes + weight_bytes
    return OpCost(moved, num_routed * (6 * hidden_size * width + 5 * width + 2 * hidden_size))


def moe_experts_fp8(num_tokens: int, num_routed: int, num_active: int, hidden_size: int, width: int) -> OpCost:
    """As moe_experts: a byte an element, four for the scale of 128 activations or 128x128 weights, bf16 out."""
    weight_bytes = 3 * num_active * (hidden_size * width + 4 * (hidden_size // 128) * (width // 128))
    moved = num_tokens * (3 * hidden_size + 4 * (hidden_size // 128)) + weight_bytes
    return OpCost(moved, num_routed * (6 * hidden_size * width + 8 * width + 2 * hidden_size), "fp8")


def moe_experts_weight_only(
    num_tokens: int, num_routed: int, hidden_size: int, width: int, weight_bytes: int, dtype_bytes: int
) -> OpCost:
    """As moe_experts, with `weight_bytes` for the active experts' codes, scales and what else they have."""
    plain = moe_experts(num_tokens, num_routed, 0, hidden_size, width, dtype_bytes)
    return OpCost(plain.memory_bytes + weight_bytes, plain.flops)
