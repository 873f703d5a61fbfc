"""Weights as 8-bit codes: their layout in memory, and how a kernel turns codes into 16-bit floats.

    packed  [k / (2 * lanes), n, lanes] int16; lanes is 64, or the group where that is shorter. Word j of block b holds
            the codes of k = 2 * lanes * b + j (low bits) and of k + lanes

A code stands for itself less a zero point. In registers two codes are decoded at a time, one in each half. fp16 has
room for the code below 1024, as codes4 does it. bf16 has not: its two halves of 4 bits go below 128 each, and a fused
multiply-add, exact as all before it, brings them together: 4 integer operations a pair, of the 6.8 that the memory
leaves time for. Knows nothing of products.
"""

from __future__ import annotations

import torch

from kernels.jit import Value, constexpr, jit, tl

CODES_PER_WORD = 2
SYMMETRIC_ZERO = 128


def lanes_of(group: int) -> int:
    """Words of a row of a block, for groups of this many codes."""
    return min(64, group)


def pack(codes: torch.Tensor, lanes: int = 64) -> torch.Tensor:
    """codes [n, k], integers 0 .. 255, k a multiple of 2 * lanes -> packed."""
    n, k = codes.shape
    if k % (CODES_PER_WORD * lanes):
        raise ValueError(f"k is {k}; it must be a multiple of {CODES_PER_WORD * lanes}")
    low, high = codes.to(torch.int32).view(n, -1, CODES_PER_WORD, lanes).transpose(0, 1).unbind(2)
    return (low | high << 8).to(torch.int16).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """packed -> codes [n, k] uint8."""
    parts = [(packed >> shift & 0xFF).to(torch.uint8) for shift in (0, 8)]
    return torch.stack(parts, dim=2).transpose(0, 1).reshape(packed.shape[1], -1)


def dequantise(
    packed: torch.Tensor,
    scales: torch.Tensor,  # [k / group, n]
    zeros: torch.Tensor | None,  # uint8, shaped as scales
    offsets: torch.Tensor | None,  # shaped as scales
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights [n, k] in `dtype`."""
    weights: torch.Tensor = unpack(packed).to(dtype).unflatten(1, (scales.shape[0], -1))
    weights -= SYMMETRIC_ZERO if zeros is None else zeros.T.to(dtype).unsqueeze(-1)
    weights *= scales.T.to(dtype).unsqueeze(-1)
    if offsets is not None:
        weights += offsets.T.to(dtype).unsqueeze(-1)
    return weights.reshape(packed.shape[1], -1)


_BF16 = (
    "{{ .reg .b32 l, h, c; shr.u32 l, $1, {low}; lop3.b32 l, l, 0x000F000F, 0x43004300, 0xea;"
    " shr.u32 h, $1, {high}; lop3.b32 h, h, 0x000F000F, 0x43004300, 0xea; sub.rn.bf16x2 l, l, $2;"
    " mov.b32 c, 0x43084308; sub.rn.bf16x2 h, h, c; mov.b32 c, 0x41804180; fma.rn.bf16x2 $0, h, c, l; }}"
)
_FP16 = "{{ .reg .b32 t; shr.u32 t, $1, {low}; lop3.b32 t, t, 0x00FF00FF, 0x64006400, 0xea; sub.rn.f16x2 $0, t, $2; }}"
ASSEMBLY = {
    torch.bfloat16: tuple(_BF16.format(low=8 * i, high=8 * i + 4) for i in range(2)),
    torch.float16: tuple(_FP16.format(low=8 * i) for i in range(2)),
}


@jit
def decoded8(word: Value, zero: Value, I: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    """The codes in bits 8 I of each word less `zero`, of its type. In fp16 it has 1024 added."""
    if len(ASM) > 0:
        weights = tl.inline_asm_elementwise(ASM[I], "=r,r,r", [word, zero], zero.dtype, is_pure=True, pack=2)
    elif zero.dtype == tl.bfloat16:
        weights = (((word >> (8 * I)) & 0xFF).to(tl.float32) - zero.to(tl.float32)).to(tl.bfloat16)
    else:
        weights = (((word >> (8 * I)) & 0xFF) | 0x6400).to(zero.dtype, bitcast=True) - zero
    return weights
