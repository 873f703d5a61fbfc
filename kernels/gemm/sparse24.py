"""16-bit activations times 16-bit weights of which two in every four along k are kept (2:4).

    values  [k / 512, 4, n, 32] int32. Word j of part i of block b holds the two kept weights of the four from
            k = 512 b + 128 i + 4 j on, the first in the low half
    places  [k / 512, n, 32] int16, as codes4 packs them: bits 4 i of word j say where those two belong. Bit 0: the
            first to place 0; bit 1: the first to 1; bit 2: the second to 2; bit 3: the second to 3
    out     [tokens, n], of the activations' dtype

9 bytes for 8 weights. The sparse tensor cores are out of Triton's reach, and weight-only they would gain nothing while
the memory is what limits. So weights are spread out in registers, four places at a time: a place's bit, shifted to a
sign, becomes a mask by one PRMT, and the two places that have no bit follow from the others. 1.75 integer operations a
weight, of the 4 that the memory leaves time for. x is read as 64-bit words of four neighbouring k. As in
w4a16 the product is turned over. Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm import codes4
from kernels.gemm.tile import add_shares
from kernels.jit import Value, cdiv, constexpr, jit, tl
from kernels.op import Case, Op, Target
from kernels.tuning import config_for

BLOCK_K = 512

# $4, $5: the words of two neighbours; $6: their places. f and s: the first of each, the second of each. Into masks
# of 16 bits: PRMT's selectors 9 and 11 repeat the signs of bytes 1 and 3.
_ASM = (
    "{{ .reg .b32 f, s, a, b, c, d, t;"
    " prmt.b32 f, $4, $5, 0x5410; prmt.b32 s, $4, $5, 0x7632;"
    " shl.b32 a, $6, {0}; prmt.b32 a, a, a, 0xBB99; shl.b32 b, $6, {1}; prmt.b32 b, b, b, 0xBB99;"
    " shl.b32 c, $6, {2}; prmt.b32 c, c, c, 0xBB99; shl.b32 d, $6, {3}; prmt.b32 d, d, d, 0xBB99;"
    " and.b32 $0, f, a; lop3.b32 t, a, c, d, 0x10; and.b32 t, t, s; lop3.b32 $1, f, b, t, 0xea;"
    " lop3.b32 t, d, a, b, 0x10; and.b32 t, t, f; lop3.b32 $2, s, c, t, 0xea; and.b32 $3, s, d; }}"
)
ASM = tuple(_ASM.format(*(15 - 4 * i - bit for bit in range(4))) for i in range(4))


@jit
def _spread(word: Value, places: Value, like: Value, I: constexpr, PLACE: constexpr, ASM: constexpr) -> Value:  # noqa: E741
    """The weights at one place of every four, of the type of `like`; zero where none is kept."""
    if len(ASM) > 0:  # the calls for four places are one: they are equal and pure
        weights = tl.inline_asm_elementwise(
            ASM[I],
            "=r,=r,=r,=r,r,r,r",
            [word, places],
            (like.dtype, like.dtype, like.dtype, like.dtype),
            is_pure=True,
            pack=2,
        )[PLACE]
    else:
        bits = (places >> (4 * I)) & 0xF
        first = tl.where((bits & 1) > 0, 0, tl.where((bits & 2) > 0, 1, 2))
        second = tl.where((bits & 4) > 0, 2, tl.where((bits & 8) > 0, 3, 1))
        half = tl.where(first == PLACE, word, tl.where(second == PLACE, word >> 16, 0))
        weights = half.to(tl.int16).to(like.dtype, bitcast=True)
    return weights


@jit
def _sparse24_kernel(
    out_ptr: Value,  # [tokens, n]; in fp32 and [shares, tokens, n] where SPLIT
    x_ptr: Value,  # [tokens, k / 4] int64
    values_ptr: Value,
    places_ptr: Value,
    num_tokens: Value,
    n: Value,
    num_blocks: Value,
    share: Value,  # blocks for one program
    stride_x: Value,
    DTYPE: constexpr,
    SPLIT: constexpr,
    ASM: constexpr,  # empty in the interpreter, which knows no assembly
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    # Rows and columns behind the end read the last one again: no mask in the loop, and they are not stored.
    x_rows = x_ptr + tl.minimum(row, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    words = tl.minimum(column, n - 1)[:, None] * 32 + lane[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * share
    block_ptr = places_ptr + first.to(tl.int64) * n * 32
    part_ptr = values_ptr + first.to(tl.int64) * n * 128
    for block in range(first, tl.minimum(first + share, num_blocks)):
        places = tl.load(block_ptr + words)
        block_ptr += n * 32
        for i in tl.static_range(4):
            word = tl.load(part_ptr + words)
            part_ptr += n * 32
            x = tl.load(x_rows + (block * 128 + i * 32 + lane)[:, None])
            for place in tl.static_range(4):
                some_x = (x >> (16 * place)).to(tl.int16).to(DTYPE, bitcast=True)
                acc = tl.dot(_spread(word, places, some_x, i, place, ASM), some_x, acc)
    at_out = row.to(tl.int64)[None, :] * n + column[:, None]
    if SPLIT:
        at_out += tl.program_id(2).to(tl.int64) * num_tokens * n
    mask = (column < n)[:, None] & (row < num_tokens)[None, :]
    tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    num_tokens, k = x.shape
    num_blocks, n, _ = places.shape
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config_for("sparse24_gemm", m=num_tokens, n=n, k=k)
    block_m, block_n = config["block_m"], config["block_n"]
    share = cdiv(num_blocks, config["shares"])
    shares = cdiv(num_blocks, share)
    sums = out if shares == 1 else torch.empty(shares, num_tokens, n, dtype=torch.float32, device=x.device)
    fours = x.view(torch.int64)
    _sparse24_kernel[(cdiv(num_tokens, block_m), cdiv(n, block_n), shares)](
        sums, fours, values, places, num_tokens, n, num_blocks, share, fours.stride(0),
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16, SPLIT=shares > 1,
        ASM=() if x.device.type == "cpu" else ASM,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    if shares > 1:
        add_shares(out, sums)
    return out


_FIRST, _SECOND = (0, 0, 0, 1, 1, 2), (1, 2, 3, 2, 3, 3)  # the six ways to keep two of four


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [n, k] of 16 bits, k a multiple of 512, two of every four zero -> values, places."""
    n, k = weight.shape
    if k % BLOCK_K:
        raise ValueError(f"k is {k}; it must be a multiple of {BLOCK_K}")
    fours = weight.unflatten(1, (-1, 4))
    if bool(((fours != 0).sum(-1) > 2).any()):
        raise ValueError("more than two of four weights are not zero")
    # Those that are not zero, in their order; a zero fills up.
    where = (fours == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
    kept = fours.gather(-1, where).contiguous().view(torch.int32).squeeze(-1)
    first, second = where.unbind(-1)
    places = (first == 0) * 1 + (first == 1) * 2 + (second == 2) * 4 + (second == 3) * 8
    values = kept.view(n, k // BLOCK_K, 4, 32).permute(1, 2, 0, 3).contiguous()
    return values, codes4.pack(places)


def unpack(values: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values, places -> weight [n, k]."""
    n = places.shape[1]
    bits = codes4.unpack(places).long()
    first = torch.where(bits & 1 > 0, 0, torch.where(bits & 2 > 0, 1, 2))
    second = torch.where(bits & 4 > 0, 2, torch.where(bits & 8 > 0, 3, 1))
    kept = values.permute(2, 0, 1, 3).reshape(n, -1, 1).contiguous().view(dtype)
    weight = torch.zeros(*bits.shape, 4, dtype=dtype, device=values.device)
    return weight.scatter_(2, torch.stack((first, second), dim=-1), kept).flatten(1)


def reference(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return (x.double() @ unpack(values, places, x.dtype).double().T).to(x.dtype)


_CPU_ROWS = 256  # of weights at a time: what is spread out is used while it is in the cache


def cpu(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    n = places.shape[1]
    wide = x.float()
    out = torch.empty(x.shape[0], n, dtype=x.dtype)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        out[:, rows] = wide @ unpack(values[:, :, rows], places[:, rows], x.dtype).float().T
    return out


def _cost(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> OpCost:
    return costs.sparse24_gemm(x.shape[0], places.shape[1], x.shape[1])


def _case(
    num_tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    row_gap: int = 0,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k + row_gap)[:, :k]
        values = draw.normal(k // BLOCK_K, 4, n, 64).view(torch.int32)
        ways = draw.below(6, n, k // 4, dtype=torch.uint8)
        if device == "meta":
            return x, values, torch.empty(k // BLOCK_K, n, 32, dtype=torch.int16, device=device)
        first, second = (torch.tensor(place, device=device)[ways.int()] for place in (_FIRST, _SECOND))
        places = (first == 0) * 1 + (first == 1) * 2 + (second == 2) * 4 + (second == 3) * 8
        return x, values, codes4.pack(places)

    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k}" + " strided" * bool(row_gap), dtype, build, sass, target)


FP16, BF16 = torch.float16, torch.bfloat16
_SASS = ("HGMMA", "LDGSTS")

SMALL = (
    _case(3, 100, 512, BF16),
    _case(17, 40, 1024, FP16, row_gap=8),
    _case(1, 130, 512, BF16),
    _case(70, 24, 512, BF16),
    _case(260, 20, 512, FP16),
)
FULL = (
    _case(1, 28672, 4096, BF16, sass=("HMMA", "LDGSTS")),
    _case(16, 28672, 4096, BF16, sass=_SASS, target=Target(0.70, "memory")),
    _case(16, 4096, 14336, FP16, sass=_SASS),
    _case(64, 28672, 4096, BF16, sass=_SASS),
    _case(256, 28672, 4096, BF16, sass=_SASS),
    _case(4096, 28672, 4096, BF16, sass=_SASS),
)

LIMIT = (
    "Memory up to 16 tokens: 992 instructions, of which 550 are integer operations at half the rate, for the 36 KB of "
    "64 columns and 512 of k, which an SM's share of memory brings in about 2,000 cycles. Above, spreading out, and x: "
    "four neighbouring k come in one word, so that each place's part of x goes to shared memory by way of registers."
)

sparse24_gemm = Op(
    "sparse24_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP16: 2e-3, BF16: 1.6e-2}, limit=LIMIT
)
