"""Attention of trees of draft tokens over a paged cache that already holds the nodes' own keys and values.

The last n tokens of a sequence's L are a run of nodes, at most 64. Node i lies in slot L - n + i, wherever it is in the
tree; its position, by which it was rotated, is L - n plus its depth. It sees all that lies before the run, and of the
run the nodes whose bits are set in its word: its ancestors and itself. A branch thus never sees its siblings. A window
counts positions; it must hold a whole run, so that only what lies before the run can fall out of it.

Tiles are those of prefill attention. Tiles of keys before the run take the unmasked path, the last one or two test a
bit for each pair. There is no batch-invariant mode: a node lies in another slot than the token that it becomes, so its
sums have another order, and its bits may differ from those that it has alone. Knows nothing of tokens, and nothing of
which node is right; the engine does not call it yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costs import ops as costs
from kernels.attention.cases import PLAIN, Options
from kernels.attention.paged import (
    Softmax,
    define,
    gather_blocks,
    gather_sequence,
    is_per_head,
    kv_token_bytes,
    seen_bias,
    softmax_attention,
)
from kernels.attention.prefill import tile_shape
from kernels.attention.tile import attend, score_factors
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op

MAX_NODES = 64  # the bits of a word


@jit
def _count_bits(words: Value) -> Value:
    """int32: how many bits of each int64 are set, in the manner of Hacker's Delight 5-1."""
    low, high = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    total = tl.zeros(words.shape, tl.int32)
    for half in tl.static_range(2):
        x = low if half == 0 else high
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        total += ((x + (x >> 16)) & 0x3F).to(tl.int32)
    return total


@jit
def _tree_kernel(
    out_ptr: Value,  # [tokens, q_heads, HEAD_DIM]
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
    query_start_ptr: Value,
    seq_lens_ptr: Value,
    ancestors_ptr: Value,  # [tokens] int64
    sinks_ptr: Value,  # [q_heads] fp32, or None
    head_scales_ptr: Value,  # [kv_heads, 2] fp32, or None
    slot_scales_ptr: Value,  # [blocks, kv_heads, 2, BLOCK_SIZE] fp32, or None
    score_scale: Value,
    cap: Value,
    window: Value,
    stride_q: Value,
    stride_block: Value,
    stride_table: Value,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_SIZE: constexpr,
    WINDOWED: constexpr,
    CAPPED: constexpr,
    BLOCK_Q: constexpr,  # nodes of a tile; its rows are (node, head of the group)
    BLOCK_M: constexpr,  # BLOCK_Q * GROUP rounded up to a power of two
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
) -> None:
    tile, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_start_ptr + seq)
    num_nodes = tl.load(query_start_ptr + seq + 1) - first_query
    length = tl.load(seq_lens_ptr + seq)
    first_in_tile = tile * BLOCK_Q
    if first_in_tile >= num_nodes:
        return
    first_node = length - num_nodes

    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    node = row // GROUP  # within the tile
    head = kv_head * GROUP + row % GROUP
    is_query = (node < BLOCK_Q) & (first_in_tile + node < num_nodes)
    tile_mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    q_token = (first_query + first_in_tile + node).to(tl.int64)
    q = tl.load(q_ptr + (q_token * stride_q + head * HEAD_DIM)[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    words = tl.load(ancestors_ptr + q_token, mask=is_query, other=1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # as if a key of that score and no value had been seen
        peak = tl.load(sinks_ptr + head) * 1.4426950408889634  # in units of log2
        total += 1.0
    head_ptr = kv_ptr + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    if slot_scales_ptr is not None:
        slot_scales_ptr += kv_head * (2 * BLOCK_SIZE)
    v_scale = 1.0
    if head_scales_ptr is not None:
        score_scale *= tl.load(head_scales_ptr + 2 * kv_head)
        v_scale = tl.load(head_scales_ptr + 2 * kv_head + 1)
    row_ptr = table_ptr + seq.to(tl.int64) * stride_table

    first_key = first_node + 1 - window  # of a node of depth 0
    begin = first_node * 0
    seen_by_all = begin
    run = first_node // BLOCK_N * BLOCK_N  # the first tile of keys that has nodes
    position = first_node + tl.zeros([BLOCK_M], tl.int32)
    if WINDOWED:
        position += _count_bits(words) - 1
        begin = tl.maximum(first_key, 0) // BLOCK_N * BLOCK_N
        run = tl.maximum(run, begin)
        deepest = first_node + num_nodes - 1
        seen_by_all = tl.cdiv(tl.maximum(deepest + 1 - window, 0), BLOCK_N) * BLOCK_N
        seen_by_all = tl.minimum(tl.maximum(seen_by_all, begin), run)
        for start in range(begin, seen_by_all, BLOCK_N):
            acc, peak, total = attend(
                q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, first_key, length, position, window,
                score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True, WINDOWED, CAPPED,
            )  # fmt: skip
    for start in range(seen_by_all, run, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, first_key, length, position, window,
            score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, False, WINDOWED, CAPPED,
        )  # fmt: skip
    for start in range(run, length, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, first_key, length, position, window,
            score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True, WINDOWED, CAPPED,
            words, first_node,
        )  # fmt: skip

    num_q_heads = tl.num_programs(1) * GROUP
    out_ptrs = out_ptr + ((q_token * num_q_heads + head) * HEAD_DIM)[:, None] + dims[None, :]
    out = acc / total[:, None] * v_scale
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=tile_mask)


def _check(max_query_len: int, window: int) -> None:
    if max_query_len > MAX_NODES:
        raise ValueError(f"max_query_len: {max_query_len} nodes in a run, of at most {MAX_NODES}")
    if 0 < window < MAX_NODES:
        raise ValueError(f"window: {window} positions do not hold a run of {MAX_NODES} nodes")


def launch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(max_query_len, window)
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    most_rows, block_n = tile_shape(block_d, q.element_size())
    block_m = max(16, next_power_of_2(group), min(most_rows, next_power_of_2(max_query_len * group)))
    block_q = block_m // group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    head_scales, slot_scales = (kv_scales, None) if kv_scales is None or is_per_head(kv_scales) else (None, kv_scales)
    score_scale, cap = score_factors(scale, soft_cap)
    _tree_kernel[(cdiv(max_query_len, block_q), num_kv_heads, seq_lens.shape[0])](
        out, q, kv_cache, block_table, query_start_loc, seq_lens, ancestors, sinks, head_scales, slot_scales,
        score_scale, cap, window, q.stride(0), kv_cache.stride(0), block_table.stride(0),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, WINDOWED=window > 0, CAPPED=soft_cap > 0,
        BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_N=block_n,
        num_warps=8 if block_m >= 128 or q.element_size() == 4 else 4, num_stages=2,
    )  # fmt: skip
    return out


def seen_by_nodes(words: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """bool [nodes, length]: what each node of a run at a sequence's end sees of it. words: int64 [nodes]."""
    first = length - len(words)
    nodes = (words[:, None] >> torch.arange(len(words), device=words.device) & 1).bool()
    positions = first - 1 + nodes.sum(1)
    before = torch.arange(first, device=words.device).expand(len(words), first)
    is_before_seen = before > positions[:, None] - window if window else before >= 0
    return torch.cat((is_before_seen, nodes), dim=1)


def reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(max_query_len, window)
    softmax = Softmax(scale, window, sinks, soft_cap)
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        first_key = softmax.first_key(length - (starts[i + 1] - starts[i]))
        seen = seen_by_nodes(ancestors[rows], length, window)[:, first_key:]
        kv = gather_sequence(kv_cache, block_table[i], length, kv_scales, first_key)
        out[rows] = define(q[rows], kv, softmax, seen)
    return out


def cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence at a time, as prefill attention."""
    _check(max_query_len, window)
    softmax = Softmax(scale, window, sinks, soft_cap)
    starts: list[int] = query_start_loc.tolist()
    num_kv_heads, block_size, head_dim = kv_cache.shape[1], kv_cache.shape[3], kv_cache.shape[4]
    out = torch.empty(q.shape, dtype=q.dtype)
    for i, length in enumerate(seq_lens.tolist()):
        nodes = slice(starts[i], starts[i + 1])
        num_nodes = starts[i + 1] - starts[i]
        if num_nodes == 0:
            continue
        first_key = softmax.first_key(length - num_nodes)
        first_block = first_key // block_size
        table = block_table[i : i + 1, first_block : cdiv(length, block_size)]
        kv = gather_blocks(kv_cache, table, kv_scales, q.dtype)[0]
        kv = kv[:, :, first_key - first_block * block_size : length - first_block * block_size]
        rows = q[nodes].view(num_nodes, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        k, v = (kv[:, j : j + 1].expand(-1, rows.shape[1], -1, -1) for j in range(2))
        bias = seen_bias(seen_by_nodes(ancestors[nodes], length, window)[:, first_key:], q.dtype)
        attended = softmax_attention(rows, k, v, bias, softmax, (num_kv_heads, -1, 1, 1))
        out[nodes] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _cost(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
) -> costs.OpCost:
    _, num_q_heads, head_dim = q.shape
    depths = [(word & (1 << MAX_NODES) - 1).bit_count() - 1 for word in ancestors.tolist()]
    return costs.tree_attention(
        query_start_loc.diff().tolist(), seq_lens.tolist(), depths, num_q_heads, kv_cache.shape[1], head_dim,
        q.element_size(), window, kv_token_bytes(kv_cache, kv_scales),
    )  # fmt: skip


_Arguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, int,
    torch.Tensor | None, float, torch.Tensor | None,
]  # fmt: skip


def drawn_words(draw: Draw, query_lens: Sequence[int]) -> torch.Tensor:
    """int64 [tokens]: of each run a random forest; parents come before their children."""
    words: list[int] = []
    for n in query_lens:
        run: list[int] = []
        for i, number in enumerate(draw.permutation(4096)[:n].tolist()):
            parent = number % (i + 1) - 1  # -1: a root
            run.append((run[parent] if parent >= 0 else 0) | 1 << i)
        words += (word - (1 << MAX_NODES) if word >> MAX_NODES - 1 else word for word in run)
    return draw.integers(words, torch.int64)


def _case(shape: PagedShape, dtype: torch.dtype, options: Options = PLAIN) -> Case:
    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        q = options.draw_q(draw, sum(shape.query_lens), shape)
        kv_cache, block_table, seq_lens = draw.paged_cache(shape, options.kv_dtype, options.window)
        starts = draw.integers([sum(shape.query_lens[:i]) for i in range(len(shape.query_lens) + 1)])
        words = drawn_words(draw, shape.query_lens)
        scale = options.sharpness * shape.head_dim**-0.5
        window, sinks, soft_cap, kv_scales, _ = options.draw(draw, shape.num_q_heads, kv_cache)
        return (
            q, kv_cache, block_table, starts, seq_lens, words, max(shape.query_lens), scale,
            window, sinks, soft_cap, kv_scales,
        )  # fmt: skip

    num_rows = max(shape.query_lens) * shape.num_q_heads // shape.num_kv_heads
    sass = ("HGMMA",) if dtype != torch.float32 and num_rows >= 64 else ()
    return Case(shape.name(dtype) + options.name(), dtype, build, sass)


FP32, FP16, BF16, FP8, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8

SMALL = (
    _case(PagedShape((37,), 4, 2, 64, 16, query_lens=(5,)), FP32),
    _case(PagedShape((64,), 4, 2, 32, 16, query_lens=(64,)), FP32),  # nothing before the run; all bits of the words
    _case(PagedShape((200, 9, 1, 70), 4, 2, 64, 16, query_lens=(64, 9, 1, 0)), BF16, Options(fused_qkv=True)),
    _case(PagedShape((150,), 8, 1, 128, 64, query_lens=(17,)), FP16),
    _case(PagedShape((129,), 7, 1, 80, 64, query_lens=(33,)), BF16),
    _case(PagedShape((90,), 20, 1, 64, 128, query_lens=(64,)), FP32),
    _case(PagedShape((120,), 4, 2, 64, 16, query_lens=(50,)), FP16, Options(sharpness=100.0)),
    # a window that just holds a run, that ends within it, longer than the context
    _case(PagedShape((250, 20), 4, 2, 64, 16, query_lens=(64, 20)), FP32, Options(window=64)),
    _case(PagedShape((300,), 4, 2, 64, 64, query_lens=(60,)), BF16, Options(window=90)),
    _case(PagedShape((90,), 4, 1, 32, 16, query_lens=(9,)), FP16, Options(window=200)),
    _case(PagedShape((80, 9), 6, 2, 64, 16, query_lens=(33, 9)), FP32, Options(sinks=True)),
    _case(PagedShape((80, 9), 4, 2, 64, 16, query_lens=(33, 9)), FP32, Options(soft_cap=2.0)),
    _case(PagedShape((180,), 8, 2, 64, 16, query_lens=(50,)), BF16, Options(window=70, sinks=True, soft_cap=5.0)),
    _case(PagedShape((100, 30), 4, 2, 64, 16, query_lens=(40, 30)), BF16, Options(kv_dtype=FP8)),
    _case(PagedShape((130, 9), 4, 2, 64, 16, query_lens=(40, 9)), FP16, Options(kv_dtype=INT8, window=64)),
)
FULL = (
    *(_case(PagedShape((8192,) * 8, 32, 8, 128, 64, query_lens=(64,) * 8), dtype) for dtype in (FP32, FP16, BF16)),
    _case(PagedShape((2048,) * 32, 32, 8, 128, 16, query_lens=(8,) * 32), BF16, Options(fused_qkv=True)),
    _case(PagedShape((4096,), 28, 4, 128, 64, query_lens=(16,)), BF16),
    _case(PagedShape((4096,) * 4, 16, 8, 256, 64, query_lens=(32,) * 4), BF16),
    _case(PagedShape((8192,) * 4, 64, 8, 64, 64, query_lens=(64,) * 4), BF16, Options(window=128, sinks=True)),
    _case(PagedShape((8192,) * 4, 32, 16, 128, 64, query_lens=(64,) * 4), BF16, Options(window=4096, soft_cap=50.0)),
    _case(PagedShape((8192,) * 4, 32, 8, 128, 64, query_lens=(64,) * 4), BF16, Options(kv_dtype=FP8)),
    _case(PagedShape((8192,) * 4, 32, 8, 128, 64, query_lens=(64,) * 4), BF16, Options(kv_dtype=INT8)),
)

LIMIT = (
    "Memory: the keys before the run, read once for each tile of 128 rows; as in short chunks of prefill, one program "
    "walks a sequence's keys, so few sequences leave SMs idle. Compiled on paper only; not run on a GPU."
)

tree_attention = Op("tree_attention", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
