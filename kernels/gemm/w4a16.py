"""16-bit activations times 4-bit weights, which have a scale and perhaps a zero point per group along k.

    packed  the layout of kernels.gemm.codes4, in blocks of 128 of k; of 64 where groups are 16 long
    scales  [k / group, n], of the activations' dtype; a group is 16, 32, 64 or 128 long
    zeros   [k / group, n] uint8, the code that means 0 (up to 16: some checkpoints store it less one); None: 8
    table   16 numbers that the codes stand for (NF4, IQ4_NL, e2m1 in MXFP4 and NVFP4); then there are no zeros. The
            kernel is compiled for it, so it is no tensor. It is rounded to the activations' dtype

The kernel computes the product turned over, out^T = W x^T: then the weights are the tensor core's first operand, which
may lie in registers, where they were unpacked, and a few tokens are its narrow side instead of padding its wide one.
Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.codes4 import CODES_PER_WORD, E2M1, Table, assembly, decoded, dequantise, lanes_of
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for


@jit
def _w4a16_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x_ptr: Value,  # [tokens, k]
    packed_ptr: Value,
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
    TABLE: constexpr,
    SPLIT: constexpr,
    SCALE_WEIGHTS: constexpr,  # scale each weight: no second accumulator. Otherwise scale each group's sum
    ASM: constexpr,  # empty in the interpreter, which knows no assembly
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)
    # Rows and columns behind the end read the last one again: no mask in the loop, and they are not stored.
    x_rows = x_ptr + tl.minimum(row, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    in_reach = tl.minimum(column, n - 1)
    words = in_reach[:, None] * LANES + lane[None, :]
    dtype = x_ptr.dtype.element_ty
    offset: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    symmetric: tl.constexpr = offset + 8
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * share
    block_ptr = packed_ptr + first.to(tl.int64) * n * LANES
    for block in range(first, tl.minimum(first + share, num_blocks)):
        word = tl.load(block_ptr + words)
        block_ptr += n * LANES
        for group in tl.static_range(4 * LANES // GROUP):
            at = (block * (4 * LANES // GROUP) + group) * n + in_reach
            scale = tl.load(scales_ptr + at)
            if HAS_ZEROS:
                zero = (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
            else:
                zero = tl.full([BLOCK_N], symmetric, tl.float32).to(dtype)
            zero = tl.broadcast_to(zero[:, None], [BLOCK_N, LANES])
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for step in tl.static_range(GROUP // LANES):
                x = tl.load(x_rows + (block * 4 * LANES + group * GROUP + step * LANES + lane)[:, None])
                w = decoded(word, zero, group * (GROUP // LANES) + step, TABLE, ASM)
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
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> torch.Tensor:
    num_tokens, k = x.shape
    num_blocks, n, lanes = packed.shape
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("w4a16_gemm", m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    group = k // scales.shape[0]
    share = cdiv(num_blocks, config["shares"])
    shares = cdiv(num_blocks, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    _w4a16_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, x, packed, scales, packed if zeros is None else zeros,
        num_tokens, n, num_blocks, share, x.stride(0),
        LANES=lanes, GROUP=group, HAS_ZEROS=zeros is not None, TABLE=table, SPLIT=shares > 1,
        SCALE_WEIGHTS=block_m >= 128 or group < 64,
        ASM=() if x.device.type == "cpu" else assembly(x.dtype, table),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> torch.Tensor:
    return (x.double() @ dequantise(packed, scales, zeros, torch.float64, table).T).to(x.dtype)


_CPU_ROWS = 256  # of weights at a time: what is dequantised is used while it is in the cache


def cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> torch.Tensor:
    n = packed.shape[1]
    wide = x.float()
    out = torch.empty(x.shape[0], n, dtype=x.dtype)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        some_zeros = None if zeros is None else zeros[:, rows]
        weights = dequantise(packed[:, rows], scales[:, rows], some_zeros, torch.float32, table)
        out[:, rows] = wide @ weights.T
    return out


def _cost(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
) -> OpCost:
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
    table: str = "",
    row_gap: int = 0,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Table | None]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k + row_gap)[:, :k]
        lanes = lanes_of(group)
        packed = draw.bits(k // (CODES_PER_WORD * lanes), n, lanes, dtype=torch.int16)
        scales = draw.normal(k // group, n).mul_(0.1)
        zeros = draw.below(17, k // group, n, dtype=torch.uint8) if has_zeros else None
        return x, packed, scales, zeros, _TABLES.get(table)

    options = " zeros" * has_zeros + f" {table}" * bool(table) + " strided" * bool(row_gap)
    name = f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k} group{group}{options}"
    return Case(name, dtype, build, sass, target)


# NF4 is that of arXiv:2305.14314, to four digits.
_TABLES: dict[str, Table] = {
    "e2m1": E2M1,
    "nf4": (
        -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
        0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
    ),
}  # fmt: skip
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
    _case(9, 50, 256, BF16, group=32, has_zeros=True),
    _case(2, 36, 192, FP16, group=16),
    _case(6, 40, 256, BF16, group=32, table="e2m1"),
    _case(33, 20, 192, BF16, group=16, table="e2m1"),
    _case(200, 20, 128, FP16, group=32, table="e2m1"),
    _case(4, 36, 256, BF16, group=64, table="nf4"),
    _case(130, 20, 128, FP16, group=64, table="nf4"),
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
    _case(16, 28672, 4096, BF16, group=32, has_zeros=True, sass=_SASS),
    _case(16, 28672, 4096, BF16, group=16, sass=_SASS),
    _case(1, 28672, 4096, BF16, group=32, table="e2m1", sass=("HMMA", "LDGSTS")),
    _case(16, 28672, 4096, BF16, group=32, table="e2m1", sass=_SASS, target=Target(0.70, "memory")),
    _case(16, 28672, 4096, BF16, group=16, table="e2m1", sass=_SASS),
    _case(256, 28672, 4096, BF16, group=32, table="e2m1", sass=_SASS),
    _case(16, 4096, 14336, FP16, group=32, table="e2m1", sass=_SASS),
    _case(1, 28672, 4096, BF16, group=64, table="nf4", sass=("HMMA", "LDGSTS")),
    _case(16, 28672, 4096, BF16, group=64, table="nf4", sass=_SASS, target=Target(0.50, "memory")),
    _case(4096, 28672, 4096, BF16, group=64, table="nf4", sass=_SASS),
)

LIMIT = (
    "Memory up to 64 tokens, and close behind it the issue of instructions: an SM's share of memory brings the 8 KB "
    "of a 128x128 piece in about 440 cycles; the 16-token loop has 326 instructions for it (501 without the packed "
    "assembly, which the memory would wait for). A table of e2m1 takes 537, and any other 704, of which 400 are "
    "integer operations at half the rate: 810 cycles. Above 64 tokens, and where groups are short, each weight is "
    "scaled: a tile has one accumulator."
)

w4a16_gemm = Op(
    "w4a16_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP16: 2e-3, BF16: 1.6e-2}, limit=LIMIT
)
