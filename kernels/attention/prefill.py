"""Prefill attention: chunks of prompts, causal, over a paged cache that already holds the chunk's own keys and values.

Query i of a sequence's n queries and L tokens sits at position L - n + i. A program takes BLOCK_Q query tokens of one
sequence with all query heads of one KV head as the rows of its tile; it walks unmasked over the keys that all its
rows see, and masked over the diagonal and over the edge of the window. Tiles of keys outside the window are never
visited. The grid depends on shapes and on max_query_len only.

Batch-invariant mode: the tile is always the largest and begins at a multiple of its size in the sequence, so that a
token is always the same row of the same tile, and every tile of keys takes the masked path: a token gives the same bits
in any batch and however its prompt is cut into chunks. Knows nothing of schedulers or models.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from kernels.attention.cases import PLAIN, Options, OptionValues
from kernels.attention.paged import (
    Softmax,
    define,
    gather_sequence,
    is_per_head,
    kv_token_bytes,
)
from kernels.attention.prefill_cpu import PrefillPlan, attend_prefills, attend_prefills_in_fixed_order
from kernels.attention.tile import attend, score_factors
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target


@jit
def _prefill_kernel(
    out_ptr: Value,  # [tokens, q_heads, HEAD_DIM]
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
    query_start_ptr: Value,
    seq_lens_ptr: Value,
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
    INVARIANT: constexpr,  # tiles begin at multiples of BLOCK_Q in the sequence; one path for all tiles of keys
    BLOCK_Q: constexpr,  # query tokens of a tile; its rows are (token, head of the group)
    BLOCK_M: constexpr,  # BLOCK_Q * GROUP rounded up to a power of two
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
) -> None:
    # The last tile of a sequence has the most keys: take it first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, seq = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - first_query
    length = tl.load(seq_lens_ptr + seq)
    first_in_tile = tile * BLOCK_Q
    if INVARIANT:
        first_in_tile -= (length - num_queries) % BLOCK_Q
    if first_in_tile >= num_queries:
        return
    first_position = length - num_queries + first_in_tile

    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token = row // GROUP  # within the tile
    head = kv_head * GROUP + row % GROUP
    is_query = (token < BLOCK_Q) & (first_in_tile + token < num_queries) & (first_in_tile + token >= 0)
    tile_mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    q_token = (first_query + first_in_tile + token).to(tl.int64)
    q = tl.load(q_ptr + (q_token * stride_q + head * HEAD_DIM)[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # as if a key of that score and no value had been seen
        peak = tl.load(sinks_ptr + head) * 1.4426950408889634  # in units of log2
        total += 1.0
    last_key = first_position + token
    head_ptr = kv_ptr + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    if slot_scales_ptr is not None:
        slot_scales_ptr += kv_head * (2 * BLOCK_SIZE)
    v_scale = 1.0
    if head_scales_ptr is not None:
        score_scale *= tl.load(head_scales_ptr + 2 * kv_head)
        v_scale = tl.load(head_scales_ptr + 2 * kv_head + 1)
    row_ptr = table_ptr + seq.to(tl.int64) * stride_table

    first_key = first_position + tl.maximum(-first_in_tile, 0) + 1 - window
    end = tl.minimum(first_position + BLOCK_Q, length)
    begin = first_position * 0
    seen_by_all = begin  # from here on no row's window has to be looked at
    if WINDOWED:
        begin = tl.maximum(first_key, 0) // BLOCK_N * BLOCK_N
        seen_by_all = tl.cdiv(tl.maximum(first_position + BLOCK_Q - window, 0), BLOCK_N) * BLOCK_N
    diagonal = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, begin)
    seen_by_all = tl.minimum(seen_by_all, diagonal)
    if INVARIANT:
        seen_by_all = begin
        diagonal = begin
    if WINDOWED:
        for start in range(begin, seen_by_all, BLOCK_N):
            acc, peak, total = attend(
                q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, first_key, end, last_key, window,
                score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True, WINDOWED, CAPPED,
            )  # fmt: skip
    if not INVARIANT:
        for start in range(seen_by_all, diagonal, BLOCK_N):
            acc, peak, total = attend(
                q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, first_key, end, last_key, window,
                score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, False, WINDOWED, CAPPED,
            )  # fmt: skip
    for start in range(diagonal, end, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, first_key, end, last_key, window,
            score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True, WINDOWED, CAPPED,
        )  # fmt: skip

    num_q_heads = tl.num_programs(1) * GROUP
    out_ptrs = out_ptr + ((q_token * num_q_heads + head) * HEAD_DIM)[:, None] + dims[None, :]
    out = acc / total[:, None] * v_scale
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=tile_mask)


def tile_shape(block_d: int, element_size: int) -> tuple[int, int]:
    """(rows, keys) of a tile for which sm_90a needs no spill. fp32 has no tensor cores: its dots live in registers."""
    if element_size == 4:
        return (64 if block_d <= 32 else 32 if block_d <= 64 else 16), 32
    return 128, (64 if block_d <= 128 else 32)


def launch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    most_rows, block_n = tile_shape(block_d, q.element_size())
    rows = most_rows if batch_invariant else min(most_rows, next_power_of_2(max_query_len * group))
    block_m = max(16, next_power_of_2(group), rows)
    block_q = block_m // group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    head_scales, slot_scales = (kv_scales, None) if kv_scales is None or is_per_head(kv_scales) else (None, kv_scales)
    score_scale, cap = score_factors(scale, soft_cap)
    num_tiles = cdiv(max_query_len, block_q) + batch_invariant
    _prefill_kernel[(num_tiles, num_kv_heads, seq_lens.shape[0])](
        out, q, kv_cache, block_table, query_start_loc, seq_lens, sinks, head_scales, slot_scales, score_scale, cap,
        window, q.stride(0), kv_cache.stride(0), block_table.stride(0),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        WINDOWED=window > 0, CAPPED=soft_cap > 0, INVARIANT=batch_invariant,
        BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_N=block_n,
        num_warps=8 if block_m >= 128 or q.element_size() == 4 else 4, num_stages=2,
    )  # fmt: skip
    return out


def reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    softmax = Softmax(scale, window, sinks, soft_cap)
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        first_key = softmax.first_key(length - (starts[i + 1] - starts[i]))
        out[rows] = define(q[rows], gather_sequence(kv_cache, block_table[i], length, kv_scales, first_key), softmax)
    return out


def cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    softmax = Softmax(scale, window, sinks, soft_cap)
    if batch_invariant:
        return attend_prefills_in_fixed_order(q, kv_cache, block_table, query_start_loc, seq_lens, softmax, kv_scales)
    if plan is None:
        plan = PrefillPlan.of(block_table, query_start_loc, seq_lens, kv_cache, q.dtype, window)
    return attend_prefills(q, kv_cache, plan, softmax, kv_scales)


def _cost(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: PrefillPlan | None = None,
) -> costs.OpCost:
    _, num_q_heads, head_dim = q.shape
    return costs.prefill_attention(
        query_start_loc.diff().tolist(), seq_lens.tolist(), num_q_heads, kv_cache.shape[1], head_dim, q.element_size(),
        window, kv_token_bytes(kv_cache, kv_scales),
    )  # fmt: skip


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, *OptionValues]


def _case(shape: PagedShape, dtype: torch.dtype, options: Options = PLAIN, target: Target | None = None) -> Case:
    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        q = options.draw_q(draw, sum(shape.query_lens), shape)
        kv_cache, block_table, seq_lens = draw.paged_cache(shape, options.kv_dtype, options.window)
        starts = [sum(shape.query_lens[:i]) for i in range(len(shape.query_lens) + 1)]
        scale = options.sharpness * shape.head_dim**-0.5
        more = options.draw(draw, shape.num_q_heads, kv_cache)
        return q, kv_cache, block_table, draw.integers(starts), seq_lens, max(shape.query_lens), scale, *more

    num_rows = max(shape.query_lens) * shape.num_q_heads // shape.num_kv_heads
    sass = ("HGMMA",) if dtype != torch.float32 and num_rows >= 64 else ()
    return Case(shape.name(dtype) + options.name(), dtype, build, sass, target)


FP32, FP16, BF16, FP8, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8

SMALL = (
    _case(PagedShape((37,), 4, 2, 64, 16, query_lens=(37,)), FP32),  # a whole prompt
    # chunks and decode rows
    _case(PagedShape((100, 1, 70), 4, 2, 64, 16, query_lens=(40, 1, 1)), BF16, Options(fused_qkv=True)),
    _case(PagedShape((150,), 8, 1, 128, 16, query_lens=(23,)), FP16),
    _case(PagedShape((65, 140), 6, 2, 96, 16, query_lens=(65, 12)), FP32),
    _case(PagedShape((90, 64), 7, 1, 80, 64, query_lens=(30, 64)), BF16),
    _case(PagedShape((129,), 4, 4, 32, 64, query_lens=(129,)), FP16),  # more than one tile of queries
    _case(PagedShape((50,), 20, 1, 64, 128, query_lens=(9,)), FP32),
    _case(PagedShape((40, 17), 2, 2, 16, 16, query_lens=(0, 17)), FP32),  # a sequence that asks nothing in this step
    _case(PagedShape((90,), 4, 2, 64, 16, query_lens=(20,)), FP16, Options(sharpness=100.0)),
    # a window shorter than a tile of keys, as long as one, longer than the context; some rows see nothing of a tile
    _case(PagedShape((200, 20), 4, 2, 64, 16, query_lens=(60, 20)), BF16, Options(window=20)),
    _case(PagedShape((200,), 4, 2, 64, 64, query_lens=(9,)), FP16, Options(window=64)),
    _case(PagedShape((90,), 4, 1, 64, 16, query_lens=(90,)), FP32, Options(window=200)),
    _case(PagedShape((250,), 2, 1, 32, 16, query_lens=(40,)), FP32, Options(window=150)),  # edge, middle and diagonal
    _case(PagedShape((80, 9), 6, 2, 64, 16, query_lens=(33, 9)), FP32, Options(sinks=True)),
    _case(PagedShape((80,), 4, 1, 64, 16, query_lens=(80,)), FP16, Options(sinks=True, sharpness=100.0)),
    _case(PagedShape((80, 9), 4, 2, 64, 16, query_lens=(33, 9)), FP32, Options(soft_cap=2.0)),
    _case(PagedShape((180,), 8, 2, 64, 16, query_lens=(50,)), BF16, Options(window=90, sinks=True, soft_cap=5.0)),
    _case(PagedShape((150, 3), 4, 2, 64, 16, query_lens=(70, 3)), FP32, Options(batch_invariant=True)),
    _case(PagedShape((150,), 4, 2, 64, 16, query_lens=(40,)), BF16,
          Options(window=50, sinks=True, batch_invariant=True)),
    _case(PagedShape((100, 30), 4, 2, 64, 16, query_lens=(40, 30)), BF16, Options(kv_dtype=FP8, fused_qkv=True)),
    _case(PagedShape((100,), 6, 2, 96, 64, query_lens=(20,)), FP32, Options(kv_dtype=FP8, sinks=True)),
    _case(PagedShape((130, 9), 4, 2, 64, 16, query_lens=(40, 9)), FP16, Options(kv_dtype=INT8, window=60)),
    _case(PagedShape((70,), 4, 1, 32, 64, query_lens=(70,)), FP32, Options(kv_dtype=INT8, soft_cap=5.0)),
)  # fmt: skip
FULL = (
    *(_case(PagedShape((8192,), 32, 8, 128, 64, query_lens=(8192,)), dtype, target=Target(0.70, "gemm"))
      for dtype in (FP32, FP16, BF16)),
    _case(PagedShape((16384,), 32, 8, 128, 64, query_lens=(2048,)), BF16, Options(fused_qkv=True),
          Target(0.70, "gemm")),
    _case(PagedShape((4096, 512, 1300), 32, 8, 128, 16, query_lens=(512, 512, 100)), BF16),
    _case(PagedShape((4096,), 8, 1, 128, 64, query_lens=(4096,)), BF16),
    _case(PagedShape((2048, 100), 28, 4, 128, 64, query_lens=(2048, 100)), BF16),
    _case(PagedShape((1000,), 32, 32, 96, 64, query_lens=(1000,)), BF16),
    _case(PagedShape((2048,), 16, 8, 256, 64, query_lens=(2048,)), BF16),
    _case(PagedShape((512,), 8, 4, 256, 64, query_lens=(512,)), FP32),
    _case(PagedShape((300,), 8, 4, 32, 16, query_lens=(300,)), FP32),
    _case(PagedShape((900, 80), 32, 8, 128, 64, query_lens=(5, 3)), BF16),  # short chunks take a small tile
    # gpt-oss-20b, its two kinds of layer; Gemma 2 27B, its windowed kind
    _case(PagedShape((8192,), 64, 8, 64, 64, query_lens=(8192,)), BF16, Options(window=128, sinks=True)),
    _case(PagedShape((8192,), 64, 8, 64, 64, query_lens=(8192,)), BF16, Options(sinks=True)),
    _case(PagedShape((8192,), 32, 16, 128, 64, query_lens=(8192,)), BF16, Options(window=4096, soft_cap=50.0)),
    _case(PagedShape((8192,), 32, 8, 128, 64, query_lens=(8192,)), BF16, Options(batch_invariant=True)),
    _case(PagedShape((900, 80), 32, 8, 128, 64, query_lens=(5, 3)), BF16, Options(batch_invariant=True)),
    _case(PagedShape((16384,), 32, 8, 128, 64, query_lens=(2048,)), BF16, Options(kv_dtype=FP8)),
    _case(PagedShape((16384,), 32, 8, 128, 64, query_lens=(2048,)), BF16, Options(kv_dtype=INT8)),
)  # fmt: skip

LIMIT = (
    "Tensor cores: 128 query rows by HGMMA, one block of 8 warps per SM by registers; only diagonal tiles are masked. "
    "4 warps spill; warp specialisation needs descriptor loads, which a table of small blocks does not give."
)

prefill_attention = Op("prefill_attention", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
