"""Moves blocks between the paged cache of all layers and a contiguous buffer for transfer.

The buffer is [block_ids, groups of layers, kv_heads, layers of a group, 2, num_tokens, head_dim]: its last four
dimensions are a fragment as kvstore has it, one block x one group of layers x one KV head, and a block's fragments
follow each other by group, then by head. A fragment holds the first `num_tokens` slots of its block. What is moved is
bytes, 16 at a time: a cache of any dtype arrives as it was. Knows nothing of names, stores or networks.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target

_WORD_BYTES = 8  # int64 is the widest that Triton moves; two neighbours make one access of 16 bytes
_WORDS_AT_ONCE = 2048


@jit
def _copy_kernel(
    cache_ptr: Value,  # int64 [layers, blocks, kv_heads, 2, BLOCK_WORDS]
    buffer_ptr: Value,  # int64 [block_ids, groups of layers, kv_heads, GROUP_LAYERS, 2, RUN_WORDS]
    block_ids_ptr: Value,
    stride_layer: Value,
    stride_block: Value,
    RUN_WORDS: constexpr,  # of the slots that are moved, in K or V of one layer and head
    BLOCK_WORDS: constexpr,  # of all slots
    GROUP_LAYERS: constexpr,
    GATHER: constexpr,
    WORDS: constexpr,
) -> None:
    """A program moves one run: K or V of one block, layer and head."""
    i, group, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half, layer, head = run % 2, group * GROUP_LAYERS + run // 2 % GROUP_LAYERS, run // (2 * GROUP_LAYERS)
    block = tl.load(block_ids_ptr + i).to(tl.int64)
    cache_ptr += layer.to(tl.int64) * stride_layer + block * stride_block + (head * 2 + half) * BLOCK_WORDS
    buffer_ptr += ((i * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(2) + run) * RUN_WORDS
    for start in tl.static_range(0, RUN_WORDS, WORDS):
        word = start + tl.arange(0, WORDS)
        mask = word < RUN_WORDS
        # Runs and strides are even numbers of words, which the compiler cannot see: pairs stay together.
        in_cache = tl.multiple_of(cache_ptr + word, (16,))
        in_buffer = tl.multiple_of(buffer_ptr + word, (16,))
        if GATHER:
            tl.store(in_buffer, tl.load(in_cache, mask=mask), mask=mask)
        else:
            tl.store(in_cache, tl.load(in_buffer, mask=mask), mask=mask)


def _launch(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, buffer: torch.Tensor, layers_per_fragment: int, gather: bool
) -> None:
    num_layers, _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    token_words = head_dim * kv_cache.element_size() // _WORD_BYTES
    run_words = buffer.shape[-2] * token_words
    stride_layer, stride_block = (n * kv_cache.element_size() // _WORD_BYTES for n in kv_cache.stride()[:2])
    grid = (len(block_ids), num_layers // layers_per_fragment, num_kv_heads * layers_per_fragment * 2)
    _copy_kernel[grid](
        kv_cache.view(torch.int64), buffer.view(torch.int64), block_ids, stride_layer, stride_block,
        RUN_WORDS=run_words, BLOCK_WORDS=block_size * token_words, GROUP_LAYERS=layers_per_fragment, GATHER=gather,
        WORDS=min(_WORDS_AT_ONCE, next_power_of_2(run_words)), num_warps=4,
    )  # fmt: skip


def _empty_buffer(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, layers_per_fragment: int, num_tokens: int
) -> torch.Tensor:
    num_layers, _, num_kv_heads, _, _, head_dim = kv_cache.shape
    num_groups = num_layers // layers_per_fragment
    shape = (len(block_ids), num_groups, num_kv_heads, layers_per_fragment, 2, num_tokens, head_dim)
    return torch.empty(shape, dtype=kv_cache.dtype, device=kv_cache.device)


def _moves_words(kv_cache: torch.Tensor) -> bool:
    """Whether there are K and V, in rows of whole pairs of words. What else there is, such as scales, is few bytes, and
    torch moves it."""
    return kv_cache.shape[3] == 2 and kv_cache.shape[5] * kv_cache.element_size() % (2 * _WORD_BYTES) == 0


def gather_launch(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, layers_per_fragment: int, num_tokens: int
) -> torch.Tensor:
    if not _moves_words(kv_cache):
        return gather_cpu(kv_cache, block_ids, layers_per_fragment, num_tokens)
    buffer = _empty_buffer(kv_cache, block_ids, layers_per_fragment, num_tokens)
    _launch(kv_cache, block_ids, buffer, layers_per_fragment, gather=True)
    return buffer


def scatter_launch(buffer: torch.Tensor, block_ids: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
    if not _moves_words(kv_cache):
        return scatter_cpu(buffer, block_ids, kv_cache)
    _launch(kv_cache, block_ids, buffer, buffer.shape[3], gather=False)
    return kv_cache


def gather_reference(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, layers_per_fragment: int, num_tokens: int
) -> torch.Tensor:
    buffer = _empty_buffer(kv_cache, block_ids, layers_per_fragment, num_tokens)
    for i, block in enumerate(block_ids.tolist()):
        for group in range(buffer.shape[1]):
            layers = slice(group * layers_per_fragment, (group + 1) * layers_per_fragment)
            for head in range(buffer.shape[2]):
                buffer[i, group, head] = kv_cache[layers, block, head, :, :num_tokens]
    return buffer


def scatter_reference(buffer: torch.Tensor, block_ids: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
    layers_per_fragment, num_tokens = buffer.shape[3], buffer.shape[5]
    for i, block in enumerate(block_ids.tolist()):
        for group in range(buffer.shape[1]):
            layers = slice(group * layers_per_fragment, (group + 1) * layers_per_fragment)
            for head in range(buffer.shape[2]):
                kv_cache[layers, block, head, :, :num_tokens] = buffer[i, group, head]
    return kv_cache


def gather_cpu(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, layers_per_fragment: int, num_tokens: int
) -> torch.Tensor:
    picked = kv_cache[:, :, :, :, :num_tokens].index_select(1, block_ids)
    grouped = picked.view(len(picked) // layers_per_fragment, layers_per_fragment, *picked.shape[1:])
    return grouped.permute(2, 0, 3, 1, 4, 5, 6).contiguous()


def scatter_cpu(buffer: torch.Tensor, block_ids: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
    num_tokens = buffer.shape[5]
    by_layer = buffer.permute(1, 3, 0, 2, 4, 5, 6).flatten(0, 1)
    kv_cache[:, block_ids.long(), :, :, :num_tokens] = by_layer
    return kv_cache


def _gather_cost(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, layers_per_fragment: int, num_tokens: int
) -> costs.OpCost:
    num_layers, _, num_kv_heads, _, _, head_dim = kv_cache.shape
    fragment_bytes = 2 * num_tokens * head_dim * kv_cache.element_size()
    return costs.copy(len(block_ids) * num_layers * num_kv_heads * fragment_bytes)


def _scatter_cost(buffer: torch.Tensor, block_ids: torch.Tensor, kv_cache: torch.Tensor) -> costs.OpCost:
    return costs.copy(buffer.numel() * buffer.element_size())


def _draw_cache(
    draw: Draw, num_ids: int, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks = 2 * num_ids + 1
    block_ids = draw.integers(draw.permutation(num_blocks)[:num_ids])
    return draw.normal(num_layers, num_blocks, num_kv_heads, 2, block_size, head_dim), block_ids


# blocks, layers, layers of a fragment, kv_heads, block_size, head_dim, tokens
_Shape = tuple[int, int, int, int, int, int, int]


def _name(shape: _Shape, dtype: torch.dtype) -> str:
    num_ids, num_layers, per_fragment, num_kv_heads, block_size, head_dim, num_tokens = shape
    heads = f"heads{num_kv_heads} dim{head_dim} block{block_size}"
    return f"{DTYPE_NAMES[dtype]} {heads} layers{num_layers}by{per_fragment} blocks{num_ids} tokens{num_tokens}"


def _gather_case(shape: _Shape, dtype: torch.dtype, target: Target | None = None) -> Case:
    num_ids, num_layers, per_fragment, num_kv_heads, block_size, head_dim, num_tokens = shape

    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        cache, block_ids = _draw_cache(Draw(device, dtype), num_ids, num_layers, num_kv_heads, block_size, head_dim)
        return cache, block_ids, per_fragment, num_tokens

    return Case(_name(shape, dtype), dtype, build, ("LDG.E.128", "STG.E.128"), target)


def _scatter_case(shape: _Shape, dtype: torch.dtype, target: Target | None = None) -> Case:
    num_ids, num_layers, per_fragment, num_kv_heads, block_size, head_dim, num_tokens = shape

    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = Draw(device, dtype)
        cache, block_ids = _draw_cache(draw, num_ids, num_layers, num_kv_heads, block_size, head_dim)
        num_groups = num_layers // per_fragment
        buffer = draw.normal(num_ids, num_groups, num_kv_heads, per_fragment, 2, num_tokens, head_dim)
        return buffer, block_ids, cache

    return Case(_name(shape, dtype), dtype, build, ("LDG.E.128", "STG.E.128"), target)


FP32, FP16, BF16, FP8, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8

_SMALL: tuple[tuple[_Shape, torch.dtype], ...] = (
    ((2, 4, 2, 1, 16, 64, 16), BF16),
    ((3, 2, 2, 2, 16, 80, 5), FP16),  # a block that is not full
    ((1, 3, 1, 2, 64, 96, 64), FP32),  # more than one stretch of words a run, the last one short
    ((2, 2, 1, 2, 16, 16, 1), FP8),  # 16 bytes a run
    ((3, 1, 1, 3, 16, 48, 7), INT8),
)
_FULL: tuple[tuple[_Shape, torch.dtype, Target | None], ...] = (
    ((128, 32, 8, 8, 64, 128, 64), BF16, Target(0.90, "memory")),  # Llama-3.1-8B, 8,192 tokens
    ((512, 32, 32, 8, 16, 128, 16), BF16, Target(0.90, "memory")),  # the same in small blocks
    ((128, 80, 20, 1, 64, 128, 64), FP8, Target(0.90, "memory")),  # Llama-3.1-70B, one of eight ranks
    ((1, 32, 8, 8, 64, 128, 17), BF16, None),  # the last block of a prompt
    ((64, 48, 12, 4, 64, 128, 64), INT8, None),
    ((64, 16, 4, 8, 64, 64, 64), FP16, None),
    ((64, 16, 4, 8, 64, 128, 64), FP32, None),
)
_EXACT = dict.fromkeys((FP32, FP16, BF16, FP8, INT8), 0.0)

LIMIT = (
    "Memory: each byte is read once and written once, 16 bytes an access, a run of one head's K or V a program; at "
    "least 73 KB per SM in flight, with runs of 4 KB (blocks of 16). 4,096 words at once would only take registers."
)

gather_kv_blocks = Op(
    "gather_kv_blocks", gather_reference, gather_launch, gather_cpu, _gather_cost,
    tuple(_gather_case(*case) for case in _SMALL), tuple(_gather_case(*case) for case in _FULL), _EXACT, LIMIT,
)  # fmt: skip
scatter_kv_blocks = Op(
    "scatter_kv_blocks", scatter_reference, scatter_launch, scatter_cpu, _scatter_cost,
    tuple(_scatter_case(*case) for case in _SMALL), tuple(_scatter_case(*case) for case in _FULL), _EXACT, LIMIT,
)  # fmt: skip
