"""Prefill attention: chunks of prompts, causal, over a paged cache that already holds the chunk's own keys and values.

Query i of a sequence's n queries and L tokens sits at position L - n + i. A program takes BLOCK_Q query tokens of one
sequence with all query heads of one KV head as the rows of its tile; it walks unmasked over the keys that all its
rows see, then masked over the diagonal. The grid depends on shapes and on max_query_len only. Knows nothing of
schedulers or models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.attention.decode import LOG2_E, gather_blocks, gather_sequence
from kernels.attention.tile import attend
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op


@jit
def _prefill_kernel(
    out_ptr: Value,  # [tokens, q_heads, HEAD_DIM]
    q_ptr: Value,
    kv_ptr: Value,
    table_ptr: Value,
    query_start_ptr: Value,
    seq_lens_ptr: Value,
    score_scale: Value,
    stride_q: Value,
    stride_block: Value,
    stride_table: Value,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_SIZE: constexpr,
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
    if tile * BLOCK_Q >= num_queries:
        return
    length = tl.load(seq_lens_ptr + seq)
    first_position = length - num_queries + tile * BLOCK_Q

    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token = row // GROUP  # within the tile
    head = kv_head * GROUP + row % GROUP
    is_query = (token < BLOCK_Q) & (tile * BLOCK_Q + token < num_queries)
    tile_mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    q_token = (first_query + tile * BLOCK_Q + token).to(tl.int64)
    q = tl.load(q_ptr + (q_token * stride_q + head * HEAD_DIM)[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    last_key = first_position + token
    head_ptr = kv_ptr + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
    row_ptr = table_ptr + seq.to(tl.int64) * stride_table
    end = tl.minimum(first_position + BLOCK_Q, length)
    seen_by_all = (first_position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, seen_by_all, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, row_ptr, start, end, last_key, score_scale, stride_block,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, False,
        )  # fmt: skip
    for start in range(seen_by_all, end, BLOCK_N):
        acc, peak, total = attend(
            q, acc, peak, total, head_ptr, row_ptr, start, end, last_key, score_scale, stride_block,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip

    num_q_heads = tl.num_programs(1) * GROUP
    out_ptrs = out_ptr + ((q_token * num_q_heads + head) * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=tile_mask)


def _tile(block_d: int, element_size: int) -> tuple[int, int]:
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
) -> torch.Tensor:
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    most_rows, block_n = _tile(block_d, q.element_size())
    block_m = max(16, next_power_of_2(group), min(most_rows, next_power_of_2(max_query_len * group)))
    block_q = block_m // group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill_kernel[(cdiv(max_query_len, block_q), num_kv_heads, seq_lens.shape[0])](
        out, q, kv_cache, block_table, query_start_loc, seq_lens, scale * LOG2_E,
        q.stride(0), kv_cache.stride(0), block_table.stride(0),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
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
) -> torch.Tensor:
    out = torch.zeros_like(q)
    group = q.shape[1] // kv_cache.shape[1]
    starts = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        position = torch.arange(length - (end - begin), length, device=q.device)
        future = torch.arange(length, device=q.device) > position[:, None]
        for h, (k, v) in enumerate(gather_sequence(kv_cache, block_table[i], length).double()):
            heads = slice(h * group, (h + 1) * group)
            scores = torch.einsum("qhd,kd->hqk", q[begin:end, heads].double(), k) * scale
            weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
            out[begin:end, heads] = torch.einsum("hqk,kd->qhd", weights, v).to(q.dtype)
    return out


def cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    """One SDPA per sequence: a step has few chunks, and a batch of them would be mostly padding."""
    _, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    group = num_q_heads // num_kv_heads
    starts: list[int] = query_start_loc.tolist()
    out = torch.empty(q.shape, dtype=q.dtype)
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        n = end - begin
        if n == 0:
            continue
        kv = gather_blocks(kv_cache, block_table[i : i + 1, : cdiv(length, block_size)])[0, :, :, :length]
        # The KV head is the batch and its group the heads, so that K and V are shared without a copy.
        rows = q[begin:end].view(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        k, v = kv[:, :1].expand(-1, group, -1, -1), kv[:, 1:].expand(-1, group, -1, -1)
        mask = None if n == 1 else torch.ones(n, length, dtype=torch.bool).tril_(length - n)
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        out[begin:end].view(n, num_kv_heads, group, head_dim).copy_(attended.permute(2, 0, 1, 3))
    return out


def _cost(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> costs.OpCost:
    _, num_q_heads, head_dim = q.shape
    query_lens = query_start_loc.diff().tolist()
    return costs.prefill_attention(
        query_lens, seq_lens.tolist(), num_q_heads, kv_cache.shape[1], head_dim, q.element_size()
    )


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float]


def _case(shape: PagedShape, dtype: torch.dtype, fused_qkv: bool = False, sharpness: float = 1.0) -> Case:
    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        num_heads = shape.num_q_heads + (2 * shape.num_kv_heads if fused_qkv else 0)
        q = draw.normal(sum(shape.query_lens), num_heads, shape.head_dim)[:, : shape.num_q_heads]
        kv_cache, block_table, seq_lens = draw.paged_cache(shape)
        starts = [sum(shape.query_lens[:i]) for i in range(len(shape.query_lens) + 1)]
        longest = max(shape.query_lens)
        return q, kv_cache, block_table, draw.integers(starts), seq_lens, longest, sharpness * shape.head_dim**-0.5

    num_rows = max(shape.query_lens) * shape.num_q_heads // shape.num_kv_heads
    sass = ("HGMMA",) if dtype != torch.float32 and num_rows >= 64 else ()
    return Case(shape.name(dtype) + " strided" * fused_qkv + " sharp" * (sharpness > 1), dtype, build, sass)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case(PagedShape((37,), 4, 2, 64, 16, query_lens=(37,)), FP32),  # a whole prompt
    _case(
        PagedShape((100, 1, 70), 4, 2, 64, 16, query_lens=(40, 1, 1)), BF16, fused_qkv=True
    ),  # chunks and decode rows
    _case(PagedShape((150,), 8, 1, 128, 16, query_lens=(23,)), FP16),
    _case(PagedShape((65, 140), 6, 2, 96, 16, query_lens=(65, 12)), FP32),
    _case(PagedShape((90, 64), 7, 1, 80, 64, query_lens=(30, 64)), BF16),
    _case(PagedShape((129,), 4, 4, 32, 64, query_lens=(129,)), FP16),  # more than one tile of queries
    _case(PagedShape((50,), 20, 1, 64, 128, query_lens=(9,)), FP32),
    _case(PagedShape((40, 17), 2, 2, 16, 16, query_lens=(0, 17)), FP32),  # a sequence that asks nothing in this step
    _case(PagedShape((90,), 4, 2, 64, 16, query_lens=(20,)), FP16, sharpness=100.0),
)
FULL = (
    *(_case(PagedShape((8192,), 32, 8, 128, 64, query_lens=(8192,)), dtype) for dtype in (FP32, FP16, BF16)),
    _case(PagedShape((16384,), 32, 8, 128, 64, query_lens=(2048,)), BF16, fused_qkv=True),
    _case(PagedShape((4096, 512, 1300), 32, 8, 128, 16, query_lens=(512, 512, 100)), BF16),
    _case(PagedShape((4096,), 8, 1, 128, 64, query_lens=(4096,)), BF16),
    _case(PagedShape((2048, 100), 28, 4, 128, 64, query_lens=(2048, 100)), BF16),
    _case(PagedShape((1000,), 32, 32, 96, 64, query_lens=(1000,)), BF16),
    _case(PagedShape((2048,), 16, 8, 256, 64, query_lens=(2048,)), BF16),
    _case(PagedShape((512,), 8, 4, 256, 64, query_lens=(512,)), FP32),
    _case(PagedShape((300,), 8, 4, 32, 16, query_lens=(300,)), FP32),
    _case(PagedShape((900, 80), 32, 8, 128, 64, query_lens=(5, 3)), BF16),  # short chunks take a small tile
)

LIMIT = (
    "Tensor cores: 128 query rows by HGMMA, one block of 8 warps per SM by registers; only diagonal tiles are masked. "
    "4 warps spill; warp specialisation needs descriptor loads, which a table of small blocks does not give."
)

prefill_attention = Op("prefill_attention", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
