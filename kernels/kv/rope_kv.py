"""Rotary position embedding of q and k, and the write of k and v into the paged cache, in one pass.

Hugging Face's half-rotation layout: dimension i turns together with i + head_dim / 2. A row of cos_sin holds the
cosines, then the sines, in fp32. A token's slot is block * block_size + offset; slot -1 writes nothing.

The cache holds the model's dtype; or fp8, divided by a fixed scale of each KV head; or int8, with a scale of each slot
and KV head beside it, made of what is written. One kernel does all three; the ops of the 8-bit caches are in
kernels.kv.rope_kv_quantised. Knows nothing of how frequencies are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target
from kernels.quantise import FP8, LARGEST, largest_magnitude, round_scaled

INT8 = torch.int8
_FEW_TOKENS = 2  # CPU: up to here plain writes are faster than indexed ones
_MANY_TOKENS = 256  # GPU: from here on tokens alone fill the device, and a program takes all heads of one
_FEW_HEADS = 4  # GPU: query heads that a program of a decode step has at least, where there are as many


@jit
def _rope_kernel(
    out_ptr: Value,  # [tokens, q_heads, 2 * HALF]
    q_ptr: Value,
    k_ptr: Value,
    v_ptr: Value,
    cos_sin_ptr: Value,  # [positions, 2 * HALF] fp32
    positions_ptr: Value,
    kv_ptr: Value,
    slots_ptr: Value,
    scale_ptr: Value,  # FIXED_SCALES: [kv_heads, 2]; SLOT_SCALES: [num_blocks, kv_heads, 2, BLOCK_SIZE], written
    stride_q: Value,
    stride_k: Value,
    stride_v: Value,
    stride_block: Value,
    stride_scales: Value,
    HEADS: constexpr,
    GROUP: constexpr,
    HALF: constexpr,
    BLOCK_SIZE: constexpr,
    BLOCK_H: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_HALF: constexpr,
    FIXED_SCALES: constexpr,
    SLOT_SCALES: constexpr,
) -> None:
    """One program per token and HEADS KV heads, with their groups of query heads."""
    token = tl.program_id(0).to(tl.int64)
    first_head, num_q_heads = tl.program_id(1) * HEADS, tl.num_programs(1) * HEADS * GROUP
    dims = tl.arange(0, BLOCK_HALF)
    in_half = dims < HALF
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + dims
    cos = tl.load(angle_ptr, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HALF, mask=in_half, other=0.0)[None, :]

    row = tl.arange(0, BLOCK_Q)
    q_mask = (row < HEADS * GROUP)[:, None] & in_half[None, :]
    q_offsets = (first_head * GROUP + row)[:, None] * (2 * HALF) + dims[None, :]
    a = tl.load(q_ptr + token * stride_q + q_offsets, mask=q_mask, other=0.0).to(tl.float32)
    b = tl.load(q_ptr + token * stride_q + q_offsets + HALF, mask=q_mask, other=0.0).to(tl.float32)
    # K and V are asked for before it is known whether they are written: the slot's latency is hidden behind theirs.
    row_h = tl.arange(0, BLOCK_H)
    head, is_head = first_head + row_h, row_h < HEADS
    mask = is_head[:, None] & in_half[None, :]
    offsets = head[:, None] * (2 * HALF) + dims[None, :]
    ka = tl.load(k_ptr + token * stride_k + offsets, mask=mask, other=0.0).to(tl.float32)
    kb = tl.load(k_ptr + token * stride_k + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    va = tl.load(v_ptr + token * stride_v + offsets, mask=mask, other=0.0)
    vb = tl.load(v_ptr + token * stride_v + offsets + HALF, mask=mask, other=0.0)
    slot = tl.load(slots_ptr + token)

    out_ptrs = out_ptr + token * num_q_heads * (2 * HALF) + q_offsets
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptrs, (a * cos - b * sin).to(dtype), mask=q_mask)
    tl.store(out_ptrs + HALF, (b * cos + a * sin).to(dtype), mask=q_mask)

    if slot >= 0:
        k_first, k_second = ka * cos - kb * sin, kb * cos + ka * sin
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        k_slots = kv_ptr + block * stride_block + head[:, None] * (4 * BLOCK_SIZE * HALF)
        k_slots += offset * (2 * HALF) + dims[None, :]
        v_slots = k_slots + 2 * BLOCK_SIZE * HALF
        if FIXED_SCALES or SLOT_SCALES:
            INT8: constexpr = SLOT_SCALES
            v_first, v_second = va.to(tl.float32), vb.to(tl.float32)
            if SLOT_SCALES:
                k_peak = largest_magnitude(tl.maximum(tl.abs(k_first), tl.abs(k_second)), 1)
                v_peak = largest_magnitude(tl.maximum(tl.abs(v_first), tl.abs(v_second)), 1)
                scale_ptrs = scale_ptr + block * stride_scales + head * (2 * BLOCK_SIZE) + offset
                tl.store(scale_ptrs, k_peak / 127.0, mask=is_head)
                tl.store(scale_ptrs + BLOCK_SIZE, v_peak / 127.0, mask=is_head)
                k_factor, v_factor = (127.0 / k_peak)[:, None], (127.0 / v_peak)[:, None]
            else:
                k_factor = (1.0 / tl.load(scale_ptr + head * 2, mask=is_head, other=1.0))[:, None]
                v_factor = (1.0 / tl.load(scale_ptr + head * 2 + 1, mask=is_head, other=1.0))[:, None]
            tl.store(k_slots, round_scaled(k_first * k_factor, INT8), mask=mask)
            tl.store(k_slots + HALF, round_scaled(k_second * k_factor, INT8), mask=mask)
            tl.store(v_slots, round_scaled(v_first * v_factor, INT8), mask=mask)
            tl.store(v_slots + HALF, round_scaled(v_second * v_factor, INT8), mask=mask)
        else:
            tl.store(k_slots, k_first.to(dtype), mask=mask)
            tl.store(k_slots + HALF, k_second.to(dtype), mask=mask)
            tl.store(v_slots, va, mask=mask)
            tl.store(v_slots + HALF, vb, mask=mask)


def launch_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantises when the cache holds 8-bit numbers; kv_scales are theirs."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, group, half = k.shape[1], num_q_heads // k.shape[1], head_dim // 2
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads = num_kv_heads if num_tokens >= _MANY_TOKENS else math.gcd(num_kv_heads, max(1, _FEW_HEADS // group))
    scales = cos_sin if kv_scales is None else kv_scales
    _rope_kernel[(num_tokens, num_kv_heads // heads)](
        out, q, k, v, cos_sin, positions, kv_cache, slot_mapping, scales,
        q.stride(0), k.stride(0), v.stride(0), kv_cache.stride(0), scales.stride(0),
        HEADS=heads, GROUP=group, HALF=half, BLOCK_SIZE=kv_cache.shape[3], BLOCK_H=next_power_of_2(heads),
        BLOCK_Q=next_power_of_2(heads * group), BLOCK_HALF=next_power_of_2(half),
        FIXED_SCALES=kv_cache.dtype == FP8, SLOT_SCALES=kv_cache.dtype == INT8,
        num_warps=min(8, next_power_of_2(cdiv(heads * group * half, 512))),
    )  # fmt: skip
    return out


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    return launch_rope(q, k, v, cos_sin, positions, kv_cache, slot_mapping)


def rotate_float64(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """In float64: the plain definition."""
    cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, dim=-1)
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    write_rows(rotate_float64(k, cos_sin, positions).to(k.dtype), v, kv_cache, slot_mapping)
    return rotate_float64(q, cos_sin, positions).to(q.dtype)


def write_rows(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """One token after the other."""
    block_size = kv_cache.shape[3]
    for slot, k_row, v_row in zip(slot_mapping.tolist(), k, v, strict=True):
        if slot >= 0:
            kv_cache[slot // block_size, :, 0, slot % block_size] = k_row
            kv_cache[slot // block_size, :, 1, slot % block_size] = v_row


def rotate_together(
    q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """q's heads and k's, turned together in fp32: at small sizes the number of torch calls is the cost."""
    num_tokens, num_q_heads, head_dim = q.shape
    half = head_dim // 2
    a, b = torch.cat((q, k), dim=1).view(num_tokens, num_q_heads + k.shape[1], 2, half).unbind(2)
    cos, sin = cos_sin.index_select(0, positions).view(num_tokens, 1, 2, half).unbind(2)  # fp32, whatever q is
    return torch.cat(((a * cos).sub_(b * sin), (b * cos).add_(a * sin)), dim=-1), num_q_heads


def cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    rotated, num_q_heads = rotate_together(q, k, cos_sin, positions)
    rotated = rotated.to(q.dtype)
    write_kv(rotated[:, num_q_heads:], v, kv_cache, slot_mapping)
    return rotated[:, :num_q_heads]


def write_kv(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """All tokens at once where there are many; the same result as write_rows. While it is exported it takes any number
    of tokens, all of them to be written."""
    block_size = kv_cache.shape[3]
    if torch.compiler.is_exporting():
        _write_all(k, v, kv_cache, slot_mapping)
        return
    if k.shape[0] <= _FEW_TOKENS:
        for i, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                block, offset = kv_cache[slot // block_size], slot % block_size
                block[:, 0, offset] = k[i]
                block[:, 1, offset] = v[i]
        return
    if bool((slot_mapping < 0).any()):
        keep = slot_mapping >= 0
        k, v, slot_mapping = k[keep], v[keep], slot_mapping[keep]
    _write_all(k, v, kv_cache, slot_mapping)


def _write_all(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    halves = torch.arange(2 * num_kv_heads)
    first_rows = (slot_mapping // block_size).unsqueeze(1) * (2 * num_kv_heads) + halves
    rows = first_rows * block_size + (slot_mapping % block_size).unsqueeze(1)
    kv_cache.view(-1, head_dim)[rows] = torch.stack((k, v), dim=2).flatten(1, 2)


def rope_cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    *cache: torch.Tensor,
) -> costs.OpCost:
    num_tokens, num_q_heads, head_dim = q.shape
    return costs.rope_and_write_kv(num_tokens, num_q_heads, k.shape[1], head_dim, q.element_size())


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def rope_case(
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    num_tokens: int,
    block_size: int,
    skipped: Sequence[int] = (),
    fused_qkv: bool = False,
    cache_dtype: torch.dtype | None = None,
    full: bool = False,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, ...]:
        draw = Draw(device, dtype)
        sizes = [heads[0], heads[1], heads[1]]
        if fused_qkv:
            q, k, v = torch.split(draw.normal(num_tokens, sum(sizes), head_dim), sizes, dim=1)
        else:
            q, k, v = (draw.normal(num_tokens, n, head_dim) for n in sizes)
        num_blocks = cdiv(num_tokens, block_size) + 2
        slots = draw.permutation(num_blocks * block_size)[:num_tokens]
        slots[list(skipped)] = -1
        positions = draw.integers(draw.permutation(2 * num_tokens)[:num_tokens], torch.int64)
        cos_sin = draw.normal(2 * num_tokens, head_dim, dtype=torch.float32)
        kv_cache = draw.normal(num_blocks, heads[1], 2, block_size, head_dim, dtype=cache_dtype)
        scales: tuple[torch.Tensor, ...] = ()
        if cache_dtype == FP8:  # wide enough for most; the last head's values overflow
            scales = (draw.normal(heads[1], 2, dtype=FP32).abs_().add_(0.01),)
            scales[0][-1] = 1 / LARGEST[FP8]
        elif cache_dtype == INT8:
            scales = (draw.normal(num_blocks, heads[1], 2, block_size, dtype=FP32),)
        return q, k, v, cos_sin, positions, kv_cache, draw.integers(slots, torch.int64), *scales

    name = f"{DTYPE_NAMES[dtype]} heads{heads[0]}-{heads[1]} dim{head_dim} block{block_size} tokens{num_tokens}"
    target = None
    if full and num_tokens <= 64 and dtype != FP32:
        target = Target(2.5, "us")
    elif full and num_tokens >= 8192 and dtype != FP32:
        target = Target(0.93, "memory")
    sass = ("LDG.E.128", "STG.E.128") if full else ()
    return Case(name + " strided" * fused_qkv + " skipping" * bool(skipped), dtype, build, sass, target)


SMALL = (
    rope_case((4, 2), 64, FP32, 5, 16, fused_qkv=True),
    rope_case((6, 2), 96, BF16, 3, 16, skipped=(1,)),
    rope_case((7, 1), 80, FP16, 4, 64),
    rope_case((4, 2), 32, FP32, 2, 16, skipped=(0,)),
    rope_case((2, 2), 20, FP32, 17, 16, skipped=(0, 16)),
    rope_case((4, 4), 128, BF16, 1, 64, fused_qkv=True),
)
FULL = (
    *(rope_case((32, 8), 128, dtype, 8192, 64, fused_qkv=True, full=True) for dtype in (FP32, FP16, BF16)),
    rope_case((8, 1), 128, BF16, 64, 64, full=True),
    rope_case((32, 32), 96, BF16, 64, 16, full=True),
    rope_case((28, 4), 128, BF16, 256, 64, full=True),
    rope_case((32, 8), 128, BF16, 64, 64, fused_qkv=True, full=True),
    rope_case((64, 8), 128, BF16, 8192, 64, fused_qkv=True, full=True),
)

LIMIT = (
    "Memory at 8,192 tokens; at 64 the launch. A prompt's program takes all heads of a token, so that its angles are"
    " read once and 65,536 one-warp blocks become 8,192; a decode step's takes one KV head's group, to use more SMs."
    " Half-rotation splits a head into two loads of half its width; K's few heads move by 8 bytes a thread."
)
rope_and_write_kv = Op("rope_and_write_kv", reference, launch, cpu, rope_cost, SMALL, FULL, limit=LIMIT)
