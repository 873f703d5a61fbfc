"""Weights as 4-bit codes: their layout in memory, and how a kernel turns codes into 16-bit floats.

    packed  [k / (4 * lanes), n, lanes] int16; lanes is 32, or 16 where a group is only 16 long. Word j of block b holds
            the codes of k = 4 * lanes * b + j + lanes * i at bits 4 i, i = 0 .. 3.

So a tile of rows of one block is one contiguous piece of memory, and one step gives `lanes` neighbouring k.
A checkpoint's reader brings its codes to [n, k] by its own rules and calls `pack`; `unpack` is the way back. A code
stands for itself less a zero point, or for an entry of a table of 16 numbers.

In registers two codes are decoded at a time, one in each half. Integer operations have half the rate of 16-bit floating
point, and a 128x128 tile may cost 3.4 of them per pair before the memory waits for them:

    integer   2: shift, mask. The bits or-ed into 128.0 (fp16: 1024.0) are 128 + code, exactly, and the subtraction of
              128 + zero is exact too.
    e2m1      4: sign and magnitude are shifted to their places in a subnormal number, and a product with a power of two
              is exact and right for e2m1's own subnormals.
    any table 6.25: PRMT looks four codes up among eight bytes. So low and high bytes of 16 numbers take four of it, two
              choose between the halves of the table, and the rest brings the bytes together. Considered for it: a
              shuffle per code (`tl.gather`) or a table in shared memory, 32 a cycle and SM, are slower than that; a
              tree of selects takes 15 operations a code.

Knows nothing of products.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels.jit import Value, constexpr, jit, tl

Table = tuple[float, ...]

CODES_PER_WORD = 4
SYMMETRIC_ZERO = 8
E2M1: Table = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def lanes_of(group: int) -> int:
    """Words of a row of a block, for groups of this many codes."""
    return 16 if group == 16 else 32


def pack(codes: torch.Tensor, lanes: int = 32) -> torch.Tensor:
    """codes [n, k], integers 0 .. 15, k a multiple of 4 * lanes -> packed."""
    n, k = codes.shape
    block_k = CODES_PER_WORD * lanes
    if k % block_k:
        raise ValueError(f"k is {k}; it must be a multiple of {block_k}")
    parts = codes.to(torch.int32).view(n, k // block_k, CODES_PER_WORD, lanes).permute(1, 0, 2, 3)
    words = parts[:, :, 0] | parts[:, :, 1] << 4 | parts[:, :, 2] << 8 | parts[:, :, 3] << 12
    return words.to(torch.int16).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """packed -> codes [n, k] uint8."""
    n = packed.shape[1]
    parts = [(packed >> shift & 0xF).to(torch.uint8) for shift in (0, 4, 8, 12)]
    return torch.stack(parts, dim=2).permute(1, 0, 2, 3).reshape(n, -1)


def dequantise(
    packed: torch.Tensor,
    scales: torch.Tensor,  # [k / group, n]
    zeros: torch.Tensor | None,  # uint8, shaped as scales
    dtype: torch.dtype,
    table: Table | None = None,
    offsets: torch.Tensor | None = None,  # shaped as scales
) -> torch.Tensor:
    """The weights [n, k] in `dtype`."""
    num_blocks, n, lanes = packed.shape
    groups = scales.shape[0] // num_blocks  # of each block
    weights = torch.empty(num_blocks, n, CODES_PER_WORD, lanes, dtype=dtype, device=packed.device)
    numbers = None if table is None else torch.tensor(table, dtype=dtype, device=packed.device)
    for i in range(CODES_PER_WORD):
        codes = packed >> (4 * i) & 0xF
        weights[:, :, i] = codes if numbers is None else numbers[codes.int()]
    grouped = weights.view(num_blocks, n, groups, -1)
    if table is None:
        grouped.sub_(SYMMETRIC_ZERO if zeros is None else _per_group(zeros, groups, num_blocks, dtype))
    grouped.mul_(_per_group(scales, groups, num_blocks, dtype))
    if offsets is not None:
        grouped.add_(_per_group(offsets, groups, num_blocks, dtype))
    return grouped.view(num_blocks, n, -1).transpose(0, 1).reshape(n, -1)


def _per_group(parameter: torch.Tensor, groups: int, num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    return parameter.to(dtype).view(num_blocks, groups, -1).transpose(1, 2).unsqueeze(-1)


# Both halves of a 32-bit register at once. The compiler, left alone, takes the 16-bit halves apart: 501 instructions in
# the loop of a 16x128 tile of integers, 326 with this.
_INTEGER = (
    "{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000F000F, {magic}, 0xea; sub.rn.{type} $0, t, $2; }}"
)
_E2M1 = (
    "{{ .reg .b32 s, t; shl.b32 s, $1, {sign_shift}; and.b32 s, s, 0x80008000; {magnitude_shift};"
    " lop3.b32 t, t, {mask}, s, 0xea; mov.b32 s, {power}; mul.rn.{type} $0, t, s; }}"
)
_ANY_TABLE = (
    "{{ .reg .b32 s, q, l, h, t, a, b, c, d; and.b32 s, $4, 0x77777777;"
    " shr.u32 q, $4, 1; lop3.b32 q, q, 0x44444444, 0x32103210, 0xea; {first_lane};"
    " prmt.b32 a, l, h, 0x5140; prmt.b32 b, l, h, 0x7362; shr.u32 s, s, 16; shr.u32 q, q, 16; {second_lane};"
    " prmt.b32 c, l, h, 0x5140; prmt.b32 d, l, h, 0x7362;"
    " prmt.b32 $0, a, c, 0x5410; prmt.b32 $1, a, c, 0x7632; prmt.b32 $2, b, d, 0x5410; prmt.b32 $3, b, d, 0x7632; }}"
)
_LOOK_UP = "prmt.b32 {to}, {0}, {1}, s; prmt.b32 t, {2}, {3}, s; prmt.b32 {to}, {to}, t, q"
_PACKED_TYPE = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


@cache
def assembly(dtype: torch.dtype, table: Table | None) -> tuple[str, ...]:
    """PTX that decodes two words at once: for each i one piece, or one for all four."""
    if table is None:
        magic = "0x43004300" if dtype == torch.bfloat16 else "0x64006400"
        return tuple(_INTEGER.format(shift=4 * i, magic=magic, type=_PACKED_TYPE[dtype]) for i in range(4))
    if table == E2M1:
        return tuple(_e2m1(dtype, i) for i in range(4))
    bits = torch.tensor(table).to(dtype).view(torch.uint8).view(16, 2)
    low, high = (["0x" + bytes(bits[i : i + 4, j].flip(0).tolist()).hex() for i in (0, 4, 8, 12)] for j in (0, 1))
    look_up = "; ".join((_LOOK_UP.format(*low, to="l"), _LOOK_UP.format(*high, to="h")))
    return (_ANY_TABLE.format(first_lane=look_up, second_lane=look_up),)


def _e2m1(dtype: torch.dtype, i: int) -> str:
    """The bits 4 i .. 4 i + 2 go to where the lowest bits of the exponent and the highest of the fraction are."""
    place, mask, power = (6, "0x01C001C0", "0x7E807E80") if dtype == torch.bfloat16 else (9, "0x0E000E00", "0x74007400")
    shift = place - 4 * i
    magnitude_shift = f"shl.b32 t, $1, {shift}" if shift > 0 else f"shr.u32 t, $1, {-shift}"
    return _E2M1.format(
        sign_shift=12 - 4 * i, magnitude_shift=magnitude_shift, mask=mask, power=power, type=_PACKED_TYPE[dtype]
    )


@jit
def decoded(word: Value, zero: Value, I: constexpr, TABLE: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    """The numbers in bits 4 I of each word, of the type that `zero` has. Integers are less it. ASM: assembly()."""
    if len(ASM) == 0:
        weights = _decoded_plainly(word, zero, I, TABLE)
    elif TABLE is None:
        weights = tl.inline_asm_elementwise(ASM[I], "=r,r,r", [word, zero], zero.dtype, is_pure=True, pack=2)
    elif len(ASM) == 4:
        weights = tl.inline_asm_elementwise(ASM[I], "=r,r", [word], zero.dtype, is_pure=True, pack=2)
    else:  # the four calls for one word are one: they are equal and pure
        weights = tl.inline_asm_elementwise(
            ASM[0], "=r,=r,=r,=r,r", [word], (zero.dtype, zero.dtype, zero.dtype, zero.dtype), is_pure=True, pack=2
        )[I]
    return weights


@jit
def _decoded_plainly(word: Value, zero: Value, I: constexpr, TABLE: constexpr) -> Value:  # noqa: E741
    """The interpreter knows no assembly."""
    code = (word >> (4 * I)) & 0xF
    if TABLE is None:
        magic: tl.constexpr = 0x4300 if zero.dtype == tl.bfloat16 else 0x6400
        weights = (code | magic).to(zero.dtype, bitcast=True) - zero
    else:
        wide = tl.zeros(word.shape, tl.float32)
        for i in tl.static_range(16):
            wide = tl.where(code == i, TABLE[i], wide)
        weights = wide.to(zero.dtype)
    return weights
