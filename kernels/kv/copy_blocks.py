"""Copies the blocks of a layer's cache that became full in this pass to another cache of the same form.

As kernels.kv.pack_kv, and for the same reason: a program for each token and KV head, of which all but those that end a
block end at once. Knows nothing of what the copy is for.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op

_NUMBERS_AT_ONCE = 2048


@jit
def _copy_kernel(
    out_ptr: Value,  # [blocks, kv_heads, BLOCK_NUMBERS]
    kv_ptr: Value,
    slots_ptr: Value,
    target_slots_ptr: Value,
    BLOCK_SIZE: constexpr,
    BLOCK_NUMBERS: constexpr,  # of a block and head
    NUMBERS: constexpr,
) -> None:
    token, kv_head, num_kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, target = tl.load(slots_ptr + token), tl.load(target_slots_ptr + token)
    if (slot < 0) | (target < 0) | (slot % BLOCK_SIZE != BLOCK_SIZE - 1):
        return
    kv_ptr += (slot // BLOCK_SIZE * num_kv_heads + kv_head) * BLOCK_NUMBERS
    out_ptr += (target // BLOCK_SIZE * num_kv_heads + kv_head) * BLOCK_NUMBERS
    for start in tl.static_range(0, BLOCK_NUMBERS, NUMBERS):
        number = start + tl.arange(0, NUMBERS)
        mask = number < BLOCK_NUMBERS
        tl.store(out_ptr + number, tl.load(kv_ptr + number, mask=mask), mask=mask)


def launch(kv_cache: torch.Tensor, slots: torch.Tensor, target_slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    numbers = 2 * block_size * head_dim
    _copy_kernel[(slots.shape[0], num_kv_heads)](
        out, kv_cache, slots, target_slots, BLOCK_SIZE=block_size, BLOCK_NUMBERS=numbers,
        NUMBERS=min(_NUMBERS_AT_ONCE, next_power_of_2(numbers)), num_warps=4,
    )  # fmt: skip
    return out


def reference(
    kv_cache: torch.Tensor, slots: torch.Tensor, target_slots: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    block_size = kv_cache.shape[3]
    for slot, target in zip(slots.tolist(), target_slots.tolist(), strict=True):
        if slot >= 0 and target >= 0 and slot % block_size == block_size - 1:
            out[target // block_size] = kv_cache[slot // block_size]
    return out


def cpu(kv_cache: torch.Tensor, slots: torch.Tensor, target_slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    block_size = kv_cache.shape[3]
    ends = (slots >= 0) & (target_slots >= 0) & (slots % block_size == block_size - 1)
    if bool(ends.any()):
        out[target_slots[ends] // block_size] = kv_cache[slots[ends] // block_size]
    return out


def _cost(kv_cache: torch.Tensor, slots: torch.Tensor, target_slots: torch.Tensor, out: torch.Tensor) -> costs.OpCost:
    """Of the blocks that are full on average."""
    return costs.copy(cdiv(slots.shape[0], kv_cache.shape[3]) * kv_cache[0].numel() * kv_cache.element_size())


def full_block_slots(draw: Draw, num_tokens: int, num_blocks: int, block_size: int) -> list[torch.Tensor]:
    """Of cases: where a pass's tokens lie in two caches; a third of them were there before."""
    positions = torch.arange(num_tokens) + 3
    blocks = (draw.permutation(num_blocks), draw.permutation(num_blocks + 1))
    slots = [each[positions // block_size] * block_size + positions % block_size for each in blocks]
    slots[0][: num_tokens // 3] = -1
    return [draw.integers(each, torch.int64) for each in slots]


def _case(heads: int, head_dim: int, block_size: int, num_tokens: int, dtype: torch.dtype) -> Case:
    def build(device: str) -> tuple[torch.Tensor, ...]:
        draw = Draw(device, dtype)
        num_blocks = cdiv(num_tokens, block_size) + 2
        kv_cache = draw.normal(num_blocks, heads, 2, block_size, head_dim)
        slots, target_slots = full_block_slots(draw, num_tokens, num_blocks, block_size)
        return kv_cache, slots, target_slots, draw.normal(num_blocks + 1, heads, 2, block_size, head_dim)

    name = f"{DTYPE_NAMES[dtype]} heads{heads} dim{head_dim} block{block_size} tokens{num_tokens}"
    return Case(name, dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = (_case(2, 64, 16, 70, FP32), _case(1, 96, 32, 100, BF16), _case(2, 80, 16, 40, FP16))
FULL = (_case(8, 128, 64, 8192, BF16), _case(8, 128, 64, 64, FP16), _case(3, 64, 32, 256, FP32))
_EXACT = dict.fromkeys((FP32, FP16, BF16), 0.0)
LIMIT = "The launch: of a decode step's tokens one in block_size ends a block."

copy_full_blocks = Op("copy_full_blocks", reference, launch, cpu, _cost, SMALL, FULL, _EXACT, LIMIT)
