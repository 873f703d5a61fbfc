"""SwiGLU: silu(gate) * up, where gate and up are the halves of one fused projection. Knows nothing of models."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op


@jit
def _swiglu_kernel(
    out_ptr: Value,  # [tokens, WIDTH]
    gate_up_ptr: Value,  # [tokens, 2 * WIDTH]
    stride: Value,
    WIDTH: constexpr,
    BLOCK: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate_ptr = gate_up_ptr + token * stride + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(gate_up: torch.Tensor) -> torch.Tensor:
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, next_power_of_2(width))
    _swiglu_kernel[(num_tokens, cdiv(width, block))](
        out, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=block, num_warps=max(1, block // 512)
    )
    return out


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def cpu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _cost(gate_up: torch.Tensor) -> costs.OpCost:
    return costs.swiglu(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.element_size())


def _case(num_tokens: int, width: int, dtype: torch.dtype) -> Case:
    def build(device: str) -> tuple[torch.Tensor]:
        return (
            Draw(device, dtype).normal(num_tokens, 2 * width).mul_(4.0),
        )  # wide enough for both ends of the sigmoid

    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{width}", dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (_case(3, 256, FP32), _case(2, 3000, BF16), _case(1, 688, FP16), _case(4, 33, FP32))
FULL = (*(_case(8192, 14336, dtype) for dtype in (FP32, FP16, BF16)), _case(64, 3584, BF16), _case(64, 11008, BF16))

LIMIT = "Memory: gate and up are read once, by 16-byte loads; a program has no state to keep."

swiglu = Op("swiglu", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
