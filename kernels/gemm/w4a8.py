"""8-bit integer activations times 4-bit weights, which have a scale and perhaps a zero point per group along k.

    x         [tokens, k] int8, rows contiguous
    packed    [k / (2 * lanes), n, lanes] int8; lanes is 64, or 32 where a group is 32 long. Byte j of block b holds the
              codes of k = 2 * lanes * b + j (low bits) and of k + lanes, each less 8 in two's complement
    x_scales  [tokens] fp32
    scales    [k / group, n], floating-point; a group is 32, 64 or 128 long
    zeros     [k / group, n] uint8, the code that means 0; None: 8
    out       [tokens, n] bf16

Each group is summed exactly by the integer tensor cores, then scaled and added in fp32. Without zero points a code
stays in the upper half of its byte, where its sign is: 16 times itself for a mask, or a shift and a mask, per four of
them; the scale takes the 16 back. Zero points cost an addition and an exclusive or more. As in w4a16 the product is
turned over, so that the weights may lie in registers. Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import Draw
from kernels.gemm.codes4 import SYMMETRIC_ZERO
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

CODES_PER_BYTE = 2

# Four bytes of a register at once. With zero points: 128 - zero is added to the code, which gives no carry, and the
# exclusive or turns 128 into 0.
SYMMETRIC_ASM = (
    "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
    "and.b32 $0, $1, 0xF0F0F0F0;",
)
ZERO_ASM = tuple(
    "{ .reg .b32 t; " + shift + "; lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6a; add.u32 t, t, $2;"
    " xor.b32 $0, t, 0x80808080; }"
    for shift in ("mov.b32 t, $1", "shr.u32 t, $1, 4")
)


@jit
def _decoded(byte: Value, shifted_zero: Value, I: constexpr, HAS_ZEROS: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    """int8: the code in bits 4 I of each byte less its zero point, or without zero points 16 times the code less 8."""
    if HAS_ZEROS:
        if len(ASM) > 0:
            weights = tl.inline_asm_elementwise(ASM[I], "=r,r,r", [byte, shifted_zero], tl.int8, is_pure=True, pack=4)
        else:
            weights = (((((byte >> (4 * I)) & 0xF) ^ 8) + shifted_zero) ^ -128).to(tl.int8)
    elif len(ASM) > 0:
        weights = tl.inline_asm_elementwise(ASM[I], "=r,r", [byte], tl.int8, is_pure=True, pack=4)
    else:
        weights = (byte << (4 - 4 * I)).to(tl.int8) & -16
    return weights


@jit
def _w4a8_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x_ptr: Value,
    packed_ptr: Value,
    x_scales_ptr: Value,
    scales_ptr: Value,
    zeros_ptr: Value,  # read only where HAS_ZEROS
    num_tokens: Value,
    n: Value,
    num_blocks: Value,
    share: Value,  # blocks for one program
    stride_x: Value,
    LANES: constexpr,
    GROUP: constexpr,
    HAS_ZEROS: constexpr,
    SPLIT: constexpr,
    ASM: constexpr,  # empty in the interpreter, which knows no assembly
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)
    # Rows and columns behind the end read the last one again: no mask in the loop, and they are not stored.
    in_reach_row = tl.minimum(row, num_tokens - 1)
    in_reach = tl.minimum(column, n - 1)
    x_rows = x_ptr + in_reach_row.to(tl.int64)[None, :] * stride_x
    bytes_at = in_reach[:, None] * LANES + lane[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * share
    block_ptr = packed_ptr + first.to(tl.int64) * n * LANES
    for block in range(first, tl.minimum(first + share, num_blocks)):
        byte = tl.load(block_ptr + bytes_at)
        block_ptr += n * LANES
        for group in tl.static_range(2 * LANES // GROUP):
            at = (block * (2 * LANES // GROUP) + group) * n + in_reach
            scale = tl.load(scales_ptr + at).to(tl.float32)
            zero = byte
            if HAS_ZEROS:
                zero = tl.broadcast_to((128 - tl.load(zeros_ptr + at)).to(tl.int8)[:, None], [BLOCK_N, LANES])
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for step in tl.static_range(GROUP // LANES):
                x = tl.load(x_rows + (block * 2 * LANES + group * GROUP + step * LANES + lane)[:, None])
                w = _decoded(byte, zero, group * (GROUP // LANES) + step, HAS_ZEROS, ASM)
                part = tl.dot(w, x, part, out_dtype=tl.int32)
            acc += part.to(tl.float32) * (scale if HAS_ZEROS else scale * 0.0625)[:, None]
    acc *= tl.load(x_scales_ptr + in_reach_row)[None, :]
    at_out = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at_out += tl.program_id(2).to(tl.int64) * num_tokens * n
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, k = x.shape
    num_blocks, n, lanes = packed.shape
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("w4a8_gemm", m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    share = cdiv(num_blocks, config["shares"])
    shares = cdiv(num_blocks, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    asm = SYMMETRIC_ASM if zeros is None else ZERO_ASM
    _w4a8_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, x, packed, x_scales, scales, packed if zeros is None else zeros,
        num_tokens, n, num_blocks, share, x.stride(0),
        LANES=lanes, GROUP=k // scales.shape[0], HAS_ZEROS=zeros is not None, SPLIT=shares > 1,
        ASM=() if x.device.type == "cpu" else asm,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


def lanes_of(group: int) -> int:
    """Bytes of a row of a block, for groups of this many codes."""
    return min(64, group)


def pack(codes: torch.Tensor, lanes: int = 64) -> torch.Tensor:
    """codes [n, k], integers 0 .. 15, k a multiple of 2 * lanes -> packed."""
    n, k = codes.shape
    if k % (CODES_PER_BYTE * lanes):
        raise ValueError(f"k is {k}; it must be a multiple of {CODES_PER_BYTE * lanes}")
    low, high = (codes.to(torch.uint8) ^ SYMMETRIC_ZERO).view(n, -1, CODES_PER_BYTE, lanes).unbind(2)
    packed: torch.Tensor = (low | high << 4).transpose(0, 1).contiguous()
    return packed.view(torch.int8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """packed -> codes [n, k] uint8."""
    stored = packed.view(torch.uint8)
    codes = torch.stack((stored & 0xF, stored >> 4), dim=2) ^ SYMMETRIC_ZERO
    return codes.transpose(0, 1).reshape(packed.shape[1], -1)


def _dequantise(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weights [n, k]."""
    grouped: torch.Tensor = unpack(packed).to(dtype).unflatten(1, (scales.shape[0], -1))
    grouped -= SYMMETRIC_ZERO if zeros is None else zeros.T.to(dtype).unsqueeze(-1)
    return (grouped * scales.T.to(dtype).unsqueeze(-1)).flatten(1)


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    product = x.double() @ _dequantise(packed, scales, zeros, torch.float64).T
    return (product * x_scales.double()[:, None]).to(torch.bfloat16)


_CPU_ROWS = 256  # of weights at a time: what is dequantised is used while it is in the cache


def cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    n = packed.shape[1]
    wide = x.float().mul_(x_scales[:, None])
    out = torch.empty(x.shape[0], n, dtype=torch.bfloat16)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        some_zeros = None if zeros is None else zeros[:, rows]
        out[:, rows] = wide @ _dequantise(packed[:, rows], scales[:, rows], some_zeros, torch.float32).T
    return out


def _cost(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scales: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> OpCost:
    num_tokens, k = x.shape
    return costs.w4a8_gemm(num_tokens, packed.shape[1], k, scales.nbytes, 0 if zeros is None else zeros.nbytes)


def _case(
    num_tokens: int,
    n: int,
    k: int,
    *,
    group: int = 128,
    has_zeros: bool = False,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        draw = Draw(device, torch.int8)
        x = draw.normal(num_tokens, k)
        packed = draw.bits(k // (CODES_PER_BYTE * lanes_of(group)), n, lanes_of(group), dtype=torch.int8)
        x_scales = draw.normal(num_tokens, dtype=torch.float32).abs_().add_(0.1)
        scales = draw.normal(k // group, n, dtype=torch.bfloat16).mul_(0.1)
        zeros = draw.below(17, k // group, n, dtype=torch.uint8) if has_zeros else None
        return x, packed, x_scales, scales, zeros

    return Case(f"int8 {num_tokens}x{n}x{k} group{group}{' zeros' * has_zeros}", torch.int8, build, sass, target)


SMALL = (
    _case(3, 100, 256),
    _case(17, 40, 384, has_zeros=True),
    _case(1, 130, 128, group=64),
    _case(33, 40, 192, group=32, has_zeros=True),
    _case(70, 24, 256, group=32),
    _case(300, 31, 256, group=64, has_zeros=True),
)
_SASS = ("IGMMA", "LDGSTS")
FULL = (
    _case(1, 28672, 4096, sass=("IMMA", "LDGSTS"), target=Target(0.75, "memory")),
    _case(16, 28672, 4096, sass=_SASS, target=Target(0.80, "memory")),
    _case(16, 28672, 4096, has_zeros=True, sass=_SASS),
    _case(64, 28672, 4096, sass=_SASS, target=Target(0.75, "memory")),
    _case(256, 28672, 4096, sass=_SASS),
    _case(4096, 28672, 4096, sass=_SASS),
    _case(16, 4096, 14336, group=64, sass=_SASS),
    _case(16, 28672, 4096, group=32, has_zeros=True, sass=_SASS),
)

LIMIT = (
    "Memory up to 64 tokens: the 16-token loop has 192 instructions for the 8 KB of a 128x128 piece, 291 with zero "
    "points, against 338 of w4a16_gemm. Above, the conversion of each group's sums, which no product hides: at 128x128 "
    "64 I2F and 64 FFMA a thread per 128 of k. Tiles of 256 tokens spill: there are two sums."
)

w4a8_gemm = Op("w4a8_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={torch.int8: 5e-3}, limit=LIMIT)
