"""Packs the blocks of a layer's cache that became full in this pass: see kernels.kv.packed_blocks for what is written.

A block is full when the token of its last slot is written. The kernel has a program for each token of the pass and KV
head, and all but those of such tokens end at once: nothing is decided on the host, and the launch can be captured in a
CUDA graph. Knows nothing of attention.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from costs.packed_kv import PackedBits, channel_group
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.kv.copy_blocks import full_block_slots
from kernels.kv.packed_blocks import ChannelScales, Packed, pack_blocks
from kernels.op import Case, Op


@jit
def _pack_kernel(
    kv_ptr: Value,  # [blocks, kv_heads, 2, BLOCK_SIZE, HEAD_DIM]
    codes_ptr: Value,
    scales_ptr: Value,
    slots_ptr: Value,
    target_slots_ptr: Value,
    channels_ptr: Value,  # fp32 [kv_heads, 2, scale | shift, HEAD_DIM], or None
    HALF: constexpr,  # 0: keys, 1: values
    HEAD_DIM: constexpr,
    BLOCK_SIZE: constexpr,
    BITS: constexpr,
    CHANNELS: constexpr,  # that share a scale per token; 0: scales are per channel of the block
    BLOCK_D: constexpr,
) -> None:
    token, kv_head, num_kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, target = tl.load(slots_ptr + token), tl.load(target_slots_ptr + token)
    if (slot < 0) | (target < 0) | (slot % BLOCK_SIZE != BLOCK_SIZE - 1):
        return
    PER_BYTE: constexpr = 8 // BITS
    LEVELS: constexpr = (1 << BITS) - 1
    GROUPS: constexpr = HEAD_DIM // CHANNELS if CHANNELS else 1
    WIDTH: constexpr = CHANNELS if CHANNELS else HEAD_DIM
    slots = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, BLOCK_D)
    in_group = dims < WIDTH
    source = (slot // BLOCK_SIZE) * num_kv_heads + kv_head
    target = (target // BLOCK_SIZE) * num_kv_heads + kv_head
    kv_ptr += (source * 2 + HALF) * (BLOCK_SIZE * HEAD_DIM)
    codes_ptr += target * (BLOCK_SIZE * HEAD_DIM // PER_BYTE)
    NUM_SCALES: constexpr = BLOCK_SIZE * GROUPS if CHANNELS else HEAD_DIM
    scales_ptr += target * (2 * NUM_SCALES)
    for group in tl.static_range(GROUPS):
        column = group * WIDTH + dims
        x = tl.load(kv_ptr + slots[:, None] * HEAD_DIM + column[None, :], mask=in_group[None, :], other=0.0)
        x = x.to(tl.float32)
        if channels_ptr is not None:
            of_channels = channels_ptr + (kv_head * 2 + HALF) * (2 * HEAD_DIM) + column
            spread = tl.load(of_channels, mask=in_group, other=1.0)
            shift = tl.load(of_channels + HEAD_DIM, mask=in_group, other=0.0)
            x = tl.div_rn(x - shift[None, :], tl.broadcast_to(spread[None, :], (BLOCK_SIZE, BLOCK_D)))
        if CHANNELS:
            low = tl.min(tl.where(in_group[None, :], x, float("inf")), 1)
            high = tl.max(tl.where(in_group[None, :], x, float("-inf")), 1)
            at, is_scale = slots * GROUPS + group, slots >= 0
        else:
            low, high = tl.min(x, 0), tl.max(x, 0)
            at, is_scale = dims, in_group
        scale = tl.minimum(tl.maximum((high - low) * (1.0 / LEVELS), 5.9604644775390625e-08), 65504.0).to(tl.float16)
        low = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
        tl.store(scales_ptr + at, scale, mask=is_scale)
        tl.store(scales_ptr + NUM_SCALES + at, low, mask=is_scale)
        step, base = scale.to(tl.float32), low.to(tl.float32)
        if CHANNELS:
            code = tl.div_rn(x - base[:, None], tl.broadcast_to(step[:, None], (BLOCK_SIZE, BLOCK_D)))
        else:
            code = tl.div_rn(x - base[None, :], tl.broadcast_to(step[None, :], (BLOCK_SIZE, BLOCK_D)))
        code = tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0)
        # Adding 1.5 * 2**23 leaves no bits for a fraction: the sum is rounded to nearest even, and its low bits are x.
        rounded = (code + 12582912.0).to(tl.int32, bitcast=True) & LEVELS
        shifted = rounded << (dims % PER_BYTE * BITS)[None, :]
        packed = tl.sum(tl.reshape(shifted, (BLOCK_SIZE, BLOCK_D // PER_BYTE, PER_BYTE)), 2)
        byte = tl.arange(0, BLOCK_D // PER_BYTE)
        code_ptrs = codes_ptr + slots[:, None] * (HEAD_DIM // PER_BYTE) + (group * WIDTH // PER_BYTE + byte)[None, :]
        tl.store(code_ptrs, packed.to(tl.uint8), mask=(byte * PER_BYTE < WIDTH)[None, :])


def launch(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    target_slots: torch.Tensor,
    packed: Packed,
    bits: PackedBits,
    channels: ChannelScales | None = None,
) -> Packed:
    if min(bits.keys, bits.values) < 2:
        raise ValueError("one bit is packed on CPUs only")
    _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    group = channel_group(head_dim)
    by_half = (packed[0], packed[1], bits.keys, group if bits.has_token_keys else 0), (
        packed[2], packed[3], bits.values, group,
    )  # fmt: skip
    for half, (codes, scales, num_bits, shared) in enumerate(by_half):
        _pack_kernel[(slots.shape[0], num_kv_heads)](
            kv_cache, codes, scales, slots, target_slots, channels,
            HALF=half, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, BITS=num_bits, CHANNELS=shared,
            BLOCK_D=next_power_of_2(shared or head_dim), num_warps=4,
        )  # fmt: skip
    return packed


def reference(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    target_slots: torch.Tensor,
    packed: Packed,
    bits: PackedBits,
    channels: ChannelScales | None = None,
) -> Packed:
    block_size = kv_cache.shape[3]
    for slot, target in zip(slots.tolist(), target_slots.tolist(), strict=True):
        if slot >= 0 and target >= 0 and slot % block_size == block_size - 1:
            block = kv_cache[slot // block_size : slot // block_size + 1]
            for part, rows in zip(packed, pack_blocks(block, bits, channels), strict=True):
                part[target // block_size] = rows[0]
    return packed


def cpu(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    target_slots: torch.Tensor,
    packed: Packed,
    bits: PackedBits,
    channels: ChannelScales | None = None,
) -> Packed:
    block_size = kv_cache.shape[3]
    ends = (slots >= 0) & (target_slots >= 0) & (slots % block_size == block_size - 1)
    if bool(ends.any()):
        blocks, targets = slots[ends] // block_size, target_slots[ends] // block_size
        for part, rows in zip(packed, pack_blocks(kv_cache[blocks], bits, channels), strict=True):
            part[targets] = rows
    return packed


def _cost(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    target_slots: torch.Tensor,
    packed: Packed,
    bits: PackedBits,
    channels: ChannelScales | None = None,
) -> costs.OpCost:
    """Of the blocks that are full on average; reading and writing."""
    num_blocks = cdiv(slots.shape[0], kv_cache.shape[3])
    num_bytes = sum(part[0].numel() * part.element_size() for part in (kv_cache, *packed))
    return costs.OpCost(num_blocks * num_bytes, 0)


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Packed, PackedBits, ChannelScales | None]


def _case(heads: int, head_dim: int, block_size: int, num_tokens: int, dtype: torch.dtype, bits: PackedBits) -> Case:
    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        num_blocks = cdiv(num_tokens, block_size) + 2
        kv_cache = draw.normal(num_blocks, heads, 2, block_size, head_dim)
        slots, target_slots = full_block_slots(draw, num_tokens, num_blocks, block_size)
        packed = pack_blocks(draw.normal(num_blocks + 1, heads, 2, block_size, head_dim), bits)
        channels = draw.channel_scales(heads, head_dim) if bits.has_channel_scales else None
        return kv_cache, slots, target_slots, packed, bits, channels

    name = f"{DTYPE_NAMES[dtype]} {bits.label} heads{heads} dim{head_dim} block{block_size} tokens{num_tokens}"
    return Case(name, dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = (
    _case(2, 64, 16, 70, FP32, PackedBits(2, 2)),
    _case(1, 96, 32, 100, BF16, PackedBits(4, 4)),
    _case(3, 64, 32, 120, FP16, PackedBits(8, 8)),
    _case(2, 80, 16, 40, FP32, PackedBits(4, 2)),
    _case(2, 32, 16, 40, BF16, PackedBits(4, 4, has_token_keys=True)),
    _case(1, 24, 16, 60, FP32, PackedBits(2, 2, has_token_keys=True)),
    _case(2, 64, 16, 50, FP32, PackedBits(4, 4, has_token_keys=True, has_channel_scales=True)),
    _case(1, 80, 16, 40, BF16, PackedBits(4, 4, has_token_keys=True, has_channel_scales=True)),
)
FULL = (
    _case(8, 128, 64, 8192, BF16, PackedBits(2, 2)),
    _case(8, 128, 32, 64, BF16, PackedBits(4, 4)),
    _case(3, 64, 32, 256, FP32, PackedBits(8, 8)),
    _case(8, 128, 64, 256, FP16, PackedBits(4, 4, has_token_keys=True)),
    _case(8, 128, 64, 256, BF16, PackedBits(4, 4, has_token_keys=True, has_channel_scales=True)),
)

LIMIT = (
    "The launch, in a decode step: one token in block_size ends a block. A program holds a block of one head and half;"
    " bytes are put together by a sum over the channels that share one."
)
pack_full_blocks = Op("pack_full_blocks", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
