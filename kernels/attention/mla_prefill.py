"""Prefill attention over expanded latents (multi-head latent attention): chunks of prompts, causal.

Expanded, not absorbed: a pair of tokens then costs 2 * (128 + 64 + 128) flops a head in DeepSeek-V3 instead of
2 * (512 + 64 + 512), while the expansion of a cached latent is paid once per chunk, not once per pair. So the caller
gathers the latents of a sequence (a chunk's context and the chunk itself, side by side in order), multiplies them with
the up-projections of key and value in one product, and passes that product as it is, with the rotary part, which all
heads share, as a slice of the latents. A decode step stays absorbed. Knows nothing of caches or projections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.attention.tile import LOG2_E
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import TOLERANCE, Case, Op, Target


@jit
def _attend(
    q: Value,  # [BLOCK_M, NOPE]
    q_rope: Value,  # [BLOCK_M, ROPE]
    acc: Value,
    peak: Value,
    total: Value,
    kv_ptr: Value,  # the sequence's first token, this head
    rope_ptr: Value,  # the sequence's first token
    start: Value,
    end: Value,
    position: Value,  # [BLOCK_M]
    score_scale: Value,
    stride_kv: Value,
    stride_rope: Value,
    NOPE: constexpr,
    ROPE: constexpr,
    V_DIM: constexpr,
    BLOCK_N: constexpr,
    MASKED: constexpr,
) -> Value:
    keys = start + tl.arange(0, BLOCK_N)
    dims, rope_dims, v_dims = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, V_DIM)
    rows, rope_rows = keys.to(tl.int64) * stride_kv, keys.to(tl.int64) * stride_rope
    k_ptrs = kv_ptr + rows[None, :] + dims[:, None]
    k_rope_ptrs = rope_ptr + rope_rows[None, :] + rope_dims[:, None]
    v_ptrs = kv_ptr + NOPE + rows[:, None] + v_dims[None, :]
    if MASKED:
        in_reach = keys < end
        k = tl.load(k_ptrs, mask=in_reach[None, :], other=0.0)
        k_rope = tl.load(k_rope_ptrs, mask=in_reach[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=in_reach[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
        k_rope = tl.load(k_rope_ptrs)
        v = tl.load(v_ptrs)
    scores = tl.dot(q_rope, k_rope, tl.dot(q, k)) * score_scale
    if MASKED:
        scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return acc, new_peak, total


@jit
def _mla_prefill_kernel(
    out_ptr: Value,  # [tokens, heads, V_DIM]
    q_ptr: Value,  # [tokens, heads, NOPE + ROPE]
    kv_ptr: Value,  # [kv_tokens, heads, NOPE + V_DIM]
    rope_ptr: Value,  # [kv_tokens, ROPE]
    query_start_ptr: Value,
    kv_start_ptr: Value,
    score_scale: Value,
    stride_q: Value,
    stride_kv: Value,
    stride_rope: Value,
    NOPE: constexpr,
    ROPE: constexpr,
    V_DIM: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    # The last tile of a sequence has the most keys: take it first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, seq = tl.program_id(1), tl.program_id(2)
    first_query, first_kv = tl.load(query_start_ptr + seq), tl.load(kv_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - first_query
    length = tl.load(kv_start_ptr + seq + 1) - first_kv
    if tile * BLOCK_M >= num_queries:
        return
    first_position = length - num_queries + tile * BLOCK_M

    row = tl.arange(0, BLOCK_M)
    dims, rope_dims, v_dims = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, V_DIM)
    is_query = (tile * BLOCK_M + row < num_queries)[:, None]
    q_token = (first_query + tile * BLOCK_M + row).to(tl.int64)
    q_row = q_ptr + (q_token * stride_q + head * (NOPE + ROPE))[:, None]
    q = tl.load(q_row + dims[None, :], mask=is_query, other=0.0)
    q_rope = tl.load(q_row + NOPE + rope_dims[None, :], mask=is_query, other=0.0)
    acc = tl.zeros([BLOCK_M, V_DIM], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kv_ptr += first_kv.to(tl.int64) * stride_kv + head * (NOPE + V_DIM)
    rope_ptr += first_kv.to(tl.int64) * stride_rope
    position = first_position + row
    end = tl.minimum(first_position + BLOCK_M, length)
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, diagonal, BLOCK_N):
        acc, peak, total = _attend(
            q, q_rope, acc, peak, total, kv_ptr, rope_ptr, start, end, position, score_scale, stride_kv, stride_rope,
            NOPE, ROPE, V_DIM, BLOCK_N, False,
        )  # fmt: skip
    for start in range(diagonal, end, BLOCK_N):
        acc, peak, total = _attend(
            q, q_rope, acc, peak, total, kv_ptr, rope_ptr, start, end, position, score_scale, stride_kv, stride_rope,
            NOPE, ROPE, V_DIM, BLOCK_N, True,
        )  # fmt: skip
    out_ptrs = out_ptr + ((q_token * tl.num_programs(1) + head) * V_DIM)[:, None] + v_dims[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)


def _dims(q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor) -> tuple[int, int, int]:
    """Of a head: of key and query without rotation, with it, and of the value."""
    rope_dim = k_rope.shape[1]
    nope_dim = q.shape[2] - rope_dim
    return nope_dim, rope_dim, kv.shape[2] - nope_dim


def launch(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    num_tokens, num_heads, _ = q.shape
    dims = _dims(q, kv, k_rope)
    if any(dim != next_power_of_2(dim) for dim in dims):
        raise ValueError(
            f"heads of {dims[0]} + {dims[1]} dimensions and values of {dims[2]}: all must be powers of two"
        )
    block_m = max(16, min(128, next_power_of_2(max_query_len)))
    out = torch.empty(num_tokens, num_heads, dims[2], dtype=q.dtype, device=q.device)
    _mla_prefill_kernel[(cdiv(max_query_len, block_m), num_heads, len(query_start_loc) - 1)](
        out, q, kv, k_rope, query_start_loc, kv_start_loc, scale * LOG2_E, q.stride(0), kv.stride(0), k_rope.stride(0),
        NOPE=dims[0], ROPE=dims[1], V_DIM=dims[2], BLOCK_M=block_m, BLOCK_N=64,
        num_warps=8 if block_m == 128 else 4, num_stages=2,
    )  # fmt: skip
    return out


def reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    nope_dim, _, v_dim = _dims(q, kv, k_rope)
    out = torch.zeros(*q.shape[:2], v_dim, dtype=q.dtype, device=q.device)
    for rows, keys in _sequences(query_start_loc, kv_start_loc):
        position = torch.arange(keys.stop - keys.start, device=q.device)
        future = position > position[len(position) - (rows.stop - rows.start) :, None]
        for h in range(q.shape[1]):
            k = torch.cat((kv[keys, h, :nope_dim], k_rope[keys]), dim=-1).double()
            scores = (q[rows, h].double() @ k.t() * scale).masked_fill_(future, float("-inf"))
            out[rows, h] = (torch.softmax(scores, dim=-1) @ kv[keys, h, nope_dim:].double()).to(q.dtype)
    return out


def _sequences(query_start_loc: torch.Tensor, kv_start_loc: torch.Tensor) -> list[tuple[slice, slice]]:
    """(its query tokens, its keys) of each sequence that asks."""
    starts, kv_starts = query_start_loc.tolist(), kv_start_loc.tolist()
    slices = [(slice(starts[i], starts[i + 1]), slice(kv_starts[i], kv_starts[i + 1])) for i in range(len(starts) - 1)]
    return [(rows, keys) for rows, keys in slices if rows.stop > rows.start]


def cpu(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    nope_dim, _, v_dim = _dims(q, kv, k_rope)
    out = torch.empty(*q.shape[:2], v_dim, dtype=q.dtype)
    for rows, keys in _sequences(query_start_loc, kv_start_loc):
        shared = k_rope[keys, None].expand(-1, q.shape[1], -1)
        k = torch.cat((kv[keys, :, :nope_dim], shared), dim=-1).transpose(0, 1)
        n, length = rows.stop - rows.start, keys.stop - keys.start
        mask = None if n == 1 else torch.ones(n, length, dtype=torch.bool).tril_(length - n)
        v = kv[keys, :, nope_dim:].transpose(0, 1)
        attended = F.scaled_dot_product_attention(q[rows].transpose(0, 1), k, v, attn_mask=mask, scale=scale)
        out[rows] = attended.transpose(0, 1)
    return out


def _cost(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> costs.OpCost:
    return costs.mla_prefill_attention(
        query_start_loc.diff().tolist(), kv_start_loc.diff().tolist(), q.shape[1], *_dims(q, kv, k_rope),
        q.element_size(),
    )  # fmt: skip


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float]


def _case(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_heads: int,
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    target: Target | None = None,
) -> Case:
    nope_dim, rope_dim, v_dim = dims

    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        q = draw.normal(sum(query_lens), num_heads, nope_dim + rope_dim)
        kv = draw.normal(sum(seq_lens), num_heads, nope_dim + v_dim)
        latents = draw.normal(sum(seq_lens), 4 * rope_dim)  # the rotary part is their end
        starts = [[sum(lens[:i]) for i in range(len(lens) + 1)] for lens in (query_lens, seq_lens)]
        scale = (nope_dim + rope_dim) ** -0.5
        return (
            q, kv, latents[:, -rope_dim:], draw.integers(starts[0]), draw.integers(starts[1]), max(query_lens), scale
        )  # fmt: skip

    lens = f"query{','.join(map(str, query_lens))} len{','.join(map(str, seq_lens))}"
    name = f"{DTYPE_NAMES[dtype]} heads{num_heads} dim{nope_dim}+{rope_dim},{v_dim} {lens}"
    return Case(name, dtype, build, ("HGMMA",) if max(query_lens) >= 64 else ("HMMA",), target)


FP16, BF16 = torch.float16, torch.bfloat16

SMALL = (
    _case((37,), (37,), 2, (64, 16, 32), FP16),  # a whole prompt
    _case((40, 1, 0, 70), (100, 9, 20, 70), 2, (32, 16, 64), BF16),  # chunks, a single token, nobody
    _case((150,), (300,), 2, (128, 64, 128), BF16),  # two tiles of queries
    _case((5,), (130,), 3, (16, 16, 16), FP16),
)
FULL = (
    _case((8192,), (8192,), 128, (128, 64, 128), BF16, Target(0.70, "gemm")),  # DeepSeek-V3
    _case((2048,), (16384,), 16, (128, 64, 128), BF16, Target(0.70, "gemm")),  # one rank of eight, behind a context
    _case((512, 100), (4096, 1300), 128, (128, 64, 128), BF16),
    _case((5, 3), (900, 80), 128, (128, 64, 128), BF16),
    _case((2048,), (2048,), 16, (128, 64, 128), FP16),
)

LIMIT = (
    "Tensor cores: 128 queries of a head by HGMMA in 8 warps, one block per SM by registers; only diagonal tiles are "
    "masked. Key and value are halves of one row of the up-projection's result, read where it left them."
)

mla_prefill_attention = Op(
    "mla_prefill_attention", reference, launch, cpu, _cost, SMALL, FULL,
    {dtype: TOLERANCE[dtype] for dtype in (FP16, BF16)}, LIMIT,
)  # fmt: skip
