"""RMSNorm, alone and fused with the addition of the residual stream.

x * rsqrt(mean(x^2) + eps) * weight, computed in fp32 and rounded once. With a residual, the sum is rounded to the
model's dtype first, because that rounded sum is what the next layer adds to. One program per row. Knows nothing of
models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op


@jit
def _norm_kernel(
    out_ptr: Value,  # [tokens, HIDDEN]
    sum_ptr: Value,  # [tokens, HIDDEN], the new residual; not written when there is none
    x_ptr: Value,
    residual_ptr: Value,
    weight_ptr: Value,
    stride_x: Value,
    stride_residual: Value,
    eps: Value,
    HIDDEN: constexpr,
    BLOCK: constexpr,
    HAS_RESIDUAL: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    x = tl.load(x_ptr + token * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + token * stride_residual + column, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * HIDDEN + column, rounded, mask=mask)
        x = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, (x * factor * weight).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, hidden = x.shape
    out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
    total, addend = out, x
    if residual is not None:
        total, addend = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device), residual
    block = next_power_of_2(hidden)
    _norm_kernel[(num_tokens,)](
        out, total, x, addend, weight, x.stride(0), addend.stride(0), eps,
        HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out, total


def launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, eps)[0]


def launch_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, eps)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


def reference_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x.double() + residual.double()).to(x.dtype)
    return reference(total, weight, eps), total


def cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def cpu_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def _cost(x: torch.Tensor, weight: torch.Tensor, eps: float) -> costs.OpCost:
    return costs.rms_norm(x.shape[0], x.shape[1], x.element_size())


def _cost_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> costs.OpCost:
    return costs.add_rms_norm(x.shape[0], x.shape[1], x.element_size())


def _case(num_tokens: int, hidden: int, dtype: torch.dtype, row_gap: int = 0) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        draw = Draw(device, dtype)
        return draw.normal(num_tokens, hidden + row_gap)[:, :hidden], draw.normal(hidden), 1e-5

    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{hidden}{' strided' * bool(row_gap)}", dtype, build)


def _case_add(num_tokens: int, hidden: int, dtype: torch.dtype) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        draw = Draw(device, dtype)
        return draw.normal(num_tokens, hidden), draw.normal(num_tokens, hidden), draw.normal(hidden), 1e-5

    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{hidden}", dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (
    _case(3, 256, FP32),
    _case(1, 320, BF16),
    _case(5, 1000, FP16),
    _case(2, 63, FP32),
    _case(4, 96, BF16, row_gap=32),
)
FULL = (
    *(_case(8192, 4096, dtype) for dtype in (FP32, FP16, BF16)),
    _case(64, 8192, BF16),
    _case(8192, 2880, BF16),
)
SMALL_ADD = (_case_add(3, 256, FP32), _case_add(1, 320, BF16), _case_add(5, 1000, FP16), _case_add(2, 63, FP32))
FULL_ADD = (
    *(_case_add(8192, 4096, dtype) for dtype in (FP32, FP16, BF16)),
    _case_add(64, 8192, BF16),
    _case_add(8192, 16384, BF16),
)

LIMIT = "Memory: one row per program, held in registers between the sum and the scaling, so every byte moves once."

rms_norm = Op("rms_norm", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
add_rms_norm = Op("add_rms_norm", reference_add, launch_add, cpu_add, _cost_add, SMALL_ADD, FULL_ADD, limit=LIMIT)
