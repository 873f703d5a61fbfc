"""16-bit activations times 4-bit weights, which have a scale and perhaps a zero point per group along k.

    packed  the layout of kernels.gemm.codes4, in blocks of 128 of k; of 64 where groups are 16 long
    scales  [k / group, n], of the activations' dtype; a group is 16, 32, 64 or 128 long
    zeros   [k / group, n] uint8, the code that means 0 (up to 16: some checkpoints store it less one); None: 8
    offsets [k / group, n], of the activations' dtype, added to the scaled weights (GGUF's Q4_K and Q4_1)
    table   16 numbers that the codes stand for (NF4, IQ4_NL, e2m1 in MXFP4 and NVFP4); then there are no zeros. The
            kernel is compiled for it, so it is no tensor. It is rounded to the activations' dtype

The kernel is that of kernels.gemm.weight_only. Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.codes4 import CODES_PER_WORD, E2M1, Table, assembly, dequantise, lanes_of
from kernels.gemm.weight_only import launch_weight_only
from kernels.op import Case, Op, Target


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    asm = () if x.device.type == "cpu" else assembly(x.dtype, table)
    return launch_weight_only(x, packed, scales, zeros, offsets, table, CODES_PER_WORD, asm, "w4a16_gemm")


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    return (x.double() @ dequantise(packed, scales, zeros, torch.float64, table, offsets).T).to(x.dtype)


_CPU_ROWS = 256  # of weights at a time: what is dequantised is used while it is in the cache


def cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    n = packed.shape[1]
    wide = x.float()
    out = torch.empty(x.shape[0], n, dtype=x.dtype)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        some_zeros, some_offsets = (None if whole is None else whole[:, rows] for whole in (zeros, offsets))
        weights = dequantise(packed[:, rows], scales[:, rows], some_zeros, torch.float32, table, some_offsets)
        out[:, rows] = wide @ weights.T
    return out


def _cost(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
    offsets: torch.Tensor | None = None,
) -> OpCost:
    num_tokens, k = x.shape
    group = k // scales.shape[0]
    per_group = int(zeros is not None) + (0 if offsets is None else offsets.element_size())
    return costs.weight_only_gemm(num_tokens, packed.shape[1], k, 4, group, per_group, x.element_size())


def _case(
    num_tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    group: int = 128,
    has_zeros: bool = False,
    table: str = "",
    has_offsets: bool = False,
    row_gap: int = 0,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor | Table | None, ...]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k + row_gap)[:, :k]
        lanes = lanes_of(group)
        packed = draw.bits(k // (CODES_PER_WORD * lanes), n, lanes, dtype=torch.int16)
        scales = draw.normal(k // group, n).mul_(0.1)
        zeros = draw.below(17, k // group, n, dtype=torch.uint8) if has_zeros else None
        offsets = draw.normal(k // group, n).mul_(0.3) if has_offsets else None
        return x, packed, scales, zeros, _TABLES.get(table), offsets

    options = " zeros" * has_zeros + " offsets" * has_offsets + f" {table}" * bool(table) + " strided" * bool(row_gap)
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
    _case(5, 36, 256, BF16, group=32, has_offsets=True),
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
    _case(16, 28672, 4096, BF16, group=32, has_offsets=True, sass=_SASS),
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
