"""8-bit integer activations times ternary weights, -1, 0 and 1, in 2 bits, with a scale per output (BitNet b1.58).

    x              [tokens, k] int8, rows contiguous
    packed         [k / 256, n, 64] int8. Byte j of block b holds k = 256 b + j + 64 i at bits 2 i, i = 0 .. 3, in two's
                   complement: -2 is possible too
    x_scales       [tokens] fp32
    weight_scales  [n] fp32
    out            [tokens, n] bf16

In a register a number goes to the upper two bits of its byte, where its sign is: 64 times itself for a shift and a
mask, for four numbers at once. The sum over all k stays in the integer tensor cores' 32 bits (64 * 2 * 127 * k: k up
to 130,000), and the scale takes the 64 back. As in w4a16 the product is turned over, so that the weights may lie in
registers. Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import Draw
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

BLOCK_K = 256  # of k, packed together
_LANES = BLOCK_K // 4

ASM = tuple(f"{{ .reg .b32 t; shl.b32 t, $1, {6 - 2 * i}; and.b32 $0, t, 0xC0C0C0C0; }}" for i in range(4))


@jit
def _decoded(byte: Value, I: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    """int8: 64 times the number in bits 2 I of each byte."""
    if len(ASM) > 0:
        weights = tl.inline_asm_elementwise(ASM[I], "=r,r", [byte], tl.int8, is_pure=True, pack=4)
    else:
        weights = (byte << (6 - 2 * I)).to(tl.int8) & -64
    return weights


@jit
def _w2a8_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x_ptr: Value,
    packed_ptr: Value,
    x_scales_ptr: Value,
    weight_scales_ptr: Value,
    num_tokens: Value,
    n: Value,
    num_blocks: Value,
    share: Value,  # blocks for one program
    stride_x: Value,
    SPLIT: constexpr,
    ASM: constexpr,  # empty in the interpreter, which knows no assembly
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 64)
    # Rows and columns behind the end read the last one again: no mask in the loop, and they are not stored.
    in_reach_row = tl.minimum(row, num_tokens - 1)
    in_reach = tl.minimum(column, n - 1)
    x_rows = x_ptr + in_reach_row.to(tl.int64)[None, :] * stride_x
    bytes_at = in_reach[:, None] * 64 + lane[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    first = tl.program_id(2) * share
    block_ptr = packed_ptr + first.to(tl.int64) * n * 64
    for block in range(first, tl.minimum(first + share, num_blocks)):
        byte = tl.load(block_ptr + bytes_at)
        block_ptr += n * 64
        for step in tl.static_range(4):
            x = tl.load(x_rows + (block * 256 + step * 64 + lane)[:, None])
            acc = tl.dot(_decoded(byte, step, ASM), x, acc, out_dtype=tl.int32)
    scale = tl.load(weight_scales_ptr + in_reach) * (1.0 / 64.0)
    scaled = acc.to(tl.float32) * scale[:, None] * tl.load(x_scales_ptr + in_reach_row)[None, :]
    at_out = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at_out += tl.program_id(2).to(tl.int64) * num_tokens * n
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    tl.store(out_ptr + at_out, scaled.to(out_ptr.dtype.element_ty), mask=mask)


def launch(x: torch.Tensor, packed: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    num_tokens, k = x.shape
    num_blocks, n, _ = packed.shape
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("w2a8_gemm", m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    share = cdiv(num_blocks, config["shares"])
    shares = cdiv(num_blocks, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    _w2a8_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, x, packed, x_scales, weight_scales, num_tokens, n, num_blocks, share, x.stride(0),
        SPLIT=shares > 1, ASM=() if x.device.type == "cpu" else ASM,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


def pack(weights: torch.Tensor) -> torch.Tensor:
    """weights [n, k], integers -2 .. 1, k a multiple of 256 -> packed."""
    n, k = weights.shape
    if k % BLOCK_K:
        raise ValueError(f"k is {k}; it must be a multiple of {BLOCK_K}")
    parts = (weights.to(torch.uint8) & 3).view(n, k // BLOCK_K, 4, _LANES)
    packed: torch.Tensor = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    return packed.transpose(0, 1).contiguous().view(torch.int8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """packed -> weights [n, k] int8."""
    parts = [(packed << (6 - 2 * i)).to(torch.int8) >> 6 for i in range(4)]
    return torch.stack(parts, dim=2).transpose(0, 1).reshape(packed.shape[1], -1)


def reference(
    x: torch.Tensor, packed: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    product = x.double() @ unpack(packed).double().T
    return (product * x_scales.double()[:, None] * weight_scales.double()).to(torch.bfloat16)


_CPU_ROWS = 512  # of weights at a time: what is widened is used while it is in the cache


def cpu(x: torch.Tensor, packed: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    n = packed.shape[1]
    wide = x.float().mul_(x_scales[:, None])
    out = torch.empty(x.shape[0], n, dtype=torch.bfloat16)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        out[:, rows] = (wide @ unpack(packed[:, rows]).float().T).mul_(weight_scales[rows])
    return out


def _cost(x: torch.Tensor, packed: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor) -> OpCost:
    return costs.w2a8_gemm(x.shape[0], packed.shape[1], x.shape[1])


def _case(
    num_tokens: int, n: int, k: int, sass: tuple[str, ...] = (), target: Target | None = None, gap: int = 0
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = Draw(device, torch.int8)
        x = draw.normal(num_tokens, k + gap)[:, :k]
        packed = draw.bits(k // BLOCK_K, n, _LANES, dtype=torch.int8)
        x_scales, weight_scales = (draw.normal(size, dtype=torch.float32).abs_().add_(0.1) for size in (num_tokens, n))
        return x, packed, x_scales, weight_scales

    return Case(f"int8 {num_tokens}x{n}x{k}" + " strided" * bool(gap), torch.int8, build, sass, target)


SMALL = (
    _case(3, 100, 256),
    _case(17, 40, 768, gap=16),
    _case(1, 130, 512),
    _case(70, 24, 256),
    _case(300, 31, 256),
)
_SASS = ("IGMMA", "LDGSTS")
FULL = (
    _case(1, 13824, 2560, ("IMMA", "LDGSTS")),
    _case(16, 13824, 2560, _SASS, Target(0.50, "memory")),
    _case(16, 28672, 4096, _SASS, Target(0.70, "memory")),
    _case(64, 28672, 4096, _SASS),
    _case(256, 28672, 4096, _SASS),
    _case(4096, 28672, 4096, _SASS),
)

LIMIT = (
    "Memory up to 64 tokens: 243 instructions in the 16-token loop for the 8 KB of 128 columns and 256 of k. x is read "
    "as often as elsewhere for a quarter of int8_gemm's weights, so its share of the traffic from the L2 is larger."
)

w2a8_gemm = Op("w2a8_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={torch.int8: 5e-3}, limit=LIMIT)
