"""SwiGLU: silu(gate) * up, where gate and up are the halves of one fused projection; also with a quantised result.

A row that gets one scale is held by one program; otherwise a program has 2,048 columns of a row. No sum crosses rows: a
row's bits do not depend on the rows around it. Knows nothing of models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target
from kernels.quantise import GROUP, Scheme, quantise, scales_per_row, scheme_dtype, store_row


@jit
def _swiglu_kernel(
    out_ptr: Value,  # [tokens, WIDTH]
    scale_ptr: Value,  # [tokens, SCALES] fp32; not written when the result is not quantised
    gate_up_ptr: Value,  # [tokens, 2 * WIDTH]
    stride: Value,
    WIDTH: constexpr,
    BLOCK: constexpr,
    SCALES: constexpr,  # per row; 0 when the result is not quantised
    GROUPS: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate_ptr = gate_up_ptr + token * stride + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    out_ptr += token * WIDTH + first
    scale_ptr += token * SCALES + first // 128
    store_row(out_ptr, scale_ptr, out, WIDTH - first, BLOCK, GROUPS, SCALES > 0)


def _launch(gate_up: torch.Tensor, scheme: Scheme | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and its scales, or the result twice."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    dtype = gate_up.dtype if scheme is None else scheme_dtype(scheme)
    out = torch.empty(num_tokens, width, dtype=dtype, device=gate_up.device)
    num_scales = 0 if scheme is None else scales_per_row(scheme, width)
    scales = torch.empty(num_tokens, num_scales, dtype=torch.float32, device=gate_up.device) if num_scales else out
    block = max(GROUP, next_power_of_2(width))
    if scheme in (None, "fp8 groups"):
        block = min(2048, block)
    _swiglu_kernel[(num_tokens, cdiv(width, block))](
        out, scales, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=block, SCALES=num_scales,
        GROUPS=scheme == "fp8 groups", num_warps=min(32, max(1, block // 512)),
    )  # fmt: skip
    return out, scales


def launch(gate_up: torch.Tensor) -> torch.Tensor:
    return _launch(gate_up, None)[0]


def launch_quantised(gate_up: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(gate_up, scheme)


def _swiglu64(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    return _swiglu64(gate_up).to(gate_up.dtype)


def reference_quantised(gate_up: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise(_swiglu64(gate_up), scheme)


def cpu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def cpu_quantised(gate_up: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise(cpu(gate_up.float()), scheme)


def _cost(gate_up: torch.Tensor) -> costs.OpCost:
    return costs.swiglu(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.element_size())


def _cost_quantised(gate_up: torch.Tensor, scheme: Scheme) -> costs.OpCost:
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    num_scales = num_tokens * scales_per_row(scheme, width)
    return costs.quantised(_cost(gate_up), num_tokens * width, gate_up.element_size(), num_scales)


def _case(num_tokens: int, width: int, dtype: torch.dtype, scheme: Scheme | None = None, full: bool = False) -> Case:
    def build(device: str) -> tuple[object, ...]:
        # Wide enough for both ends of the sigmoid.
        gate_up = Draw(device, dtype).normal(num_tokens, 2 * width).mul_(4.0)
        return (gate_up, scheme) if scheme else (gate_up,)

    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{width}" + (f" {scheme}" if scheme else "")
    target = None
    if full and num_tokens <= 64 and dtype != FP32:
        target = Target(2.5, "us")
    elif full and num_tokens >= 8192 and dtype != FP32:
        target = Target(0.93, "memory")
    return Case(name, dtype, build, ("LDG.E.128", "STG.E.128") if full else (), target)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (_case(3, 256, FP32), _case(2, 3000, BF16), _case(1, 688, FP16), _case(4, 33, FP32))
FULL = (
    *(_case(8192, 14336, dtype, full=True) for dtype in (FP32, FP16, BF16)),
    _case(64, 3584, BF16, full=True),
    _case(64, 11008, BF16, full=True),
)
SMALL_QUANTISED = (
    _case(3, 256, FP32, "fp8"),
    _case(2, 1000, BF16, "fp8"),
    _case(2, 2500, BF16, "fp8 groups"),  # two programs a row, and the last group is half a group
    _case(4, 33, FP16, "fp8 groups"),
    _case(2, 688, FP32, "int8"),
    _case(1, 3000, BF16, "int8"),
)
FULL_QUANTISED = (
    *(_case(8192, 14336, BF16, scheme, full=True) for scheme in ("fp8", "fp8 groups", "int8")),
    *(_case(64, 3584, BF16, scheme, full=True) for scheme in ("fp8", "fp8 groups", "int8")),
    _case(256, 28672, BF16, "fp8", full=True),
    _case(256, 2048, FP16, "fp8 groups", full=True),
    _case(256, 14336, FP32, "int8", full=True),
)

LIMIT = "Memory: gate and up are read once, by 16-byte loads; a program has no state to keep."
LIMIT_QUANTISED = (
    "Memory: gate and up are read once. One scale a row means one program a row: 32 warps hold 14,336 columns in"
    " registers, two blocks an SM. Groups of 128 cut a row at 2,048 columns as the unquantised kernel does."
)

swiglu = Op("swiglu", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
swiglu_quantised = Op(
    "swiglu_quantised", reference_quantised, launch_quantised, cpu_quantised, _cost_quantised,
    SMALL_QUANTISED, FULL_QUANTISED, {FP32: 1e-2, FP16: 1e-2, BF16: 1e-2}, LIMIT_QUANTISED,
)  # fmt: skip
