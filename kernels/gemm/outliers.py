"""Rows with a few large inputs, for a product in 8 bits (LLM.int8, arXiv:2208.07339): those are multiplied unrounded.

    split_outliers(x, threshold) -> (values int8 [tokens, k], scales fp32 [tokens, 1], flags uint8 [tokens, k / 32])
        values are x rounded by a scale per row, with zeros in place of inputs whose magnitude reaches the threshold;
        flags say which stretches of 32 inputs had any, the last stretch perhaps a short one
    add_outliers(out, x, flags, weight, weight_scales, threshold) -> out [tokens, n] bf16, changed in place:
        plus the product of x, zero but for the large inputs, and weight int8 [n, k], scaled per output

Which inputs are large is known on the device alone and changes with every batch. So the launches follow shapes, and a
program of the second kernel visits only the stretches that have a flag in one of its rows: of the weights it reads what
it needs, and where there is no flag it ends at once. A list of columns that was fixed at load time would miss what a
threshold means; gathering columns on the host would wait for the device. Knows nothing of models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import gemm as costs
from costs.ops import OpCost, quantised
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op
from kernels.quantise import quantise, store_row

STRETCH = 32


@jit
def _split_kernel(
    values_ptr: Value,
    scales_ptr: Value,
    flags_ptr: Value,
    x_ptr: Value,
    k: Value,
    stride_x: Value,
    threshold: Value,
    BLOCK: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + column, mask=column < k, other=0.0).to(tl.float32)
    is_large = tl.abs(x) >= threshold
    store_row(values_ptr + row * k, scales_ptr + row, tl.where(is_large, 0.0, x), k, BLOCK, False, True)
    flags = tl.max(tl.reshape(is_large.to(tl.int32), (BLOCK // 32, 32)), 1)
    stretch = tl.arange(0, BLOCK // 32)
    num_stretches = tl.cdiv(k, 32)
    tl.store(flags_ptr + row * num_stretches + stretch, flags.to(tl.uint8), mask=stretch < num_stretches)


@jit
def _add_kernel(
    out_ptr: Value,
    x_ptr: Value,
    flags_ptr: Value,
    weight_ptr: Value,
    weight_scales_ptr: Value,
    num_tokens: Value,
    n: Value,
    k: Value,
    stride_x: Value,
    threshold: Value,
    STRETCHES: constexpr,  # k / 32, rounded up to a power of two
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    stretch, depth = tl.arange(0, STRETCHES), tl.arange(0, 32)
    num_stretches = tl.cdiv(k, 32)
    flagged = tl.zeros([STRETCHES], tl.int32)
    for first in tl.static_range(0, BLOCK_M, 8):
        some = tl.program_id(0) * BLOCK_M + first + tl.arange(0, 8)
        mask = (some < num_tokens)[:, None] & (stretch < num_stretches)[None, :]
        flags = tl.load(flags_ptr + some.to(tl.int64)[:, None] * num_stretches + stretch[None, :], mask=mask, other=0)
        flagged = tl.maximum(flagged, tl.max(flags.to(tl.int32), 0))
    waiting = tl.where(flagged > 0, stretch, STRETCHES)
    step = tl.min(waiting, 0)
    if step == STRETCHES:
        return
    x_rows = x_ptr + row.to(tl.int64)[None, :] * stride_x
    w_rows = weight_ptr + tl.minimum(column, n - 1).to(tl.int64)[:, None] * k
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    while step < STRETCHES:
        at = step * 32 + depth
        x = tl.load(x_rows + at[:, None], mask=(at < k)[:, None] & (row < num_tokens)[None, :], other=0.0)
        x = tl.where(tl.abs(x.to(tl.float32)) >= threshold, x, 0.0).to(x_ptr.dtype.element_ty)
        w = tl.load(w_rows + at[None, :], mask=(at < k)[None, :], other=0)
        acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc)
        step = tl.min(tl.where(waiting > step, waiting, STRETCHES), 0)
    is_column = column < n
    acc *= tl.load(weight_scales_ptr + column, mask=is_column, other=0.0)[:, None]
    ptrs = out_ptr + row.to(tl.int64)[None, :] * n + column[:, None]
    mask = is_column[:, None] & (row < num_tokens)[None, :]
    acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_split(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, k = x.shape
    values = torch.empty(num_tokens, k, dtype=torch.int8, device=x.device)
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    flags = torch.empty(num_tokens, cdiv(k, STRETCH), dtype=torch.uint8, device=x.device)
    if num_tokens:
        block = max(STRETCH, next_power_of_2(k))
        _split_kernel[(num_tokens,)](
            values, scales, flags, x, k, x.stride(0), threshold, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return values, scales, flags


def launch_add(
    out: torch.Tensor,
    x: torch.Tensor,
    flags: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    num_tokens, k = x.shape
    n = weight.shape[0]
    if num_tokens:
        block_m, block_n = (16, 128) if num_tokens <= 64 else (64, 128)
        _add_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n))](
            out, x, flags, weight, weight_scales, num_tokens, n, k, x.stride(0), threshold,
            STRETCHES=next_power_of_2(flags.shape[1]), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return out


def _split(x: torch.Tensor, threshold: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    is_large = x.abs() >= threshold
    values, scales = quantise(x.to(dtype).masked_fill(is_large, 0.0), "int8")
    padded = F.pad(is_large, (0, -x.shape[1] % STRETCH))
    return values, scales, padded.unflatten(1, (-1, STRETCH)).any(-1).to(torch.uint8)


def reference_split(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _split(x, threshold, torch.float64)


def cpu_split(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _split(x, threshold, torch.float32)


def reference_add(
    out: torch.Tensor,
    x: torch.Tensor,
    flags: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    few = x.double().masked_fill(x.abs() < threshold, 0.0)
    return out.copy_(out.double() + few @ weight.double().T * weight_scales.double())


def cpu_add(
    out: torch.Tensor,
    x: torch.Tensor,
    flags: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """The columns that have an outlier are few."""
    is_large = x.abs() >= threshold
    columns = is_large.any(0).nonzero().squeeze(-1)
    few = x[:, columns].float().masked_fill(~is_large[:, columns], 0.0)
    product = few @ weight[:, columns].float().T
    return out.copy_(out.float() + product * weight_scales)


def _cost_split(x: torch.Tensor, threshold: float) -> OpCost:
    plain = OpCost(2 * x.nbytes, 2 * x.numel())
    cost = quantised(plain, x.numel(), x.element_size(), x.shape[0])
    return OpCost(cost.memory_bytes + x.shape[0] * cdiv(x.shape[1], STRETCH), cost.flops)


def _cost_add(
    out: torch.Tensor,
    x: torch.Tensor,
    flags: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    threshold: float,
) -> OpCost:
    return costs.add_outliers(x.shape[0], weight.shape[0], int(flags.any(0).sum()) * STRETCH, flags.numel())


THRESHOLD = 6.0


def _draw_x(draw: Draw, num_tokens: int, k: int, every: int, gap: int = 0) -> torch.Tensor:
    """Columns 5, 5 + every, .. are large in every second row; 0: none are."""
    x = draw.normal(num_tokens, k + gap)[:, :k].clamp_(-5.0, 5.0)
    if every:
        x[::2, 5::every].mul_(20.0)
    return x


def _split_case(num_tokens: int, k: int, dtype: torch.dtype, *, gap: int = 0, full: bool = False) -> Case:
    def build(device: str) -> tuple[torch.Tensor, float]:
        return _draw_x(Draw(device, dtype), num_tokens, k, 509, gap), THRESHOLD

    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{k}", dtype, build, ("LDG.E.128",) if full else ())


def _add_case(
    num_tokens: int, n: int, k: int, dtype: torch.dtype, *, every: int = 509, sass: tuple[str, ...] = ()
) -> Case:
    def build(device: str) -> tuple[torch.Tensor | float, ...]:
        draw = Draw(device, dtype)
        x = _draw_x(draw, num_tokens, k, every)
        flags = cpu_split(x, THRESHOLD)[2]
        out = draw.normal(num_tokens, n, dtype=BF16)
        weight = draw.bits(n, k, dtype=torch.int8)
        return out, x, flags, weight, draw.normal(n, dtype=torch.float32).abs_().mul_(0.01), THRESHOLD

    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k} " + (f"every {every}" if every else "without")
    return Case(name, dtype, build, sass)


FP16, BF16 = torch.float16, torch.bfloat16

SMALL_SPLIT = (_split_case(3, 700, BF16), _split_case(2, 48, FP16), _split_case(5, 1100, BF16, gap=4))
FULL_SPLIT = tuple(
    _split_case(m, k, d, full=True) for m, k, d in ((16, 4096, BF16), (16, 14336, FP16), (4096, 4096, BF16))
)
SMALL_ADD = (
    _add_case(3, 48, 272, BF16, every=100),
    _add_case(20, 140, 64, FP16, every=7),
    _add_case(2, 16, 96, BF16, every=0),
    _add_case(70, 20, 144, BF16, every=90),
)
FULL_ADD = (
    _add_case(1, 28672, 4096, BF16),
    _add_case(16, 28672, 4096, FP16),
    _add_case(16, 4096, 14336, BF16),
    _add_case(4096, 28672, 4096, BF16, sass=("HGMMA",)),
)

LIMIT_SPLIT = "Memory: a row is read and written once, by one program, which holds it in registers."
LIMIT_ADD = (
    "Latency: a program reads its rows' flags, then one stretch of 32 inputs after the other, with no copies in flight."
    " Outliers are systematic: about ten stretches of 128 have any, whatever the batch."
)

split_outliers = Op(
    "split_outliers", reference_split, launch_split, cpu_split, _cost_split, SMALL_SPLIT, FULL_SPLIT,
    tolerance={FP16: 1e-2, BF16: 1e-2}, limit=LIMIT_SPLIT,
)  # fmt: skip
add_outliers = Op(
    "add_outliers", reference_add, launch_add, cpu_add, _cost_add, SMALL_ADD, FULL_ADD,
    tolerance={FP16: 5e-3, BF16: 5e-3}, limit=LIMIT_ADD,
)  # fmt: skip
