"""A linear layer whose rows do not depend on their batch: the same row gives the same bits, whatever stands around it.

The sum over k is cut into shares by the weight's shape alone. Each share is a chain of equal tensor-core steps from
zero, in the order of k, and shares are added in order, in fp32. A small batch gives every share a program of its own
and adds them up in a second kernel, so that decoding fills the device; a large one does the same additions inside one
program. Both use the same instruction on 64 rows at a time. On the CPU every call to BLAS has one shape, 16 rows,
because BLAS chooses its method by shape. Knows nothing of models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op

CPU_ROWS = 16  # of every BLAS call
SPLIT_UP_TO_TOKENS = 128  # above it there are programs enough without splitting

# Shares of k. Constants, not the device's, so that two workers cut a sum alike.
_PROGRAMS_WANTED = 132
_MAX_SHARES = 4  # more would write and read as many bytes of partial sums at 64 rows as there are weights
_MIN_SHARE = 512


@jit
def _linear_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [SHARES, tokens, n] where SPLIT
    x_ptr: Value,  # [tokens, k]
    weight_ptr: Value,  # [n, k]
    bias_ptr: Value,  # [n], read only where HAS_BIAS
    num_tokens: Value,
    n: Value,
    k: Value,
    share: Value,  # of k, a multiple of BLOCK_K; the last may be smaller
    stride_x: Value,
    stride_w: Value,
    SHARES: constexpr,
    SPLIT: constexpr,  # each share in a program of its own
    EVEN_K: constexpr,  # every share is a whole number of tiles
    HAS_BIAS: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows behind the end read the last one again: that needs no mask in the loop, and they are not stored.
    x_rows = x_ptr + tl.minimum(row, num_tokens - 1).to(tl.int64)[:, None] * stride_x
    w_rows = weight_ptr + tl.minimum(column, n - 1).to(tl.int64)[None, :] * stride_w
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else SHARES
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(first, last):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(index * share, tl.minimum((index + 1) * share, k), BLOCK_K):
            at = start + depth
            if EVEN_K:
                x = tl.load(x_rows + at[None, :])
                w = tl.load(w_rows + at[:, None])
            else:
                x = tl.load(x_rows + at[None, :], mask=at[None, :] < k, other=0.0)
                w = tl.load(w_rows + at[:, None], mask=at[:, None] < k, other=0.0)
            part = tl.dot(x, w, part, input_precision="ieee")
        total += part
    mask = (row < num_tokens)[:, None] & (column < n)[None, :]
    at_out = row.to(tl.int64)[:, None] * n + column[None, :]
    if SPLIT:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * num_tokens * n + at_out, total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + at_out, total.to(out_ptr.dtype.element_ty), mask=mask)


def num_shares(n: int, k: int, block_n: int) -> int:
    """A power of two, from the weight's shape alone."""
    most = max(1, min(_PROGRAMS_WANTED // cdiv(n, block_n), k // _MIN_SHARE, _MAX_SHARES))
    return 1 << (most.bit_length() - 1)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_tokens, k = x.shape
    n = weight.shape[0]
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    # fp32 has no tensor cores that keep its precision: small tiles, multiply-adds.
    is_wide = x.element_size() == 4
    block_n, block_k = (64, 32) if is_wide else (128, 64)
    shares = num_shares(n, k, block_n)
    split = shares > 1 and num_tokens <= SPLIT_UP_TO_TOKENS
    block_m = 32 if is_wide else 64 if num_tokens <= SPLIT_UP_TO_TOKENS else 128
    share = cdiv(cdiv(k, shares), block_k) * block_k
    sums = torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device) if split else out
    _linear_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares if split else 1)](
        sums, x, weight, x if bias is None else bias, num_tokens, n, k, share, x.stride(0), weight.stride(0),
        SHARES=shares, SPLIT=split, EVEN_K=k % block_k == 0, HAS_BIAS=bias is not None and not split,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=8 if block_m == 128 else 4, num_stages=4,
    )  # fmt: skip
    if split:
        add_shares(out, sums, bias)
    return out


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_tokens, k = x.shape
    # A copy even where nothing is missing: every call sees the same strides, at the same alignment.
    rows = torch.zeros(cdiv(num_tokens, CPU_ROWS) * CPU_ROWS, cdiv(k, 32) * 32, dtype=x.dtype)[:, :k]
    rows[:num_tokens] = x
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype)
    for start in range(0, rows.shape[0], CPU_ROWS):
        out[start : start + CPU_ROWS] = F.linear(rows[start : start + CPU_ROWS], weight, bias)
    return out[:num_tokens]


def _cost(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> OpCost:
    return costs.linear(x.shape[0], weight.shape[0], weight.shape[1], x.element_size())


def _case(
    num_tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    row_gap: int = 0,
    sass: tuple[str, ...] = (),
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k + row_gap)[:, :k]
        return x, draw.normal(n, k), draw.normal(n) if has_bias else None

    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k}{' bias' * has_bias}{' strided' * bool(row_gap)}"
    return Case(name, dtype, build, sass)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
_SASS = ("HGMMA", "LDGSTS")

SMALL = (
    _case(3, 100, 96, FP32),
    _case(17, 70, 130, BF16, has_bias=True),
    _case(1, 130, 77, FP16),
    _case(130, 136, 100, BF16, row_gap=28),  # two tiles of rows, each with a tail
    _case(5, 40, 2048, BF16, has_bias=True),  # four shares, a program each
    _case(129, 33, 1100, FP16, has_bias=True),  # two shares in one program, the second smaller
    _case(2, 33, 1060, FP32, has_bias=True),
    _case(131, 20, 64, FP32, row_gap=4),
)
FULL = (
    _case(64, 4096, 4096, FP32),
    _case(64, 6144, 4096, FP16, sass=_SASS),
    _case(1, 4096, 14336, BF16, sass=_SASS),
    _case(16, 28672, 4096, BF16, sass=_SASS),
    _case(64, 6144, 4096, BF16, has_bias=True, sass=_SASS),
    _case(16, 128256, 4096, BF16, sass=_SASS),
    _case(256, 4096, 4096, BF16, sass=_SASS),
    _case(4096, 28672, 4096, BF16, sass=_SASS),
)

LIMIT = (
    "The promise, not the machine: tiles and shares may not follow the batch, so one row is computed as 64. Memory "
    "still bounds decoding (64 rows are 64 flops a byte; two blocks per SM); tiles of 128x128 bound a large batch."
)

fixed_order_linear = Op("fixed_order_linear", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
