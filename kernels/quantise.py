"""Where a number becomes an 8-bit one: the rounding of every quantised activation and cache entry, in torch and Triton.

fp8 is e4m3 without infinities: to nearest, ties to even, and what is beyond +-448 becomes +-448. int8 is symmetric,
-127 .. 127, to nearest, ties to even. A dynamic scale is the largest magnitude of its row (or group of 128 elements)
over the type's largest number; value = quantised * scale. A row of zeros has a tiny scale, so that nothing divides by
zero. Knows nothing of what is quantised.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from kernels.jit import Value, cdiv, constexpr, jit, tl

# One scale per row in fp8, one per GROUP elements of a row in fp8, one per row in int8.
Scheme = Literal["fp8", "fp8 groups", "int8"]

GROUP = 128
FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, torch.int8: 127.0}
_SMALLEST = 1e-30  # smaller largest magnitudes count as this one; its scale and its inverse are normal fp32 numbers


def scheme_dtype(scheme: Scheme) -> torch.dtype:
    return torch.int8 if scheme == "int8" else FP8


def scales_per_row(scheme: Scheme, width: int) -> int:
    return cdiv(width, GROUP) if scheme == "fp8 groups" else 1


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round numbers that are scaled already."""
    limit = LARGEST[dtype]
    return (x.round() if dtype == torch.int8 else x).clamp(-limit, limit).to(dtype)


def quantise(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, width] in fp32 or wider -> 8-bit [rows, width], and fp32 scales [rows, scales per row]."""
    width, largest = x.shape[-1], LARGEST[scheme_dtype(scheme)]
    if scheme == "fp8 groups":
        x = F.pad(x, (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    peak = x.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    rounded = narrow(x * (largest / peak), scheme_dtype(scheme))
    scales = (peak / largest).float()
    if scheme == "fp8 groups":
        return rounded.flatten(-2)[..., :width].contiguous(), scales.squeeze(-1)
    return rounded, scales


@jit
def round_scaled(x: Value, INT8: constexpr) -> Value:
    """fp32, scaled already (within +-127 for int8), to 8 bits."""
    # Adding 1.5 * 2**23 leaves no bits for a fraction: the sum is rounded to nearest even, and its low byte is x.
    # The conversion to fp8 saturates.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8) if INT8 else x.to(tl.float8e4nv)


@jit
def largest_magnitude(x: Value, AXIS: constexpr) -> Value:
    return tl.maximum(tl.max(tl.abs(x), AXIS), 1e-30)


@jit
def store_row(
    out_ptr: Value,  # this row's first element
    scale_ptr: Value,  # this row's first scale; not written when the row is not quantised
    x: Value,  # [BLOCK] fp32, zero from `width` on
    width: Value,
    BLOCK: constexpr,
    GROUPS: constexpr,  # scales of groups of 128 instead of one of the row
    QUANTISED: constexpr,
) -> None:
    """Write a row, or the part of one that a program holds, rounded to the type of `out_ptr`."""
    INT8: constexpr = out_ptr.dtype.element_ty == tl.int8
    LARGEST: constexpr = 127.0 if INT8 else 448.0
    column = tl.arange(0, BLOCK)
    if not QUANTISED:
        tl.store(out_ptr + column, x.to(out_ptr.dtype.element_ty), mask=column < width)
    elif GROUPS:
        group = tl.arange(0, BLOCK // 128)
        tile = tl.reshape(x, (BLOCK // 128, 128))
        peak = largest_magnitude(tile, 1)
        out = round_scaled(tile * (LARGEST / peak)[:, None], INT8)
        tl.store(out_ptr + column, tl.reshape(out, (BLOCK,)), mask=column < width)
        tl.store(scale_ptr + group, peak / LARGEST, mask=group * 128 < width)
    else:
        peak = largest_magnitude(x, 0)
        tl.store(out_ptr + column, round_scaled(x * (LARGEST / peak), INT8), mask=column < width)
        tl.store(scale_ptr, peak / LARGEST)
