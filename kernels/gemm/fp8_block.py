"""e4m3 activations times e4m3 weights with a scale per block: per token and 128 of k, and per 128x128 of the weights.

    x              [tokens, k] e4m3, rows contiguous; k and n multiples of 16
    weight         [n, k] e4m3
    x_scales       [tokens, k / 128] fp32, in any strides: of a transposed [k / 128, tokens] a tile reads whole sectors
    weight_scales  [n / 128, k / 128] fp32, both rounded up
    out            [tokens, n] bf16

The tensor core sums 128 of k at a time and from zero; each partial sum is scaled and added in fp32 outside it. That is
what the format is for: one scale never spans more than it was chosen for, and the tensor core's own short sums of e4m3
never grow long. Few tokens are the tensor core's narrow side, as in `w8a8`. Knows nothing of models.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import Draw
from kernels.gemm.tile import add_shares, tile_at, widened
from kernels.jit import Value, box, cdiv, constexpr, jit, num_sms, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

SCALE_BLOCK = 128
TURN_UP_TO_TOKENS = 64


@jit
def _block_tiles_kernel(
    out: Value,  # boxes [BLOCK_M, BLOCK_N] of [tokens, n]
    x: Value,  # boxes [BLOCK_M, 128] of [tokens, k]
    weight: Value,  # boxes [BLOCK_N, 128] of [n, k]
    x_scales_ptr: Value,
    weight_scales_ptr: Value,
    num_tokens: Value,
    n: Value,
    num_steps: Value,  # k / 128
    stride_token: Value,
    stride_step: Value,
    NUM_PROGRAMS: constexpr,
    GROUP_M: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,  # at most 128: a tile has one weight scale at a time
) -> None:
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS):
        tile_m, tile_n = tile_at(index, num_m, num_n, GROUP_M)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        x_scale_ptr = x_scales_ptr + tl.minimum(row, num_tokens - 1) * stride_token
        weight_scale_ptr = weight_scales_ptr + (tile_n * BLOCK_N // 128) * num_steps
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(num_steps):
            rows = x.load([tile_m * BLOCK_M, step * 128])
            columns = weight.load([tile_n * BLOCK_N, step * 128])
            scale = tl.load(x_scale_ptr + step * stride_step) * tl.load(weight_scale_ptr + step)
            acc += tl.dot(rows, columns.T) * scale[:, None]
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], acc.to(tl.bfloat16))


@jit
def _block_turned_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x: Value,  # boxes [BLOCK_M, 128]
    weight: Value,  # boxes [BLOCK_N, 128]
    x_scales_ptr: Value,
    weight_scales_ptr: Value,
    num_tokens: Value,
    n: Value,
    num_steps: Value,
    share: Value,  # steps of one program
    stride_token: Value,
    stride_step: Value,
    SPLIT: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_scale_ptr = x_scales_ptr + tl.minimum(row, num_tokens - 1) * stride_token
    weight_scale_ptr = weight_scales_ptr + (tile_n * BLOCK_N // 128) * num_steps
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * share
    for step in range(first, tl.minimum(first + share, num_steps)):
        columns = weight.load([tile_n * BLOCK_N, step * 128])
        rows = x.load([tile_m * BLOCK_M, step * 128])
        scale = tl.load(x_scale_ptr + step * stride_step) * tl.load(weight_scale_ptr + step)
        acc += tl.dot(columns, rows.T) * scale[None, :]
    at = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at += tl.program_id(2).to(tl.int64) * num_tokens * n
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    num_tokens, k = x.shape
    n = weight.shape[0]
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("fp8_block_gemm", m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    boxes = box(x, [block_m, SCALE_BLOCK]), box(weight, [block_n, SCALE_BLOCK])
    num_steps = cdiv(k, SCALE_BLOCK)
    if num_tokens > TURN_UP_TO_TOKENS:
        tiles = cdiv(num_tokens, block_m) * cdiv(n, block_n)
        programs = min(config["programs_per_sm"] * num_sms(x), tiles)
        _block_tiles_kernel[(programs,)](
            box(out, [block_m, block_n]), *boxes, x_scales, weight_scales,
            num_tokens, n, num_steps, x_scales.stride(0), x_scales.stride(1),
            NUM_PROGRAMS=programs, GROUP_M=8, BLOCK_M=block_m, BLOCK_N=block_n, **options,
        )  # fmt: skip
        return out
    share = cdiv(num_steps, config["shares"])
    shares = cdiv(num_steps, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    _block_turned_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, *boxes, x_scales, weight_scales,
        num_tokens, n, num_steps, share, x_scales.stride(0), x_scales.stride(1),
        SPLIT=shares > 1, BLOCK_M=block_m, BLOCK_N=block_n, **options,
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


def scaled(tensor: torch.Tensor, scales: torch.Tensor, rows_per_scale: int) -> torch.Tensor:
    """tensor [rows, k] times its blocks' scales, in the dtype that `tensor` has been widened to."""
    rows, k = tensor.shape
    by_row = scales.to(tensor.dtype).repeat_interleave(rows_per_scale, 0)[:rows]
    return tensor * by_row.repeat_interleave(SCALE_BLOCK, 1)[:, :k]


def reference(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    return (scaled(x.double(), x_scales, 1) @ scaled(weight.double(), weight_scales, SCALE_BLOCK).T).bfloat16()


_CPU_ROWS = 512  # of weights at a time: what is widened is used while it is in the cache


def cpu(x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    wide = scaled(x.float(), x_scales, 1)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    for begin in range(0, weight.shape[0], _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        scales = weight_scales[begin // SCALE_BLOCK : (begin + _CPU_ROWS) // SCALE_BLOCK]
        out[:, rows] = wide @ scaled(widened(weight[rows]), scales, SCALE_BLOCK).T
    return out


def _cost(x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> OpCost:
    num_tokens, k = x.shape
    num_scales = x_scales.numel() + weight_scales.numel()
    return costs.w8a8_gemm(num_tokens, weight.shape[0], k, num_scales, torch.bfloat16.itemsize)


def _case(
    num_tokens: int,
    n: int,
    k: int,
    *,
    transposed: bool = True,
    sass: tuple[str, ...] = ("QGMMA", "UTMALDG"),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = Draw(device, FP8)
        steps = cdiv(k, SCALE_BLOCK)
        shape = (steps, num_tokens) if transposed else (num_tokens, steps)
        x_scales, weight_scales = (
            draw.normal(*size, dtype=torch.float32).abs_().add_(0.1) for size in (shape, (cdiv(n, SCALE_BLOCK), steps))
        )
        x, weight = draw.normal(num_tokens, k), draw.normal(n, k)
        return x, weight, x_scales.T if transposed else x_scales, weight_scales

    return Case(f"fp8 {num_tokens}x{n}x{k}{' scales by row' * (not transposed)}", FP8, build, sass, target)


FP8 = torch.float8_e4m3fn

SMALL = (
    _case(3, 272, 272),
    _case(33, 48, 128, transposed=False),
    _case(1, 144, 2064),
    _case(64, 16, 48),
    _case(150, 272, 144, transposed=False),  # more tiles than one, tails in all three directions
    _case(65, 136 + 8, 256),
)
FULL = (
    _case(1, 2112, 7168),
    _case(16, 24576, 1536),
    _case(64, 7168, 16384, target=Target(0.80, "memory")),
    _case(256, 7168, 16384, sass=("QGMMA", "UTMALDG", "UTMASTG")),
    _case(4096, 7168, 16384, sass=("QGMMA", "UTMALDG", "UTMASTG"), target=Target(900, "TFLOP/s")),
    _case(4096, 2112, 7168, sass=("QGMMA", "UTMALDG", "UTMASTG"), target=Target(600, "TFLOP/s")),
    _case(4096, 4096, 7168, transposed=False, sass=("QGMMA", "UTMALDG", "UTMASTG")),
)

LIMIT = (
    "Up to 64 tokens memory. Above, two accumulators: 128x128 in 8 warps is 64 + 64 registers a thread, 163 in all: "
    "one block per SM, and the additions of a partial sum wait for its product. 128x256 would spill."
)

fp8_block_gemm = Op("fp8_block_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP8: 1e-2}, limit=LIMIT)
