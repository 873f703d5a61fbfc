"""8-bit activations times 8-bit weights, a scale per token and a scale per output channel: e4m3 floats, or integers.

    x              [tokens, k] e4m3 or int8, rows contiguous
    weight         [n, k] of the same type
    x_scales       [tokens] fp32
    weight_scales  [n] fp32
    out            [tokens, n] bf16

k and n are multiples of 16: rows are copied in boxes by the copy engine, which needs them aligned. Boxes that reach
over an edge are filled with zeros there, so no loop has a mask. A large batch runs on as many programs as there are
SMs, each of which goes through output tiles; up to 64 tokens the product is turned over (out^T = W x^T), so that the
tokens are the tensor core's narrow side, and k may be cut into shares. Knows nothing of models or of how scales are
chosen.
"""

from __future__ import annotations

from typing import Literal

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.tile import add_shares, tile_at, widened
from kernels.jit import Value, box, cdiv, constexpr, jit, num_sms, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

TURN_UP_TO_TOKENS = 64


@jit
def _tiles_kernel(
    out: Value,  # boxes [BLOCK_M, BLOCK_N] of [tokens, n]
    x: Value,  # boxes [BLOCK_M, BLOCK_K] of [tokens, k]
    weight: Value,  # boxes [BLOCK_N, BLOCK_K] of [n, k]
    x_scales_ptr: Value,
    weight_scales_ptr: Value,
    num_tokens: Value,
    n: Value,
    k: Value,
    ACC: constexpr,
    NUM_PROGRAMS: constexpr,
    GROUP_M: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
) -> None:
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(n, BLOCK_N)
    num_steps = tl.cdiv(k, BLOCK_K)
    for index in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS, flatten=True):
        tile_m, tile_n = tile_at(index, num_m, num_n, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for step in range(num_steps):
            rows = x.load([tile_m * BLOCK_M, step * BLOCK_K])
            columns = weight.load([tile_n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(rows, columns.T, acc, out_dtype=ACC)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        x_scale = tl.load(x_scales_ptr + row, mask=row < num_tokens, other=0.0)
        weight_scale = tl.load(weight_scales_ptr + column, mask=column < n, other=0.0)
        scaled = acc.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], scaled.to(tl.bfloat16))


@jit
def _turned_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x: Value,  # boxes [BLOCK_M, BLOCK_K]
    weight: Value,  # boxes [BLOCK_N, BLOCK_K]
    x_scales_ptr: Value,
    weight_scales_ptr: Value,
    num_tokens: Value,
    n: Value,
    num_steps: Value,
    share: Value,  # steps of one program
    ACC: constexpr,
    SPLIT: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
) -> None:
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    first = tl.program_id(2) * share
    for step in range(first, tl.minimum(first + share, num_steps)):
        columns = weight.load([tile_n * BLOCK_N, step * BLOCK_K])
        rows = x.load([tile_m * BLOCK_M, step * BLOCK_K])
        acc = tl.dot(columns, rows.T, acc, out_dtype=ACC)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_scale = tl.load(x_scales_ptr + row, mask=row < num_tokens, other=0.0)
    weight_scale = tl.load(weight_scales_ptr + column, mask=column < n, other=0.0)
    scaled = acc.to(tl.float32) * x_scale[None, :] * weight_scale[:, None]
    at = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at += tl.program_id(2).to(tl.int64) * num_tokens * n
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    tl.store(out_ptr + at, scaled.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor, table: str
) -> torch.Tensor:
    num_tokens, k = x.shape
    n = weight.shape[0]
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=x.device)
    if num_tokens == 0:
        return out
    accumulator = tl.int32 if x.dtype == torch.int8 else tl.float32
    config = config_for(table, m=num_tokens, n=n, k=k)
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    boxes = box(x, [block_m, block_k]), box(weight, [block_n, block_k])
    if num_tokens > TURN_UP_TO_TOKENS:
        programs = min(num_sms(x), cdiv(num_tokens, block_m) * cdiv(n, block_n))
        _tiles_kernel[(programs,)](
            box(out, [block_m, block_n]), *boxes, x_scales, weight_scales, num_tokens, n, k,
            ACC=accumulator, NUM_PROGRAMS=programs, GROUP_M=8,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **options,
        )  # fmt: skip
        return out
    num_steps = cdiv(k, block_k)
    share = cdiv(num_steps, config["shares"])
    shares = cdiv(num_steps, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    _turned_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, *boxes, x_scales, weight_scales, num_tokens, n, num_steps, share,
        ACC=accumulator, SPLIT=shares > 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, **options,
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


def launch_fp8(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    return _launch(x, weight, x_scales, weight_scales, "fp8_gemm")


def launch_int8(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    return _launch(x, weight, x_scales, weight_scales, "int8_gemm")


def reference(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    product = x.double() @ weight.double().T
    return (product * x_scales.double()[:, None] * weight_scales.double()).to(torch.bfloat16)


_CPU_ROWS = 512  # of weights at a time: what is widened is used while it is in the cache


def cpu(x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    """Through fp32, integers too: torch's product of int8 matrices takes ten times as long without VNNI."""
    wide = x.float().mul_(x_scales[:, None])
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    for begin in range(0, weight.shape[0], _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        out[:, rows] = (wide @ widened(weight[rows]).T).mul_(weight_scales[rows])
    return out


def _cost(x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> OpCost:
    num_tokens, k = x.shape
    n = weight.shape[0]
    unit: Literal["fp8", "int8"] = "int8" if x.dtype == torch.int8 else "fp8"
    return costs.w8a8_gemm(num_tokens, n, k, num_tokens + n, torch.bfloat16.itemsize, unit)


def _case(
    num_tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = Draw(device, dtype)
        if dtype == torch.int8:
            x, weight = draw.bits(num_tokens, k, dtype=dtype), draw.bits(n, k, dtype=dtype)
        else:
            x, weight = draw.normal(num_tokens, k), draw.normal(n, k)
        x_scales, weight_scales = (draw.normal(size, dtype=torch.float32).abs_().add_(0.1) for size in (num_tokens, n))
        return x, weight, x_scales, weight_scales

    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k}", dtype, build, sass, target)


FP8, INT8 = torch.float8_e4m3fn, torch.int8

SMALL = (
    _case(3, 112, 272, FP8),
    _case(33, 48, 128, FP8),
    _case(1, 16, 2064, FP8),
    _case(64, 144, 48, FP8),
    _case(150, 272, 144, FP8),  # more tiles than one, tails in all three directions
    _case(65, 16, 16, FP8),
)
SMALL_INT8 = tuple(
    _case(m, n, k, INT8) for m, n, k in ((3, 112, 272), (33, 48, 128), (1, 16, 2064), (150, 272, 144), (130, 16, 16))
)

_QGMMA, _IGMMA = ("QGMMA", "UTMALDG"), ("IGMMA", "UTMALDG")
FULL = (
    _case(1, 28672, 4096, FP8, _QGMMA),
    _case(16, 28672, 4096, FP8, _QGMMA, Target(0.88, "memory")),
    _case(64, 28672, 4096, FP8, _QGMMA),
    _case(16, 4096, 14336, FP8, _QGMMA),
    _case(256, 6144, 4096, FP8, (*_QGMMA, "UTMASTG")),
    _case(4096, 28672, 4096, FP8, (*_QGMMA, "UTMASTG"), Target(0.97, "peer")),
    _case(4096, 4096, 14336, FP8, (*_QGMMA, "UTMASTG")),
)
FULL_INT8 = (
    _case(16, 28672, 4096, INT8, _IGMMA, Target(0.88, "memory")),
    _case(64, 4096, 14336, INT8, _IGMMA),
    _case(256, 6144, 4096, INT8, (*_IGMMA, "UTMASTG")),
    _case(4096, 28672, 4096, INT8, (*_IGMMA, "UTMASTG"), Target(0.95, "peer")),
)

LIMIT = (
    "Up to 64 tokens memory: weights come in boxes of 16 KB, several in flight. Above, the tensor cores: tiles of "
    "128x256, three stages, one block per SM; sums are kept as the tensor core makes them, without promotion."
)
LIMIT_INT8 = (
    "Up to 64 tokens memory, as fp8_gemm. Above, the tensor cores: 128x256 in 32-bit integers, exact; while a "
    "tile's sums are converted its SM multiplies nothing."
)

fp8_gemm = Op("fp8_gemm", reference, launch_fp8, cpu, _cost, SMALL, FULL, tolerance={FP8: 1.6e-2}, limit=LIMIT)
int8_gemm = Op(
    "int8_gemm", reference, launch_int8, cpu, _cost, SMALL_INT8, FULL_INT8,
    tolerance={INT8: 5e-3}, limit=LIMIT_INT8,
)  # fmt: skip
