"""A product by two narrow matrices, added to another product's result: out += (x down^T) up^T.

    out   [tokens, n], changed in place
    x     [tokens, k], rows contiguous
    down  [rank, k], up [n, rank], all of 16 bits; rank is at most 256

For what quantization or pruning left over, kept as a low-rank pair (LQER, SVDQuant). Two launches: the first sums over
shares of k, so that few tokens still occupy the device, and writes fp32; the second adds the shares in their order
while it reads them, rounds once, multiplies and adds. Fused in one, every tile of n would do the first product again:
at n 4096 and tiles of 128 that is 32 times. Knows nothing of models.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, num_sms, tl
from kernels.op import Case, Op

_BLOCK_K = 64
_MOST_SHARES = 8  # each program of the second launch reads them all


@jit
def _down_kernel(
    sums_ptr: Value,  # [shares, tokens, RANK] fp32
    x_ptr: Value,
    down_ptr: Value,
    num_tokens: Value,
    k: Value,
    rank: Value,
    share: Value,  # of k for one program
    stride_x: Value,
    RANK: constexpr,  # rank, rounded up to a power of two
    BLOCK_M: constexpr,
    BLOCK_K: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, depth = tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    x_rows = x_ptr + tl.minimum(row, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    down_rows = down_ptr + tl.minimum(column, rank - 1)[:, None] * k
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, k)
    acc = tl.zeros([RANK, BLOCK_M], tl.float32)
    for start in range(first, end, BLOCK_K):
        at = start + depth
        x = tl.load(x_rows + at[:, None], mask=(at < end)[:, None], other=0.0)
        w = tl.load(down_rows + at[None, :], mask=(at < end)[None, :], other=0.0)
        acc = tl.dot(w, x, acc)
    at_out = (tl.program_id(1).to(tl.int64) * num_tokens + row)[None, :] * RANK + column[:, None]
    tl.store(sums_ptr + at_out, acc, mask=(row < num_tokens)[None, :])


@jit
def _up_kernel(
    out_ptr: Value,
    sums_ptr: Value,
    up_ptr: Value,
    num_tokens: Value,
    n: Value,
    rank: Value,
    SHARES: constexpr,
    RANK: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, RANK)
    row_at = tl.minimum(row, num_tokens - 1).to(tl.int64)[None, :] * RANK + depth[:, None]
    narrow = tl.zeros([RANK, BLOCK_M], tl.float32)
    for _ in tl.static_range(SHARES):
        narrow += tl.load(sums_ptr + row_at)
        row_at += num_tokens * RANK
    up = tl.load(
        up_ptr + tl.minimum(column, n - 1)[:, None] * rank + depth[None, :], mask=(depth < rank)[None, :], other=0.0
    )
    acc = tl.dot(up, narrow.to(up_ptr.dtype.element_ty))
    ptrs = out_ptr + row.to(tl.int64)[None, :] * n + column[:, None]
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    num_tokens, k = x.shape
    n, rank = up.shape
    if num_tokens == 0:
        return out
    block_m = 16 if num_tokens <= 16 else 64
    wide = max(16, next_power_of_2(rank))
    num_m = cdiv(num_tokens, block_m)
    share = max(4, cdiv(cdiv(k, _BLOCK_K), min(_MOST_SHARES, cdiv(num_sms(x), num_m)))) * _BLOCK_K
    shares = cdiv(k, share)
    sums = torch.empty(shares, num_tokens, wide, dtype=torch.float32, device=x.device)
    _down_kernel[(num_m, shares)](
        sums, x, down, num_tokens, k, rank, share, x.stride(0),
        RANK=wide, BLOCK_M=block_m, BLOCK_K=_BLOCK_K, num_warps=4, num_stages=4,
    )  # fmt: skip
    block_n = 128
    _up_kernel[(num_m, cdiv(n, block_n))](
        out, sums, up, num_tokens, n, rank,
        SHARES=shares, RANK=wide, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


def reference(out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return out.copy_(out.double() + x.double() @ down.double().T @ up.double().T)


def cpu(out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return out.copy_(out.float() + x.float() @ down.float().T @ up.float().T)


def _cost(out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> OpCost:
    return costs.add_low_rank(x.shape[0], up.shape[0], x.shape[1], up.shape[1], x.element_size())


def _case(
    num_tokens: int, n: int, k: int, rank: int, dtype: torch.dtype, *, row_gap: int = 0, sass: tuple[str, ...] = ()
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, ...]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k + row_gap)[:, :k]
        down, up = draw.normal(rank, k).mul_(k**-0.5), draw.normal(n, rank).mul_(rank**-0.5)
        return draw.normal(num_tokens, n), x, down, up

    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k} rank{rank}"
    return Case(name + " strided" * bool(row_gap), dtype, build, sass)


FP16, BF16 = torch.float16, torch.bfloat16

SMALL = (
    _case(3, 100, 600, 32, BF16),
    _case(17, 40, 272, 24, FP16, row_gap=8),
    _case(1, 130, 80, 8, BF16),
    _case(70, 140, 320, 64, BF16),
)
FULL = (
    _case(1, 28672, 4096, 64, BF16),
    _case(16, 28672, 4096, 64, BF16, sass=("HGMMA", "LDGSTS")),
    _case(16, 4096, 14336, 32, FP16),
    _case(64, 4096, 4096, 128, BF16, sass=("HGMMA", "LDGSTS")),
    _case(4096, 28672, 4096, 64, BF16, sass=("HGMMA", "LDGSTS")),
)

LIMIT = (
    "Latency up to 64 tokens: two launches of a few microseconds; eight programs read down, 64 KB each at k 4096 and "
    "rank 64, and every program of the second launch reads 32 KB of shares from the L2 (16 tokens). Above, memory: out "
    "is read and written once more than an epilogue of the main product would."
)

add_low_rank = Op(
    "add_low_rank", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP16: 2e-3, BF16: 1.6e-2}, limit=LIMIT
)
