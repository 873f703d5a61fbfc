"""RMSNorm, alone and fused with the addition of the residual stream; the result in the model's dtype or quantised.

x * rsqrt(mean(x^2) + eps) * weight, computed in fp32 and rounded once, to whichever type it leaves in. With a residual,
the sum is rounded to the model's dtype first, because that rounded sum is what the next layer adds to.

One program per row, and one order of summing for a width: a row's bits do not depend on the rows around it, on the GPU
or on the CPU. Knows nothing of models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target
from kernels.quantise import GROUP, Scheme, quantise, scales_per_row, scheme_dtype, store_row


@jit
def _norm_kernel(
    out_ptr: Value,  # [tokens, HIDDEN]
    scale_ptr: Value,  # [tokens, SCALES] fp32; not written when the result is not quantised
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
    SCALES: constexpr,  # per row; 0 when the result is not quantised
    GROUPS: constexpr,
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
    store_row(
        out_ptr + token * HIDDEN, scale_ptr + token * SCALES, x * factor * weight, HIDDEN, BLOCK, GROUPS, SCALES > 0
    )


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, scheme: Scheme | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, its scales and the new residual; of the last two, what does not apply is the result again."""
    num_tokens, hidden = x.shape
    out = torch.empty(num_tokens, hidden, dtype=x.dtype if scheme is None else scheme_dtype(scheme), device=x.device)
    num_scales = 0 if scheme is None else scales_per_row(scheme, hidden)
    scales = torch.empty(num_tokens, num_scales, dtype=torch.float32, device=x.device) if num_scales else out
    total, addend = out, x
    if residual is not None:
        total, addend = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device), residual
    block = max(GROUP, next_power_of_2(hidden))
    _norm_kernel[(num_tokens,)](
        out, scales, total, x, addend, weight, x.stride(0), addend.stride(0), eps,
        HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None, SCALES=num_scales,
        GROUPS=scheme == "fp8 groups", num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out, scales, total


def launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, eps, None)[0]


def launch_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, _, total = _launch(x, residual, weight, eps, None)
    return out, total


def launch_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, None, weight, eps, scheme)[:2]


def launch_add_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, eps, scheme)


def _norm64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _norm64(x, weight, eps).to(x.dtype)


def reference_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x.double() + residual.double()).to(x.dtype)
    return reference(total, weight, eps), total


def reference_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise(_norm64(x, weight, eps), scheme)


def reference_add_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = (x.double() + residual.double()).to(x.dtype)
    return (*reference_quantised(total, weight, eps, scheme), total)


def cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def cpu_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def cpu_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise(F.rms_norm(x.float(), weight.shape, weight.float(), eps), scheme)


def cpu_add_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x + residual
    return (*cpu_quantised(total, weight, eps, scheme), total)


def _cost(x: torch.Tensor, weight: torch.Tensor, eps: float) -> costs.OpCost:
    return costs.rms_norm(x.shape[0], x.shape[1], x.element_size())


def _cost_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> costs.OpCost:
    return costs.add_rms_norm(x.shape[0], x.shape[1], x.element_size())


def _cost_quantised(x: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme) -> costs.OpCost:
    num_tokens, hidden = x.shape
    return costs.quantised(
        _cost(x, weight, eps), x.numel(), x.element_size(), num_tokens * scales_per_row(scheme, hidden)
    )


def _cost_add_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scheme: Scheme
) -> costs.OpCost:
    plain = _cost_add(x, residual, weight, eps)
    return costs.quantised(plain, x.numel(), x.element_size(), x.shape[0] * scales_per_row(scheme, x.shape[1]))


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
_WIDE = ("LDG.E.128", "STG.E.128")  # 16 bytes a thread


def _target(num_tokens: int) -> Target | None:
    """Of a fused elementwise kernel: the memory's speed for a prompt, a launch for a decode step."""
    if num_tokens >= 8192:
        return Target(0.93, "memory")
    return Target(2.5, "us") if num_tokens <= 64 else None


def _case(
    num_tokens: int,
    hidden: int,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    residual: bool = False,
    row_gap: int = 0,
    full: bool = False,
) -> Case:
    def build(device: str) -> tuple[object, ...]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, hidden + row_gap)[:, :hidden]
        rows = (x, draw.normal(num_tokens, hidden)) if residual else (x,)
        return (*rows, draw.normal(hidden), 1e-5) + ((scheme,) if scheme else ())

    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{hidden}" + (f" {scheme}" if scheme else "")
    name += " strided" * bool(row_gap)
    return Case(name, dtype, build, _WIDE if full else (), _target(num_tokens) if full and dtype != FP32 else None)


SMALL = (
    _case(3, 256, FP32),
    _case(1, 320, BF16),
    _case(5, 1000, FP16),
    _case(2, 63, FP32),
    _case(4, 96, BF16, row_gap=32),
)
FULL = (
    *(_case(8192, 4096, dtype, full=True) for dtype in (FP32, FP16, BF16)),
    _case(64, 8192, BF16, full=True),
    _case(8192, 2880, BF16, full=True),
    _case(64, 4096, BF16, full=True),
)
SMALL_ADD = tuple(
    _case(*shape, residual=True) for shape in ((3, 256, FP32), (1, 320, BF16), (5, 1000, FP16), (2, 63, FP32))
)
FULL_ADD = (
    *(_case(8192, 4096, dtype, residual=True, full=True) for dtype in (FP32, FP16, BF16)),
    _case(64, 8192, BF16, residual=True, full=True),
    _case(8192, 16384, BF16, residual=True, full=True),
    _case(8192, 8192, BF16, residual=True, full=True),
    _case(64, 4096, BF16, residual=True, full=True),
)


def _small_quantised(residual: bool) -> tuple[Case, ...]:
    return (
        _case(3, 256, FP32, "fp8", residual),
        _case(2, 1000, BF16, "fp8", residual),
        _case(5, 320, FP16, "fp8 groups", residual),  # the last group is half a group
        _case(2, 63, FP32, "fp8 groups", residual),
        _case(3, 1024, BF16, "fp8 groups", residual),
        _case(4, 256, BF16, "int8", residual),
        _case(1, 1000, FP32, "int8", residual),
        _case(3, 96, FP16, "int8", residual),
    )


def _full_quantised(residual: bool) -> tuple[Case, ...]:
    schemes: tuple[Scheme, ...] = ("fp8", "fp8 groups", "int8")
    return (
        *(_case(8192, 4096, BF16, scheme, residual, full=True) for scheme in schemes),
        *(_case(64, 8192, BF16, scheme, residual, full=True) for scheme in schemes),
        _case(8192, 7168, BF16, "fp8 groups", residual, full=True),
        _case(256, 2880, FP16, "fp8", residual, full=True),
        _case(256, 4096, FP32, "int8", residual, full=True),
    )


LIMIT = "Memory: one row per program, held in registers between the sum and the scaling, so every byte moves once."
LIMIT_QUANTISED = (
    LIMIT + " Two reductions of a row follow each other, which counts at 64 tokens. With a residual the compiler sends"
    " the row once through shared memory, to store 16 eight-bit results a thread where it loaded 8 numbers."
)
# A fp32 result that falls on the other side of a rounding boundary than the float64 one is one step of 8 bits off.
TOLERANCE_QUANTISED = {FP32: 1e-2, FP16: 1e-2, BF16: 1e-2}

rms_norm = Op("rms_norm", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
add_rms_norm = Op("add_rms_norm", reference_add, launch_add, cpu_add, _cost_add, SMALL_ADD, FULL_ADD, limit=LIMIT)
rms_norm_quantised = Op(
    "rms_norm_quantised", reference_quantised, launch_quantised, cpu_quantised, _cost_quantised,
    _small_quantised(residual=False), _full_quantised(residual=False), TOLERANCE_QUANTISED, LIMIT_QUANTISED,
)  # fmt: skip
add_rms_norm_quantised = Op(
    "add_rms_norm_quantised", reference_add_quantised, launch_add_quantised, cpu_add_quantised, _cost_add_quantised,
    _small_quantised(residual=True), _full_quantised(residual=True), TOLERANCE_QUANTISED, LIMIT_QUANTISED,
)  # fmt: skip
