"""16-bit activations times 4-bit weights, which have a scale and perhaps a zero point per group of 64 or 128 along k.

    packed  [k / 128, n, 32] int16. Word j of block b holds the codes of k = 128 b + j + 32 i at bits 4 i, i = 0 .. 3.
    scales  [k / group, n], of the activations' dtype
    zeros   [k / group, n] uint8, the code that means 0 (up to 16: some checkpoints store it less one); None: 8

So a tile of rows of one block is one contiguous piece of memory, and a shift and a mask give 32 neighbouring k. A
checkpoint's reader brings its codes to [n, k] by its own rules and calls `pack`; `unpack` is the way back.

The kernel computes the product turned over, out^T = W x^T: then the weights are the tensor core's first operand, which
may lie in registers, where they were unpacked, and a few tokens are its narrow side instead of padding its wide one.
A code becomes a float without a conversion: its bits or-ed into 128.0 (fp16: 1024.0) are 128 + code, exactly, and the
subtraction of 128 + zero is exact too. Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

BLOCK_K = 128  # of k, packed together
_WORDS = BLOCK_K // 4
SYMMETRIC_ZERO = 8

# Both halves of a 32-bit register at once: shift, mask and or, subtract. The compiler, left alone, takes the 16-bit
# halves apart: 501 instructions in the loop of a 16x128 tile, 326 with this.
_ASM = "{{ .reg .b32 t; shr.u32 t, $1, {0}; lop3.b32 t, t, 0x000F000F, {1}, 0xea; sub.rn.{2} $0, t, $2; }}"
_TWO_AT_A_TIME = {
    torch.bfloat16: tuple(_ASM.format(4 * i, "0x43004300", "bf16x2") for i in range(4)),
    torch.float16: tuple(_ASM.format(4 * i, "0x64006400", "f16x2") for i in range(4)),
}


@jit
def _unpacked(word: Value, zero: Value, I: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    """The weights in bits 4 I of each word, less their zero point, of the type that `zero` has."""
    if len(ASM) > 0:
        weights = tl.inline_asm_elementwise(ASM[I], "=r,r,r", [word, zero], zero.dtype, is_pure=True, pack=2)
    else:
        magic: tl.constexpr = 0x4300 if zero.dtype == tl.bfloat16 else 0x6400
        weights = (((word >> (4 * I)) & 0xF) | magic).to(zero.dtype, bitcast=True) - zero
    return weights


@jit
def _w4a16_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x_ptr: Value,  # [tokens, k]
    packed_ptr: Value,
    scales_ptr: Value,
    zeros_ptr: Value,  # read only where HAS_ZEROS
    num_tokens: Value,
    n: Value,
    num_blocks: Value,  # k / 128
    share: Value,  # blocks for one program
    stride_x: Value,
    GROUP: constexpr,
    HAS_ZEROS: constexpr,
    SPLIT: constexpr,
    SCALE_WEIGHTS: constexpr,  # scale each weight: no second accumulator. Otherwise scale each group's sum
    ASM: constexpr,  # for each i; empty in the interpreter, which knows no assembly
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    # Rows and columns behind the end read the last one again: no mask in the loop, and they are not stored.
    x_rows = x_ptr + tl.minimum(row, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    in_reach = tl.minimum(column, n - 1)
    words = in_reach[:, None] * 32 + lane[None, :]
    dtype = x_ptr.dtype.element_ty
    offset: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    symmetric: tl.constexpr = offset + 8
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * share
    block_ptr = packed_ptr + first.to(tl.int64) * n * 32
    for block in range(first, tl.minimum(first + share, num_blocks)):
        word = tl.load(block_ptr + words)
        block_ptr += n * 32
        for group in tl.static_range(128 // GROUP):
            at = (block * (128 // GROUP) + group) * n + in_reach
            scale = tl.load(scales_ptr + at)
            if HAS_ZEROS:
                zero = (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
            else:
                zero = tl.full([BLOCK_N], symmetric, tl.float32).to(dtype)
            zero = tl.broadcast_to(zero[:, None], [BLOCK_N, 32])
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for step in tl.static_range(GROUP // 32):
                x = tl.load(x_rows + (block * 128 + group * GROUP + step * 32 + lane)[:, None])
                w = _unpacked(word, zero, group * (GROUP // 32) + step, ASM)
                if SCALE_WEIGHTS:
                    acc = tl.dot(w * scale[:, None], x, acc)
                else:
                    part = tl.dot(w, x, part)
            if not SCALE_WEIGHTS:
                acc += part * scale.to(tl.float32)[:, None]
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    at_out = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at_out += tl.program_id(2).to(tl.int64) * num_tokens * n
    tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    num_tokens, k = x.shape
    num_blocks, n, _ = packed.shape
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("w4a16_gemm", m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    share = cdiv(num_blocks, config["shares"])
    shares = cdiv(num_blocks, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    _w4a16_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, x, packed, scales, packed if zeros is None else zeros,
        num_tokens, n, num_blocks, share, x.stride(0),
        GROUP=k // scales.shape[0], HAS_ZEROS=zeros is not None, SPLIT=shares > 1, SCALE_WEIGHTS=block_m >= 128,
        ASM=() if x.device.type == "cpu" else _TWO_AT_A_TIME[x.dtype],
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


def pack(codes: torch.Tensor) -> torch.Tensor:
    """codes [n, k], integers 0 .. 15, k a multiple of 128 -> packed."""
    n, k = codes.shape
    if k % BLOCK_K:
        raise ValueError(f"k is {k}; it must be a multiple of {BLOCK_K}")
    parts = codes.to(torch.int32).view(n, k // BLOCK_K, 4, _WORDS).permute(1, 0, 2, 3)
    words = parts[:, :, 0] | parts[:, :, 1] << 4 | parts[:, :, 2] << 8 | parts[:, :, 3] << 12
    return words.to(torch.int16).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """packed -> codes [n, k] uint8."""
    num_blocks, n, _ = packed.shape
    parts = [(packed >> shift & 0xF).to(torch.uint8) for shift in (0, 4, 8, 12)]
    return torch.stack(parts, dim=2).permute(1, 0, 2, 3).reshape(n, num_blocks * BLOCK_K)


def dequantise(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weights [n, k] in `dtype`."""
    num_blocks, n, _ = packed.shape
    groups = scales.shape[0] // num_blocks  # of each block
    weights = torch.empty(num_blocks, n, 4, _WORDS, dtype=dtype, device=packed.device)
    for i in range(4):
        weights[:, :, i] = packed >> (4 * i) & 0xF
    grouped = weights.view(num_blocks, n, groups, BLOCK_K // groups)
    for parameter, apply in ((zeros, grouped.sub_), (scales, grouped.mul_)):
        if parameter is None:
            apply(SYMMETRIC_ZERO)
        else:
            apply(parameter.to(dtype).view(num_blocks, groups, n).transpose(1, 2).unsqueeze(-1))
    return grouped.view(num_blocks, n, BLOCK_K).transpose(0, 1).reshape(n, num_blocks * BLOCK_K)


def reference(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    return (x.double() @ dequantise(packed, scales, zeros, torch.float64).T).to(x.dtype)


_CPU_ROWS = 256  # of weights at a time: what is dequantised is used while it is in the cache


def cpu(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    n = packed.shape[1]
    wide = x.float()
    out = torch.empty(x.shape[0], n, dtype=x.dtype)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        some_zeros = None if zeros is None else zeros[:, rows]
        out[:, rows] = wide @ dequantise(packed[:, rows], scales[:, rows], some_zeros, torch.float32).T
    return out


def _cost(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> OpCost:
    num_tokens, k = x.shape
    return costs.w4a16_gemm(num_tokens, packed.shape[1], k, k // scales.shape[0], zeros is not None, x.element_size())


def _case(
    num_tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    group: int = 128,
    has_zeros: bool = False,
    row_gap: int = 0,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k + row_gap)[:, :k]
        packed = draw.bits(k // BLOCK_K, n, _WORDS, dtype=torch.int16)
        scales = draw.normal(k // group, n).mul_(0.1)
        zeros = draw.below(17, k // group, n, dtype=torch.uint8) if has_zeros else None
        return x, packed, scales, zeros

    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k} group{group}{' zeros' * has_zeros}{' strided' * bool(row_gap)}"
    return Case(name, dtype, build, sass, target)


FP16, BF16 = torch.float16, torch.bfloat16
_SASS = ("HGMMA", "LDGSTS")

SMALL = (
    _case(3, 100, 256, BF16),
    _case(17, 40, 384, FP16, has_zeros=True),
    _case(1, 130, 128, BF16, group=64, has_zeros=True),
    _case(5, 33, 256, FP16, group=64, row_gap=8),
    _case(70, 24, 128, BF16, has_zeros=True),
    _case(300, 31, 256, BF16, group=64, has_zeros=True),  # scaled weights
    _case(260, 20, 128, FP16),
)
FULL = (
    _case(1, 28672, 4096, BF16, sass=("HMMA", "LDGSTS"), target=Target(0.75, "memory")),
    _case(16, 28672, 4096, BF16, sass=_SASS, target=Target(0.75, "memory")),
    _case(16, 28672, 4096, FP16, group=64, has_zeros=True, sass=_SASS),
    _case(64, 28672, 4096, BF16, sass=_SASS, target=Target(0.65, "memory")),
    _case(256, 28672, 4096, BF16, has_zeros=True, sass=_SASS, target=Target(0.70, "gemm")),
    _case(4096, 28672, 4096, BF16, sass=_SASS),
    _case(16, 128256, 4096, BF16, sass=_SASS, target=Target(0.88, "memory")),
    _case(16, 7168, 8192, BF16, sass=_SASS, target=Target(0.60, "memory")),
    _case(16, 4096, 14336, FP16, has_zeros=True, sass=_SASS),
    _case(64, 6144, 4096, BF16, group=64, sass=_SASS),
)

LIMIT = (
    "Memory up to 64 tokens, and close behind it the issue of instructions: an SM's share of memory brings the 8 KB "
    "of a 128x128 piece in about 440 cycles; the 16-token loop has 326 instructions for it (501 without the packed "
    "assembly, which the memory would wait for). Above 64 tokens each weight is scaled: a tile has one accumulator."
)

w4a16_gemm = Op(
    "w4a16_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP16: 2e-3, BF16: 1.6e-2}, limit=LIMIT
)
