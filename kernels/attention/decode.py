"""Decode attention: one query token per sequence over a paged cache.

Split-KV: a program takes one sequence, one KV head and one share of the keys, with the head's whole group of query
heads as the rows of its tile; a second kernel combines the shares. The grid depends on shapes only: lengths are read
on the device, so a launch can be captured in a CUDA graph. Knows nothing of schedulers or models.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.attention.tile import attend
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, num_sms, tl
from kernels.op import Case, Op

LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 4  # as many as fit at once; more splits only add to the combining
MAX_SPLITS = 128
MIN_ROWS = 16  # the smallest tile tl.dot takes

# CPU path: a part of the batch gets a call of its own when that saves padding by more than this many cache elements.
# A call costs about 0.2 ms, a gathered and attended element about 1 ns.
_ELEMENTS_WORTH_A_CALL = 1 << 18


@jit
def _decode_kernel(
    out_ptr: Value,  # [batch, q_heads, NUM_SPLITS, HEAD_DIM]
    lse_ptr: Value,  # [batch, q_heads, NUM_SPLITS] fp32, log2 of the sum of weights; not written when NUM_SPLITS is 1
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
    seq_lens_ptr: Value,
    score_scale: Value,
    stride_q: Value,
    stride_block: Value,
    stride_table: Value,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_SIZE: constexpr,
    NUM_SPLITS: constexpr,
    BLOCK_G: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
) -> None:
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_q_heads = tl.num_programs(1) * GROUP
    length = tl.load(seq_lens_ptr + seq)
    share = tl.cdiv(tl.cdiv(length, NUM_SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)

    row = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    tile_mask = (row < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + seq.to(tl.int64) * stride_q + head[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptrs, mask=tile_mask, other=0.0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    last_key = tl.zeros([BLOCK_G], tl.int32) + (end - 1)
    head_ptr = kv_ptr + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    row_ptr = table_ptr + seq.to(tl.int64) * stride_table
    for start in range(begin, end, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, row_ptr, start, end, last_key, score_scale, stride_block,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip

    # A share without keys (a short sequence, or none at all) leaves total at 0 and peak at -inf.
    slot = (seq.to(tl.int64) * num_q_heads + head) * NUM_SPLITS + split
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_ptrs = out_ptr + slot[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=tile_mask)
    if NUM_SPLITS > 1:
        tl.store(lse_ptr + slot, peak + tl.log2(tl.where(total > 0, total, 1.0)), mask=row < GROUP)


@jit
def _combine_kernel(
    out_ptr: Value,  # [batch * q_heads, HEAD_DIM]
    part_ptr: Value,  # [batch * q_heads, NUM_SPLITS, HEAD_DIM] fp32
    lse_ptr: Value,  # [batch * q_heads, NUM_SPLITS] fp32
    HEAD_DIM: constexpr,
    NUM_SPLITS: constexpr,
    BLOCK_D: constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + head * NUM_SPLITS + split)
    peak = tl.max(lse, 0)
    weight = tl.where(lse > float("-inf"), tl.exp2(lse - peak), 0.0)
    mask = (weight > 0)[:, None] & (dims < HEAD_DIM)[None, :]
    part_ptrs = part_ptr + (head * NUM_SPLITS + split)[:, None] * HEAD_DIM + dims[None, :]
    part = tl.load(part_ptrs, mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def _num_splits(q: torch.Tensor, num_kv_heads: int, max_tiles: int) -> int:
    """A power of two: enough programs to fill the device, never more than the table can hold tiles."""
    wanted = PROGRAMS_PER_SM * num_sms(q) // (q.shape[0] * num_kv_heads)
    most = max(1, min(wanted, max_tiles, MAX_SPLITS))
    return 1 << (most.bit_length() - 1)


def launch(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    batch, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    block_n = 64 if block_d * q.element_size() <= 512 else 32
    splits = _num_splits(q, num_kv_heads, cdiv(block_table.shape[1] * block_size, block_n))
    out = torch.empty(batch, num_q_heads, head_dim, dtype=q.dtype, device=q.device)
    parts, lse = out, out
    if splits > 1:
        parts = torch.empty(batch, num_q_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, num_q_heads, splits, dtype=torch.float32, device=q.device)
    _decode_kernel[(batch, num_kv_heads, splits)](
        parts, lse, q, kv_cache, block_table, seq_lens, scale * LOG2_E,
        q.stride(0), kv_cache.stride(0), block_table.stride(0),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, NUM_SPLITS=splits,
        BLOCK_G=max(MIN_ROWS, next_power_of_2(group)), BLOCK_D=block_d, BLOCK_N=block_n, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(batch * num_q_heads,)](
            out, parts, lse, HEAD_DIM=head_dim, NUM_SPLITS=splits, BLOCK_D=block_d, num_warps=4
        )
    return out


def reference(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    out = torch.zeros_like(q)
    group = q.shape[1] // kv_cache.shape[1]
    for i, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        k, v = gather_sequence(kv_cache, block_table[i], length).double().repeat_interleave(group, dim=0).unbind(1)
        weights = torch.softmax(torch.einsum("hd,hkd->hk", q[i].double(), k) * scale, dim=-1)
        out[i] = torch.einsum("hk,hkd->hd", weights, v)
    return out


@cache
def _head_rows(num_rows: int) -> torch.Tensor:
    return torch.arange(num_rows, dtype=torch.int32).unsqueeze(1)


def gather_blocks(kv_cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """The blocks of a [batch, blocks] table as [batch, kv_heads, 2, tokens, head_dim], in one copy."""
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    rows = torch.add(_head_rows(2 * num_kv_heads), block_table.unsqueeze(1), alpha=2 * num_kv_heads).view(-1)
    picked = kv_cache.view(num_blocks * 2 * num_kv_heads, block_size * head_dim).index_select(0, rows)
    return picked.view(block_table.shape[0], num_kv_heads, 2, block_table.shape[1] * block_size, head_dim)


def gather_sequence(kv_cache: torch.Tensor, table_row: torch.Tensor, length: int) -> torch.Tensor:
    """One sequence's [kv_heads, 2, length, head_dim], on the CPU or not."""
    block_size = kv_cache.shape[3]
    blocks = kv_cache[table_row[: cdiv(length, block_size)].long()]
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def cpu(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    lengths: list[int] = seq_lens.tolist()
    groups = _similar_lengths(lengths, elements_per_token=2 * kv_cache.shape[1] * kv_cache.shape[4])
    if len(groups) == 1:
        return _attend(q, kv_cache, block_table, seq_lens, lengths, scale)
    out = torch.empty_like(q)
    for members in groups:
        index = torch.tensor(members)
        part = [lengths[i] for i in members]
        out[index] = _attend(q[index], kv_cache, block_table[index], seq_lens[index], part, scale)
    return out


def _similar_lengths(lengths: list[int], elements_per_token: int) -> list[list[int]]:
    """Cut the batch, shortest sequence first, wherever a group's padding would cost more than a call."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = [[]]
    num_tokens = 0  # of the last group
    for i in order:
        padding = len(groups[-1]) * lengths[i] - num_tokens
        if padding * elements_per_token > _ELEMENTS_WORTH_A_CALL:
            groups.append([])
            num_tokens = 0
        groups[-1].append(i)
        num_tokens += lengths[i]
    return groups


def _attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    if lengths.count(lengths[0]) < len(lengths):
        return _attend_padded(q, kv_cache, block_table, seq_lens, lengths, scale)
    if lengths[0] == 0:
        return torch.zeros_like(q)
    return _attend_equal(q, kv_cache, block_table, lengths[0], scale)


def _attend_equal(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, length: int, scale: float
) -> torch.Tensor:
    """All sequences have this length: no mask, and what lies behind it is cut off."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    kv = gather_blocks(kv_cache, block_table[:, : cdiv(length, block_size)])
    rows = q.view(batch, num_kv_heads, -1, head_dim)  # the group's heads are query rows: K and V are read once
    out = F.scaled_dot_product_attention(rows, kv[:, :, 0, :length], kv[:, :, 1, :length], scale=scale)
    return out.reshape(batch, num_q_heads, head_dim)


def _attend_padded(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    num_blocks = cdiv(max(lengths), block_size)
    in_reach = torch.arange(num_blocks * block_size, dtype=torch.int32) < seq_lens.unsqueeze(1)
    # An unused table entry may hold anything, and so may a slot behind the end, even a NaN of another request:
    # read block 0 for the first, and let both weigh exactly nothing.
    table = torch.where(in_reach[:, ::block_size], block_table[:, :num_blocks], 0)
    kv = gather_blocks(kv_cache, table)
    for i, length in enumerate(lengths):
        kv[i, :, :, length:] = 0
    if min(lengths) == 0:
        in_reach[:, 0] = True  # a sequence of no tokens attends to the zeros just written
    rows = q.view(batch, num_kv_heads, -1, head_dim)
    mask = in_reach.view(batch, 1, 1, -1)
    out = F.scaled_dot_product_attention(rows, kv[:, :, 0], kv[:, :, 1], attn_mask=mask, scale=scale)
    return out.reshape(batch, num_q_heads, head_dim)


def _cost(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> costs.OpCost:
    _, num_q_heads, head_dim = q.shape
    return costs.decode_attention(seq_lens.tolist(), num_q_heads, kv_cache.shape[1], head_dim, q.element_size())


def _case(shape: PagedShape, dtype: torch.dtype, fused_qkv: bool = False, sharpness: float = 1.0) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        draw = Draw(device, dtype)
        # In the engine q is a slice of the fused projection: its rows are further apart than its width.
        num_heads = shape.num_q_heads + (2 * shape.num_kv_heads if fused_qkv else 0)
        q = draw.normal(len(shape.seq_lens), num_heads, shape.head_dim)[:, : shape.num_q_heads]
        return (q, *draw.paged_cache(shape), sharpness * shape.head_dim**-0.5)

    return Case(shape.name(dtype) + " strided" * fused_qkv + " sharp" * (sharpness > 1), dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case(PagedShape((1, 16, 77), 4, 2, 64, 16), FP32),
    _case(PagedShape((150, 3), 4, 2, 64, 16), BF16, fused_qkv=True),
    _case(PagedShape((90,), 8, 1, 128, 16), FP16),
    _case(PagedShape((33, 200), 6, 2, 96, 16), FP32),  # head_dim and group that are no powers of two
    _case(PagedShape((5, 64), 7, 1, 80, 64), BF16),
    _case(PagedShape((130, 65), 4, 4, 32, 64), FP16),  # a block holds a whole tile; no grouping
    _case(PagedShape((0, 20), 2, 2, 16, 16), FP32),  # a padded batch: a sequence of no tokens
    _case(PagedShape((700, 9, 5, 14), 20, 1, 64, 128), FP32),  # a group larger than the smallest tile; very ragged
    _case(PagedShape((40, 40, 40), 4, 2, 48, 16), FP32),
    _case(PagedShape((140, 90), 4, 2, 64, 16), FP16, sharpness=100.0),  # scores whose powers no float holds
)
FULL = (
    *(_case(PagedShape((4096,) * 32, 32, 8, 128, 64), dtype) for dtype in (FP32, FP16, BF16)),
    _case(PagedShape((8192,) * 64, 32, 8, 128, 64), BF16),
    _case(PagedShape((1024,) * 64, 32, 8, 128, 16), BF16),
    _case(PagedShape((4096,) * 64, 8, 1, 128, 64), BF16),
    _case(PagedShape((32768,), 32, 4, 128, 64), BF16, fused_qkv=True),
    _case(PagedShape((200, 3000, 47, 9000), 28, 4, 128, 64), BF16),
    _case(PagedShape((2048,) * 8, 32, 32, 96, 64), BF16),
    _case(PagedShape((2048,) * 8, 16, 8, 256, 64), BF16),
    _case(PagedShape((1024,) * 8, 8, 4, 256, 64), FP32),
    _case(PagedShape((300,) * 8, 8, 4, 32, 16), FP32),
)

LIMIT = (
    "Memory: every cached key and value is read once. Four blocks per SM hide its latency; more stages would not: the "
    "look-up in the block table keeps one K and one V tile in flight whatever num_stages says."
)

decode_attention = Op("decode_attention", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
