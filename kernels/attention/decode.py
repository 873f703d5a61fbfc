"""Decode attention: one query token per sequence over a paged cache.

Split-KV: a program takes one KV head and a share of one sequence's keys, with the head's whole group of query heads as
the rows of its tile; a second kernel combines the shares. They are cut so that none is long however ragged the batch
is, and a program finds its own from the lengths, which are read on the device: the grid depends on shapes only, and a
launch can be captured in a CUDA graph. Tiles of keys outside the window are never visited.

Batch-invariant mode: shares are SPLIT_KEYS positions each, counted from the sequence's beginning, and combined in
order, so that a sequence gives the same bits alone, in any batch, and under a table of any width. On the CPU they are
also those of prefill_attention in that mode; on a GPU they are not, for tiles of 16 and of 128 rows run on different
instructions: who needs that calls prefill_attention for single tokens too. Knows nothing of schedulers or models.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from kernels.attention.cases import PLAIN, Options, OptionValues
from kernels.attention.decode_cpu import DecodePlan, attend_decodes, attend_decodes_in_fixed_order
from kernels.attention.paged import (
    Softmax,
    define,
    gather_sequence,
    is_per_head,
    kv_token_bytes,
)
from kernels.attention.split import (
    balanced_share,
    combine,
    combine_balanced,
    num_pieces,
    plan_splits,
    sequence_of_slot,
    shares,
    tiles_of,
)
from kernels.attention.tile import attend, score_factors
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target

PROGRAMS_PER_SM = 4  # as many as fit at once; more splits only add to the combining
MIN_ROWS = 16  # the smallest tile tl.dot takes
MAX_BALANCED = 1024  # sequences: each program reads all their lengths


@jit
def _attend_share(
    out_ptr: Value,  # a row of HEAD_DIM for each of the group's heads, stride_row rows apart
    lse_ptr: Value,  # fp32, log2 of the sum of weights, in the same order; None: the share is everything
    stride_row: Value,
    seq: Value,
    kv_head: Value,
    length: Value,
    begin: Value,
    end: Value,
    has_sink: Value,
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
    sinks_ptr: Value,
    head_scales_ptr: Value,
    slot_scales_ptr: Value,
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
    BLOCK_G: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
) -> None:
    """One sequence and KV head, keys begin .. end - 1."""
    row = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    tile_mask = (row < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + seq.to(tl.int64) * stride_q + head[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptrs, mask=tile_mask, other=0.0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if sinks_ptr is not None and has_sink:  # as if a key of that score and no value had been seen
        peak = tl.load(sinks_ptr + head, mask=row < GROUP, other=0.0) * 1.4426950408889634  # in units of log2
        total += 1.0
    head_ptr = kv_ptr + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    if slot_scales_ptr is not None:
        slot_scales_ptr += kv_head * (2 * BLOCK_SIZE)
    v_scale = 1.0
    if head_scales_ptr is not None:
        score_scale *= tl.load(head_scales_ptr + 2 * kv_head)
        v_scale = tl.load(head_scales_ptr + 2 * kv_head + 1)
    row_ptr = table_ptr + seq.to(tl.int64) * stride_table
    last_key = tl.zeros([BLOCK_G], tl.int32) + (length - 1)
    for start in range(begin, end, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, slot_scales_ptr, row_ptr, start, length - window, end, last_key, window,
            score_scale, cap, stride_block, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True, WINDOWED, CAPPED,
        )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    out = acc / total[:, None] * v_scale
    out_ptrs = out_ptr + (row * stride_row)[:, None] * HEAD_DIM + dims[None, :]
    if lse_ptr is None:
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=tile_mask)
    else:  # nobody reads a share without keys (to return early from one costs this kernel 100 registers)
        tl.store(out_ptrs, out, mask=tile_mask & (begin < end))
        tl.store(lse_ptr + row * stride_row, peak + tl.log2(total), mask=(row < GROUP) & (begin < end))


@jit
def _decode_kernel(
    out_ptr: Value,  # [batch, q_heads, splits, HEAD_DIM]
    lse_ptr: Value,  # [batch, q_heads, splits] fp32, or None: there is one split
    seq_lens_ptr: Value,
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
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
    BLOCK_G: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
    SPLIT_KEYS: constexpr,  # 0: whatever makes the shares of a sequence equal
) -> None:
    """A program has one share of one sequence."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    length = tl.load(seq_lens_ptr + seq)
    first, origin, share = shares(length, window, num_splits, SPLIT_KEYS, WINDOWED, BLOCK_N)
    slot = (seq * tl.num_programs(1) + kv_head).to(tl.int64) * GROUP * num_splits + split
    _attend_share(
        out_ptr + slot * HEAD_DIM, lse_ptr + slot if lse_ptr is not None else None, num_splits, seq, kv_head, length,
        tl.maximum(origin + split * share, first), tl.minimum(origin + (split + 1) * share, length), split == 0,
        q_ptr, kv_ptr, table_ptr, sinks_ptr, head_scales_ptr, slot_scales_ptr, score_scale, cap, window,
        stride_q, stride_block, stride_table,
        GROUP, HEAD_DIM, BLOCK_SIZE, WINDOWED, CAPPED, BLOCK_G, BLOCK_D, BLOCK_N,
    )  # fmt: skip


@jit
def _balanced_decode_kernel(
    out_ptr: Value,  # [q_heads, slots, HEAD_DIM] fp32
    lse_ptr: Value,  # [q_heads, slots] fp32
    seq_lens_ptr: Value,
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
    sinks_ptr: Value,
    head_scales_ptr: Value,
    slot_scales_ptr: Value,
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
    BLOCK_G: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
    batch: Value,
    BLOCK_B: constexpr,  # batch rounded up to a power of two
) -> None:
    """A program has one slot: no more tiles than any other, all of one sequence."""
    slot, kv_head = tl.program_id(0), tl.program_id(1)
    num_slots = tl.num_programs(0)
    share, ends = balanced_share(seq_lens_ptr, batch, window, num_slots - batch, WINDOWED, BLOCK_B, BLOCK_N)
    seq = sequence_of_slot(ends, slot, share, BLOCK_B)
    first_tile, end_tile = tiles_of(ends, seq, BLOCK_B)
    tile = tl.maximum((slot - seq) * share, first_tile)
    until = tl.minimum((slot - seq + 1) * share, end_tile)
    seq = tl.minimum(seq, batch - 1)  # behind the last slot in use there is no sequence, and no tile either
    length = tl.load(seq_lens_ptr + seq)
    first_key = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N if WINDOWED else 0
    row = kv_head.to(tl.int64) * GROUP * num_slots + slot
    _attend_share(
        out_ptr + row * HEAD_DIM, lse_ptr + row, num_slots, seq, kv_head, length,
        first_key + (tile - first_tile) * BLOCK_N, tl.minimum(first_key + (until - first_tile) * BLOCK_N, length),
        tile == first_tile,
        q_ptr, kv_ptr, table_ptr, sinks_ptr, head_scales_ptr, slot_scales_ptr, score_scale, cap, window,
        stride_q, stride_block, stride_table,
        GROUP, HEAD_DIM, BLOCK_SIZE, WINDOWED, CAPPED, BLOCK_G, BLOCK_D, BLOCK_N,
    )  # fmt: skip


def launch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    batch, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    # Unpacking a narrow cache takes registers: at 64 keys they would leave two blocks per SM.
    block_n = 64 if block_d * q.element_size() <= 512 and kv_cache.element_size() > 1 else 32
    most_keys = block_table.shape[1] * block_size
    head_scales, slot_scales = (kv_scales, None) if kv_scales is None or is_per_head(kv_scales) else (None, kv_scales)
    arguments = (
        q, kv_cache, block_table, sinks, head_scales, slot_scales, *score_factors(scale, soft_cap), window,
        q.stride(0), kv_cache.stride(0), block_table.stride(0), group, head_dim, block_size, window > 0, soft_cap > 0,
        max(MIN_ROWS, next_power_of_2(group)), block_d, block_n,
    )  # fmt: skip
    out = torch.empty(batch, num_q_heads, head_dim, dtype=q.dtype, device=q.device)
    if not batch_invariant and 1 < batch <= MAX_BALANCED:
        num_slots = batch + num_pieces(q, PROGRAMS_PER_SM, num_kv_heads, most_keys, window, block_n)
        parts = torch.empty(num_q_heads, num_slots, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_q_heads, num_slots, dtype=torch.float32, device=q.device)
        _balanced_decode_kernel[(num_slots, num_kv_heads)](
            parts, lse, seq_lens, *arguments, batch, next_power_of_2(batch), num_warps=4, num_stages=3
        )
        combine_balanced(out, parts, lse, seq_lens, window, block_n)
        return out
    split = plan_splits(q, PROGRAMS_PER_SM, batch * num_kv_heads, most_keys, window, block_n, batch_invariant)
    parts, sums = split.empty_parts(out)
    _decode_kernel[(batch, num_kv_heads, split.num_splits)](
        parts, sums, seq_lens, *arguments, split.split_keys, num_warps=4, num_stages=3
    )
    if sums is not None:
        combine(out, parts, sums, seq_lens, split, window, block_n)
    return out


def reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    softmax = Softmax(scale, window, sinks, soft_cap)
    out = torch.zeros_like(q)
    for i, length in enumerate(seq_lens.tolist()):
        if length:
            kv = gather_sequence(kv_cache, block_table[i], length, kv_scales, softmax.first_key(length - 1))
            out[i : i + 1] = define(q[i : i + 1], kv, softmax)
    return out


def cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    softmax = Softmax(scale, window, sinks, soft_cap)
    if batch_invariant:
        return attend_decodes_in_fixed_order(q, kv_cache, block_table, seq_lens, softmax, kv_scales)
    if plan is None:
        plan = DecodePlan.of(block_table, seq_lens, kv_cache, q.dtype, window)
    return attend_decodes(q, kv_cache, plan, softmax, kv_scales)


def _cost(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    batch_invariant: bool = False,
    plan: DecodePlan | None = None,
) -> costs.OpCost:
    _, num_q_heads, head_dim = q.shape
    return costs.decode_attention(
        seq_lens.tolist(), num_q_heads, kv_cache.shape[1], head_dim, q.element_size(), window,
        kv_token_bytes(kv_cache, kv_scales),
    )  # fmt: skip


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, *OptionValues]


def _case(shape: PagedShape, dtype: torch.dtype, options: Options = PLAIN, target: Target | None = None) -> Case:
    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        q = options.draw_q(draw, len(shape.seq_lens), shape)
        paged = draw.paged_cache(shape, options.kv_dtype, options.window)
        scale = options.sharpness * shape.head_dim**-0.5
        return (q, *paged, scale, *options.draw(draw, shape.num_q_heads, paged[0]))

    return Case(shape.name(dtype) + options.name(), dtype, build, target=target)


FP32, FP16, BF16, FP8, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8

SMALL = (
    _case(PagedShape((1, 16, 77), 4, 2, 64, 16), FP32),
    _case(PagedShape((150, 3), 4, 2, 64, 16), BF16, Options(fused_qkv=True)),
    _case(PagedShape((90,), 8, 1, 128, 16), FP16),
    _case(PagedShape((33, 200), 6, 2, 96, 16), FP32),  # head_dim and group that are no powers of two
    _case(PagedShape((5, 64), 7, 1, 80, 64), BF16),
    _case(PagedShape((130, 65), 4, 4, 32, 64), FP16),  # a block holds a whole tile; no grouping
    _case(PagedShape((0, 20), 2, 2, 16, 16), FP32),  # a padded batch: a sequence of no tokens
    _case(PagedShape((700, 9, 5, 14), 20, 1, 64, 128), FP32),  # a group larger than the smallest tile; very ragged
    _case(PagedShape((40, 40, 40), 4, 2, 48, 16), FP32),
    _case(PagedShape((140, 90), 4, 2, 64, 16), FP16, Options(sharpness=100.0)),
    _case(PagedShape((200, 30, 0), 4, 2, 64, 16), FP32, Options(window=50)),  # longer and shorter than the window
    _case(PagedShape((300, 129), 4, 1, 64, 64), BF16, Options(window=64)),  # the window is a tile, or meets two
    _case(PagedShape((200, 70), 4, 2, 64, 16), BF16, Options(window=1)),
    _case(PagedShape((150, 0, 33), 6, 2, 64, 16), FP32, Options(sinks=True)),
    _case(PagedShape((140, 9), 4, 1, 64, 16), FP16, Options(sinks=True, sharpness=100.0)),
    _case(PagedShape((150, 33), 4, 2, 64, 16), FP32, Options(soft_cap=2.0)),
    _case(PagedShape((150, 33), 4, 2, 64, 16), FP16, Options(soft_cap=30.0, sharpness=100.0)),
    _case(PagedShape((180, 20), 8, 2, 64, 16), BF16, Options(window=90, sinks=True, soft_cap=5.0, fused_qkv=True)),
    _case(PagedShape((1100,), 4, 1, 64, 64), FP32, Options(batch_invariant=True)),  # three shares
    _case(PagedShape((0, 600), 4, 1, 64, 64), BF16, Options(batch_invariant=True, sinks=True)),
    _case(PagedShape((1100, 40), 4, 1, 32, 64), FP16, Options(batch_invariant=True, window=100)),
    _case(PagedShape((0, 3, 0, 290, 1, 0), 4, 1, 32, 16), FP32),  # nobody first, between and last
    _case(PagedShape((190, 60, 190, 100), 2, 1, 32, 16), FP16, Options(sinks=True)),  # and pieces of two sequences
    _case(PagedShape((150, 3), 4, 2, 64, 16), BF16, Options(kv_dtype=FP8, fused_qkv=True)),
    _case(PagedShape((70, 0), 6, 2, 96, 64), FP32, Options(kv_dtype=FP8, sinks=True, soft_cap=5.0)),
    _case(PagedShape((150, 40), 4, 2, 64, 16), FP16, Options(kv_dtype=INT8, window=60)),
    _case(PagedShape((130, 65), 4, 4, 32, 64), FP32, Options(kv_dtype=INT8, soft_cap=5.0)),
    _case(PagedShape((600,), 4, 1, 64, 64), BF16, Options(kv_dtype=INT8, batch_invariant=True)),
)
ZIPF = tuple(max(1, 55_000 // (1 + (37 * i) % 64)) for i in range(64))  # mean 4,073, in no order
FULL = (
    *(
        _case(PagedShape((4096,) * 32, 32, 8, 128, 64), dtype, target=Target(0.92, "memory"))
        for dtype in (FP32, FP16, BF16)
    ),
    _case(PagedShape((8192,) * 64, 32, 8, 128, 64), BF16, target=Target(0.92, "memory")),
    _case(PagedShape((1024,) * 64, 32, 8, 128, 16), BF16, target=Target(0.92, "memory")),
    _case(PagedShape((4096,) * 64, 8, 1, 128, 64), BF16, target=Target(0.85, "memory")),
    _case(PagedShape((8192,) * 128, 8, 1, 128, 64), BF16, target=Target(0.85, "memory")),
    _case(PagedShape((32768,), 32, 4, 128, 64), BF16, Options(fused_qkv=True), Target(0.60, "memory")),
    _case(PagedShape((200, 3000, 47, 9000), 28, 4, 128, 64), BF16),
    _case(PagedShape(ZIPF, 32, 8, 128, 64), BF16, target=Target(0.85, "memory")),
    _case(PagedShape((2048,) * 8, 32, 32, 96, 64), BF16),
    _case(PagedShape((2048,) * 8, 16, 8, 256, 64), BF16),
    _case(PagedShape((1024,) * 8, 8, 4, 256, 64), FP32),
    _case(PagedShape((300,) * 8, 8, 4, 32, 16), FP32),
    _case(PagedShape((8192,) * 64, 64, 8, 64, 64), BF16, Options(window=128, sinks=True)),  # gpt-oss, windowed layer
    _case(PagedShape((8192,) * 64, 64, 8, 64, 64), BF16, Options(sinks=True)),  # and the other kind
    _case(PagedShape((8192,) * 16, 32, 16, 128, 64), BF16, Options(window=4096, soft_cap=50.0)),  # Gemma 2 27B
    _case(PagedShape((4096,) * 32, 32, 8, 128, 64), BF16, Options(batch_invariant=True)),
    _case(PagedShape((4096,) * 64, 32, 8, 128, 64), BF16, Options(kv_dtype=FP8), Target(0.85, "memory")),
    _case(PagedShape((4096,) * 64, 32, 8, 128, 16), BF16, Options(kv_dtype=FP8), Target(0.85, "memory")),
    _case(PagedShape((4096,) * 64, 32, 8, 128, 64), BF16, Options(kv_dtype=INT8), Target(0.85, "memory")),
    _case(PagedShape((8192,) * 64, 64, 8, 64, 64), BF16, Options(kv_dtype=FP8, window=128, sinks=True)),
)

LIMIT = (
    "Memory: every cached key and value is read once. Four blocks per SM hide its latency; more stages would not: the "
    "table keeps one K and one V tile in flight. Balanced by a grid of slots: a loop over sequences in one program "
    "took 147 registers (3 blocks), or spilled at 128. Narrow caches take tiles of 32 keys: 64 take 168-212."
)

decode_attention = Op("decode_attention", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
