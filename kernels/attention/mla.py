"""Decode attention over latents (multi-head latent attention, absorbed): one query token per sequence.

A layer's cache is [block, slot, LATENT + ROPE]: a token has one latent that serves all heads as key and as value, and
a rotary part that is key only. The query comes with the key's up-projection already in it, and the result is a latent
per head that the value's up-projection makes an output of. A program takes one sequence, one tile of heads and one
share of the keys; it loads a latent once and uses it twice. Batch-invariant mode as in decode_attention. Knows nothing
of projections.
"""

from __future__ import annotations

import torch

from costs import ops as costs
from kernels.attention.split import combine, plan_splits, shares
from kernels.attention.tile import LOG2_E
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import TOLERANCE, Case, Op, Target


@jit
def _mla_decode_kernel(
    out_ptr: Value,  # [batch, heads, splits, LATENT]
    lse_ptr: Value,  # [batch, heads, splits] fp32, or None: there is one split
    q_ptr: Value,  # [batch, heads, LATENT + ROPE]
    latent_ptr: Value,
    table_ptr: Value,
    seq_lens_ptr: Value,
    score_scale: Value,
    stride_q: Value,
    stride_block: Value,
    stride_table: Value,
    HEADS: constexpr,
    LATENT: constexpr,
    ROPE: constexpr,
    BLOCK_SIZE: constexpr,
    SPLIT_KEYS: constexpr,
    BLOCK_H: constexpr,
    BLOCK_N: constexpr,
) -> None:
    # Tiles of heads of one sequence run side by side: they read the same latents, the second time from L2.
    seq, split, num_splits = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    length = tl.load(seq_lens_ptr + seq)
    _, origin, share = shares(length, 0, num_splits, SPLIT_KEYS, False, BLOCK_N)
    begin = origin + split * share
    end = tl.minimum(begin + share, length)

    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane, dims, rope_dims = tl.arange(0, BLOCK_N), tl.arange(0, LATENT), tl.arange(0, ROPE)
    is_head = head < HEADS
    q_row = q_ptr + seq * stride_q + head[:, None] * (LATENT + ROPE)
    q = tl.load(q_row + dims[None, :], mask=is_head[:, None], other=0.0)
    q_rope = tl.load(q_row + LATENT + rope_dims[None, :], mask=is_head[:, None], other=0.0)
    acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    row_ptr = table_ptr + seq * stride_table
    for start in range(begin, end, BLOCK_N):
        keys = start + lane
        in_reach = keys < end
        if BLOCK_SIZE % BLOCK_N == 0:  # the whole tile lies in one block
            block = tl.load(row_ptr + start // BLOCK_SIZE).to(tl.int64)
            rows = block * stride_block + (start % BLOCK_SIZE + lane) * (LATENT + ROPE)
        else:
            blocks = tl.load(row_ptr + keys // BLOCK_SIZE, mask=in_reach, other=0).to(tl.int64)
            rows = blocks * stride_block + (keys % BLOCK_SIZE) * (LATENT + ROPE)
        latent = tl.load(latent_ptr + rows[:, None] + dims[None, :], mask=in_reach[:, None], other=0.0)
        rope_ptrs = latent_ptr + LATENT + rows[None, :] + rope_dims[:, None]
        k_rope = tl.load(rope_ptrs, mask=in_reach[None, :], other=0.0)
        scores = tl.dot(q_rope, k_rope, tl.dot(q, tl.trans(latent))) * score_scale
        scores = tl.where(in_reach[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * decay[:, None])
        peak = new_peak

    slot = (seq * HEADS + head) * num_splits + split
    total = tl.where(total > 0, total, 1.0)
    out = acc / total[:, None]
    out_ptrs = out_ptr + slot[:, None] * LATENT + dims[None, :]
    if lse_ptr is None:
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
    else:
        tl.store(out_ptrs, out, mask=(is_head & (begin < end))[:, None])
        tl.store(lse_ptr + slot, peak + tl.log2(total), mask=is_head & (begin < end))


def _config(num_heads: int) -> tuple[int, int, int, int]:
    """(heads and keys of a tile, warps, programs per SM). Up to 32 heads the latents' way here is the cost."""
    if num_heads <= 32:
        return max(16, next_power_of_2(num_heads)), 32, 4, 2
    return 64, 64, 8, 1


def launch(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    rope_dim: int,
    batch_invariant: bool = False,
) -> torch.Tensor:
    batch, num_heads, width = q.shape
    block_size, latent_dim = latent_cache.shape[1], width - rope_dim
    if latent_dim != next_power_of_2(latent_dim) or rope_dim != next_power_of_2(rope_dim):
        raise ValueError(f"latents of {latent_dim} + {rope_dim} dimensions: both must be powers of two")
    block_h, block_n, num_warps, programs_per_sm = _config(num_heads)
    num_tiles = cdiv(num_heads, block_h)
    most_keys = block_table.shape[1] * block_size
    split = plan_splits(q, programs_per_sm, batch * num_tiles, most_keys, 0, block_n, batch_invariant)
    out = torch.empty(batch, num_heads, latent_dim, dtype=q.dtype, device=q.device)
    parts, lse = split.empty_parts(out)
    _mla_decode_kernel[(num_tiles, batch, split.num_splits)](
        parts, lse, q, latent_cache, block_table, seq_lens, scale * LOG2_E,
        q.stride(0), latent_cache.stride(0), block_table.stride(0),
        HEADS=num_heads, LATENT=latent_dim, ROPE=rope_dim, BLOCK_SIZE=block_size, SPLIT_KEYS=split.split_keys,
        BLOCK_H=block_h, BLOCK_N=block_n, num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    if lse is not None:
        combine(out, parts, lse, seq_lens, split, 0, block_n)
    return out


def gather_latents(latent_cache: torch.Tensor, table_row: torch.Tensor, length: int) -> torch.Tensor:
    """One sequence's [length, width]."""
    blocks = latent_cache[table_row[: cdiv(length, latent_cache.shape[1])].long()]
    return blocks.flatten(0, 1)[:length]


def reference(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    rope_dim: int,
    batch_invariant: bool = False,
) -> torch.Tensor:
    latent_dim = q.shape[2] - rope_dim
    out = torch.zeros_like(q[:, :, :latent_dim], memory_format=torch.contiguous_format)
    for i, length in enumerate(seq_lens.tolist()):
        if length:
            keys = gather_latents(latent_cache, block_table[i], length).double()
            weights = torch.softmax(torch.einsum("hd,kd->hk", q[i].double(), keys) * scale, dim=-1)
            out[i] = torch.einsum("hk,kd->hd", weights, keys[:, :latent_dim])
    return out


def cpu(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    rope_dim: int,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """A sequence at a time: its products have shapes of its own, so that the batch has no part in its bits anyway."""
    latent_dim = q.shape[2] - rope_dim
    out = torch.zeros(*q.shape[:2], latent_dim, dtype=q.dtype)
    for i, length in enumerate(seq_lens.tolist()):
        if length:
            keys = gather_latents(latent_cache, block_table[i], length).float()
            rows = q[i].float().contiguous()
            weights = torch.softmax(torch.mm(rows, keys.t()).mul_(scale), dim=-1)
            out[i] = torch.mm(weights, keys[:, :latent_dim])
    return out


def _cost(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    rope_dim: int,
    batch_invariant: bool = False,
) -> costs.OpCost:
    _, num_heads, width = q.shape
    return costs.mla_decode_attention(seq_lens.tolist(), num_heads, width - rope_dim, rope_dim, q.element_size())


_Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, int, bool]


def _case(
    seq_lens: tuple[int, ...],
    num_heads: int,
    dims: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    batch_invariant: bool = False,
    target: Target | None = None,
) -> Case:
    latent_dim, rope_dim = dims
    # A cache of one head of width W has [block, 1, 2, slot, W / 2]: drawn so, its poison lies where it should.
    shape = PagedShape(seq_lens, num_heads, 1, latent_dim + rope_dim, block_size)

    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        q = draw.normal(len(seq_lens), num_heads, latent_dim + rope_dim)
        kv_cache, block_table, lengths = draw.paged_cache(shape)
        latents = kv_cache[:, 0, 0]  # half of a cache of keys and values: blocks lie further apart than they are long
        return q, latents, block_table, lengths, shape.head_dim**-0.5, rope_dim, batch_invariant

    name = f"{shape.name(dtype).replace('-1 dim', ' dim')} rope{rope_dim}" + " invariant" * batch_invariant
    sass = ("HGMMA",) if num_heads > 32 else ("HMMA",)
    return Case(name, dtype, build, sass, target)


FP16, BF16 = torch.float16, torch.bfloat16

SMALL = (
    _case((100, 3, 0), 4, (64, 16), 16, FP16),
    _case((33, 170), 16, (128, 64), 64, BF16),
    _case((150,), 40, (64, 32), 16, FP16),  # tiles of 64 heads, the last not full
    _case((70, 64), 128, (64, 16), 64, BF16),
    _case((1100,), 20, (32, 16), 64, FP16, batch_invariant=True),
)
FULL = (
    # DeepSeek-V3: all heads, and those of one rank of eight
    _case((4096,) * 64, 128, (512, 64), 64, BF16, target=Target(0.65, "gemm")),
    _case((4096,) * 64, 16, (512, 64), 64, BF16, target=Target(0.85, "memory")),
    _case((16384,) * 4, 128, (512, 64), 64, BF16),
    _case((32768,), 16, (512, 64), 64, BF16),
    _case((200, 3000, 47, 9000), 128, (512, 64), 16, BF16),
    _case((4096,) * 64, 128, (512, 64), 64, BF16, batch_invariant=True),
    _case((4096,) * 64, 16, (512, 64), 64, FP16),
)

LIMIT = (
    "128 heads: tensor cores, by registers: 64 heads x 512 fp32 of output take 128 of a thread's 255 in 8 warps, one "
    "block per SM (221 KB), so softmax overlaps no product; 32 keys a tile take 147 KB and 223 registers and still fit "
    "once. 16 heads: memory; 32 keys and 4 warps keep two blocks, 56 KB in flight."
)

mla_decode_attention = Op(
    "mla_decode_attention", reference, launch, cpu, _cost, SMALL, FULL,
    {dtype: TOLERANCE[dtype] for dtype in (FP16, BF16)}, LIMIT,
)  # fmt: skip
