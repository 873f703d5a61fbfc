"""The same pass into a cache of 8-bit numbers: rotary position embedding of q and k, and the write of k and v.

fp8 is divided by a fixed scale of each KV head; int8 has a scale of each slot and KV head beside it, made of what is
written. What is quantised is the fp32 result of the rotation, rounded once. The kernel is that of kernels.kv.rope_kv.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from kernels.kv.rope_kv import (
    BF16,
    FP16,
    FP32,
    INT8,
    LIMIT,
    launch_rope,
    rope_case,
    rope_cost,
    rotate_float64,
    rotate_together,
    write_kv,
    write_rows,
)
from kernels.op import Case, Op
from kernels.quantise import FP8, narrow, quantise


def launch_quantised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor,
) -> torch.Tensor:
    return launch_rope(q, k, v, cos_sin, positions, kv_cache, slot_mapping, kv_scales)


def reference_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor,
) -> torch.Tensor:
    k_scale, v_scale = kv_scales.double().unsqueeze(-1).unbind(1)
    k_row = narrow(rotate_float64(k, cos_sin, positions) / k_scale, FP8)
    write_rows(k_row, narrow(v.double() / v_scale, FP8), kv_cache, slot_mapping)
    return rotate_float64(q, cos_sin, positions).to(q.dtype)


def reference_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor,
) -> torch.Tensor:
    k_row, k_scale = quantise(rotate_float64(k, cos_sin, positions), "int8")
    v_row, v_scale = quantise(v.double(), "int8")
    write_rows(k_row, v_row, kv_cache, slot_mapping)
    write_rows(k_scale, v_scale, kv_scales.unsqueeze(-1), slot_mapping)
    return rotate_float64(q, cos_sin, positions).to(q.dtype)


def cpu_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor,
) -> torch.Tensor:
    rotated, num_q_heads = rotate_together(q, k, cos_sin, positions)
    k_scale, v_scale = kv_scales.unsqueeze(-1).unbind(1)
    k_rows, v_rows = narrow(rotated[:, num_q_heads:] / k_scale, FP8), narrow(v.float() / v_scale, FP8)
    # Indexed writes know no fp8; a copy of bytes needs none.
    write_kv(k_rows.view(torch.uint8), v_rows.view(torch.uint8), kv_cache.view(torch.uint8), slot_mapping)
    return rotated[:, :num_q_heads].to(q.dtype)


def cpu_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor,
) -> torch.Tensor:
    rotated, num_q_heads = rotate_together(q, k, cos_sin, positions)
    k_rows, k_scales = quantise(rotated[:, num_q_heads:], "int8")
    v_rows, v_scales = quantise(v.float(), "int8")
    write_kv(k_rows, v_rows, kv_cache, slot_mapping)
    write_kv(k_scales, v_scales, kv_scales.unsqueeze(-1), slot_mapping)
    return rotated[:, :num_q_heads].to(q.dtype)


def _cost_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    *cache: torch.Tensor,
) -> costs.OpCost:
    return costs.quantised(rope_cost(q, k, v, cos_sin, positions), 2 * k.numel(), q.element_size(), 0)


def _cost_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    *cache: torch.Tensor,
) -> costs.OpCost:
    num_scales = 2 * k.shape[0] * k.shape[1]
    return costs.quantised(rope_cost(q, k, v, cos_sin, positions), 2 * k.numel(), q.element_size(), num_scales)


def _small_quantised(cache_dtype: torch.dtype) -> tuple[Case, ...]:
    return (
        rope_case((4, 2), 64, FP32, 5, 16, skipped=(3,), fused_qkv=True, cache_dtype=cache_dtype),
        rope_case((6, 3), 96, BF16, 3, 16, skipped=(1,), cache_dtype=cache_dtype),
        rope_case((7, 1), 80, FP16, 4, 64, cache_dtype=cache_dtype),
        rope_case((4, 4), 128, BF16, 1, 64, fused_qkv=True, cache_dtype=cache_dtype),
        rope_case((2, 2), 32, FP32, 6, 16, skipped=(2, 5), cache_dtype=cache_dtype),
    )


def _full_quantised(cache_dtype: torch.dtype) -> tuple[Case, ...]:
    return (
        rope_case((32, 8), 128, BF16, 8192, 64, fused_qkv=True, cache_dtype=cache_dtype, full=True),
        rope_case((32, 8), 128, BF16, 64, 64, fused_qkv=True, cache_dtype=cache_dtype, full=True),
        rope_case((8, 1), 128, BF16, 64, 64, cache_dtype=cache_dtype, full=True),
        rope_case((28, 4), 128, FP16, 256, 64, cache_dtype=cache_dtype, full=True),
        rope_case((32, 4), 128, FP32, 256, 16, cache_dtype=cache_dtype, full=True),
    )


LIMIT_QUANTISED = LIMIT + " Quantised K and V leave by 4 bytes a thread, a whole line a warp."
TOLERANCE_QUANTISED = {FP32: 1e-2, FP16: 1e-2, BF16: 1e-2}  # a step of 8 bits where fp32 and float64 round apart

rope_and_write_kv_fp8 = Op(
    "rope_and_write_kv_fp8", reference_fp8, launch_quantised, cpu_fp8, _cost_fp8,
    _small_quantised(FP8), _full_quantised(FP8), TOLERANCE_QUANTISED, LIMIT_QUANTISED,
)  # fmt: skip
rope_and_write_kv_int8 = Op(
    "rope_and_write_kv_int8", reference_int8, launch_quantised, cpu_int8, _cost_int8,
    _small_quantised(INT8), _full_quantised(INT8), TOLERANCE_QUANTISED, LIMIT_QUANTISED,
)  # fmt: skip
