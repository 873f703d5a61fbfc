"""Rotary position embedding of q and k, and the write of k and v into the paged cache, in one pass.

Hugging Face's half-rotation layout: dimension i turns together with i + head_dim / 2. A row of cos_sin holds the
cosines, then the sines, in fp32. A token's slot is block * block_size + offset; slot -1 writes nothing. Knows nothing
of how frequencies are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op

_FEW_TOKENS = 2  # CPU: up to here plain writes are faster than indexed ones


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
    stride_q: Value,
    stride_k: Value,
    stride_v: Value,
    stride_block: Value,
    GROUP: constexpr,
    HALF: constexpr,
    BLOCK_SIZE: constexpr,
    BLOCK_G: constexpr,
    BLOCK_HALF: constexpr,
) -> None:
    """One program per token and KV head, with that head's group of query heads."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_q_heads = tl.num_programs(1) * GROUP
    dims = tl.arange(0, BLOCK_HALF)
    in_half = dims < HALF
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + dims
    cos = tl.load(angle_ptr, mask=in_half, other=0.0)
    sin = tl.load(angle_ptr + HALF, mask=in_half, other=0.0)

    row = tl.arange(0, BLOCK_G)
    head = kv_head * GROUP + row
    mask = (row < GROUP)[:, None] & in_half[None, :]
    offsets = head[:, None] * (2 * HALF) + dims[None, :]
    a = tl.load(q_ptr + token * stride_q + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(q_ptr + token * stride_q + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + token * num_q_heads * (2 * HALF) + offsets
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptrs, (a * cos[None, :] - b * sin[None, :]).to(dtype), mask=mask)
    tl.store(out_ptrs + HALF, (b * cos[None, :] + a * sin[None, :]).to(dtype), mask=mask)

    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        k_row = k_ptr + token * stride_k + kv_head * (2 * HALF) + dims
        v_row = v_ptr + token * stride_v + kv_head * (2 * HALF) + dims
        k_slot = kv_ptr + slot // BLOCK_SIZE * stride_block + kv_head * (4 * BLOCK_SIZE * HALF)
        k_slot += slot % BLOCK_SIZE * (2 * HALF) + dims
        v_slot = k_slot + 2 * BLOCK_SIZE * HALF
        ka = tl.load(k_row, mask=in_half, other=0.0).to(tl.float32)
        kb = tl.load(k_row + HALF, mask=in_half, other=0.0).to(tl.float32)
        tl.store(k_slot, (ka * cos - kb * sin).to(dtype), mask=in_half)
        tl.store(k_slot + HALF, (kb * cos + ka * sin).to(dtype), mask=in_half)
        tl.store(v_slot, tl.load(v_row, mask=in_half, other=0.0), mask=in_half)
        tl.store(v_slot + HALF, tl.load(v_row + HALF, mask=in_half, other=0.0), mask=in_half)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, group, half = k.shape[1], num_q_heads // k.shape[1], head_dim // 2
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _rope_kernel[(num_tokens, num_kv_heads)](
        out, q, k, v, cos_sin, positions, kv_cache, slot_mapping,
        q.stride(0), k.stride(0), v.stride(0), kv_cache.stride(0),
        GROUP=group, HALF=half, BLOCK_SIZE=kv_cache.shape[3], BLOCK_G=next_power_of_2(group),
        BLOCK_HALF=next_power_of_2(half), num_warps=1 if group * half <= 512 else 4,
    )  # fmt: skip
    return out


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.double().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    block_size = kv_cache.shape[3]
    for slot, k_row, v_row in zip(slot_mapping.tolist(), rotate(k), v, strict=True):
        if slot >= 0:
            kv_cache[slot // block_size, :, 0, slot % block_size] = k_row
            kv_cache[slot // block_size, :, 1, slot % block_size] = v_row
    return rotate(q)


def cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_q_heads, head_dim = q.shape
    half = head_dim // 2
    # q and k turn together: at small sizes the number of torch calls is the cost.
    a, b = torch.cat((q, k), dim=1).view(num_tokens, -1, 2, half).unbind(2)
    cos, sin = cos_sin.index_select(0, positions).view(num_tokens, 1, 2, half).unbind(2)  # fp32, whatever q is
    rotated = torch.cat(((a * cos).sub_(b * sin), (b * cos).add_(a * sin)), dim=-1).to(q.dtype)
    _write_kv(rotated[:, num_q_heads:], v, kv_cache, slot_mapping)
    return rotated[:, :num_q_heads]


def _write_kv(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    block_size = kv_cache.shape[3]
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
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, :, 0, offsets] = k
    kv_cache[blocks, :, 1, offsets] = v


def _cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> costs.OpCost:
    num_tokens, num_q_heads, head_dim = q.shape
    return costs.rope_and_write_kv(num_tokens, num_q_heads, k.shape[1], head_dim, q.element_size())


def _case(
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    num_tokens: int,
    block_size: int,
    skipped: Sequence[int] = (),
    fused_qkv: bool = False,
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
        kv_cache = draw.normal(num_blocks, heads[1], 2, block_size, head_dim)
        return q, k, v, cos_sin, positions, kv_cache, draw.integers(slots, torch.int64)

    name = f"{DTYPE_NAMES[dtype]} heads{heads[0]}-{heads[1]} dim{head_dim} block{block_size} tokens{num_tokens}"
    return Case(name + " strided" * fused_qkv + " skipping" * bool(skipped), dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case((4, 2), 64, FP32, 5, 16, fused_qkv=True),
    _case((6, 2), 96, BF16, 3, 16, skipped=(1,)),
    _case((7, 1), 80, FP16, 4, 64),
    _case((4, 2), 32, FP32, 2, 16, skipped=(0,)),
    _case((2, 2), 20, FP32, 17, 16, skipped=(0, 16)),
    _case((4, 4), 128, BF16, 1, 64, fused_qkv=True),
)
FULL = (
    *(_case((32, 8), 128, dtype, 8192, 64, fused_qkv=True) for dtype in (FP32, FP16, BF16)),
    _case((8, 1), 128, BF16, 64, 64),
    _case((32, 32), 96, BF16, 64, 16),
    _case((28, 4), 128, BF16, 256, 64),
)

LIMIT = "Memory at 8,192 tokens; at 64 the launch. Half-rotation splits a head into two loads of half its width."

rope_and_write_kv = Op("rope_and_write_kv", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
