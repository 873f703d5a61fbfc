"""Moves cached tokens within the caches of all layers: the accepted nodes of a draft tree, to the front of their run.

Nodes of a tree lie in the slots in which they were judged. Those that were accepted, one for each depth, become the
sequence's next tokens and belong in slots by depth. A program moves K or V of one sequence, layer and head, node after
node: source and target slots overlap, and a node is never moved to where a later one of its sequence still lies, if
they come in the order of depth and every node lies behind its parent. Knows nothing of trees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op


@jit
def _move_kernel(
    cache_ptr: Value,  # [layers, blocks, heads, planes, BLOCK_SIZE, WIDTH]
    sources_ptr: Value,  # int64
    targets_ptr: Value,
    starts_ptr: Value,
    stride_layer: Value,
    stride_block: Value,
    BLOCK_SIZE: constexpr,
    WIDTH: constexpr,
    BLOCK_D: constexpr,
) -> None:
    seq, layer, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cache_ptr += layer.to(tl.int64) * stride_layer + plane * (BLOCK_SIZE * WIDTH)
    number = tl.arange(0, BLOCK_D)
    mask = number < WIDTH
    for i in range(tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)):
        source, target = tl.load(sources_ptr + i), tl.load(targets_ptr + i)
        if (source >= 0) & (target >= 0) & (source != target):
            # A number of the row is read and written by one thread for every node: the order of the loop is kept.
            read = cache_ptr + source // BLOCK_SIZE * stride_block + source % BLOCK_SIZE * WIDTH + number
            written = cache_ptr + target // BLOCK_SIZE * stride_block + target % BLOCK_SIZE * WIDTH + number
            tl.store(written, tl.load(read, mask=mask), mask=mask)


def launch(
    kv_cache: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor, start_loc: torch.Tensor
) -> torch.Tensor:
    num_layers, _, num_heads, num_planes, block_size, width = kv_cache.shape
    _move_kernel[(start_loc.shape[0] - 1, num_layers, num_heads * num_planes)](
        kv_cache, source_slots, target_slots, start_loc, kv_cache.stride(0), kv_cache.stride(1),
        BLOCK_SIZE=block_size, WIDTH=width, BLOCK_D=next_power_of_2(width), num_warps=1, num_stages=1,
    )  # fmt: skip
    return kv_cache


def reference(
    kv_cache: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor, start_loc: torch.Tensor
) -> torch.Tensor:
    block_size, before = kv_cache.shape[4], kv_cache.clone()
    for source, target in zip(source_slots.tolist(), target_slots.tolist(), strict=True):
        if source >= 0 and target >= 0:
            row = before[:, source // block_size, :, :, source % block_size]
            kv_cache[:, target // block_size, :, :, target % block_size] = row
    return kv_cache


def cpu(
    kv_cache: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor, start_loc: torch.Tensor
) -> torch.Tensor:
    is_moved = (source_slots >= 0) & (target_slots >= 0) & (source_slots != target_slots)
    if bool(is_moved.any()):
        block_size = kv_cache.shape[4]
        source, target = source_slots[is_moved], target_slots[is_moved]
        by_slot = kv_cache.permute(1, 4, 0, 2, 3, 5)
        by_slot[target // block_size, target % block_size] = by_slot[source // block_size, source % block_size]
    return kv_cache


def _cost(
    kv_cache: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor, start_loc: torch.Tensor
) -> costs.OpCost:
    num_layers, _, num_heads, num_planes, _, width = kv_cache.shape
    return costs.copy(source_slots.shape[0] * num_layers * num_heads * num_planes * width * kv_cache.element_size())


def _case(
    layers: int, heads: int, planes: int, width: int, block_size: int, runs: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    """runs: of each sequence the nodes and the accepted ones; a run begins three slots before a block's end."""

    def build(device: str) -> tuple[torch.Tensor, ...]:
        draw = Draw(device, dtype)
        blocks_each = cdiv(max(n for n, _ in runs) + block_size, block_size)
        num_blocks = blocks_each * len(runs)
        blocks = draw.permutation(num_blocks).view(len(runs), blocks_each)
        sources, targets, starts = [torch.tensor([], dtype=torch.int64)], [torch.tensor([], dtype=torch.int64)], [0]
        for table, (num_nodes, num_accepted) in zip(blocks, runs, strict=True):
            slots = torch.arange(num_nodes) + block_size - 3
            slots = table[slots // block_size] * block_size + slots % block_size
            path = draw.permutation(num_nodes)[:num_accepted].sort().values
            sources.append(slots[path])
            targets.append(slots[: len(path)])
            starts.append(starts[-1] + len(path))
        source_slots, target_slots = torch.cat(sources), torch.cat(targets)
        source_slots[-1] = -1  # padding
        kv_cache = draw.normal(layers, num_blocks, heads, planes, block_size, width)
        return (
            kv_cache, draw.integers(source_slots, torch.int64), draw.integers(target_slots, torch.int64),
            draw.integers(starts),
        )  # fmt: skip

    nodes = ",".join(f"{n}of{num_nodes}" for num_nodes, n in runs[:4]) + f"x{len(runs)}"
    form = f"layers{layers} heads{heads} planes{planes} dim{width} block{block_size}"
    return Case(f"{DTYPE_NAMES[dtype]} {form} nodes{nodes}", dtype, build)


FP32, FP16, BF16, FP8, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8
_EXACT = dict.fromkeys((FP32, FP16, BF16, FP8, INT8), 0.0)

SMALL = (
    _case(3, 2, 2, 64, 16, ((8, 3), (64, 20), (5, 0), (12, 12)), BF16),
    _case(2, 1, 2, 80, 64, ((64, 40),), FP32),
    _case(2, 2, 2, 96, 16, ((30, 9), (30, 9)), FP16),
    _case(2, 2, 2, 64, 16, ((16, 5),), FP8),
    _case(2, 2, 2, 32, 16, ((16, 5),), INT8),
    _case(2, 2, 2, 1, 16, ((16, 5), (9, 4)), FP32),  # the scales of an int8 cache
    _case(2, 1, 1, 576, 16, ((16, 5),), BF16),  # latents
)
FULL = (
    _case(32, 8, 2, 128, 64, ((64, 6),) * 8, BF16),  # Llama-3.1-8B
    _case(32, 8, 2, 128, 16, ((8, 3),) * 32, FP16),
    _case(80, 1, 2, 128, 64, ((64, 6),) * 8, FP8),
    _case(16, 4, 2, 64, 64, ((16, 4),), FP32),
    _case(32, 8, 2, 128, 64, ((64, 6),) * 8, INT8),
)
LIMIT = (
    "Latency: a program's nodes follow each other, a read and a write each, at most as deep as a tree; all layers in "
    "one launch. Compiled on paper only; not run on a GPU."
)

compact_kv = Op("compact_kv", reference, launch, cpu, _cost, SMALL, FULL, _EXACT, LIMIT)
