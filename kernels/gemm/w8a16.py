"""16-bit activations times 8-bit codes, which have a scale and perhaps a zero point or an offset per group along k.

    packed   the layout of kernels.gemm.codes8
    scales   [k / group, n], of the activations' dtype; a group is 16, 32, 64 or 128 long
    zeros    [k / group, n] uint8, the code that means 0; None: 128
    offsets  [k / group, n], of the activations' dtype, added to the scaled weights

For weights of 5 to 8 bits: GPTQ and compressed-tensors in 8, GGUF's Q8_0, Q6_K, Q5_K. Codes of 5 or 6 bits would be
fewer bytes in planes of 4 and of 1 or 2; that decodes at twice the operations. The kernel is that of
kernels.gemm.weight_only. Knows nothing of models and checkpoint formats.
"""

from __future__ import annotations

import torch

from costs import gemm as costs
from costs.ops import OpCost
from kernels.cases import DTYPE_NAMES, Draw
from kernels.gemm.codes8 import ASSEMBLY, CODES_PER_WORD, dequantise, lanes_of
from kernels.gemm.weight_only import launch_weight_only
from kernels.op import Case, Op, Target


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    asm = () if x.device.type == "cpu" else ASSEMBLY[x.dtype]
    return launch_weight_only(x, packed, scales, zeros, offsets, None, CODES_PER_WORD, asm, "w8a16_gemm")


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    return (x.double() @ dequantise(packed, scales, zeros, offsets, torch.float64).T).to(x.dtype)


_CPU_ROWS = 256  # of weights at a time: what is dequantised is used while it is in the cache


def cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    n = packed.shape[1]
    wide = x.float()
    out = torch.empty(x.shape[0], n, dtype=x.dtype)
    for begin in range(0, n, _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        some_zeros, some_offsets = (None if whole is None else whole[:, rows] for whole in (zeros, offsets))
        out[:, rows] = wide @ dequantise(packed[:, rows], scales[:, rows], some_zeros, some_offsets, torch.float32).T
    return out


def _cost(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> OpCost:
    num_tokens, k = x.shape
    per_group = int(zeros is not None) + (0 if offsets is None else offsets.element_size())
    return costs.weight_only_gemm(num_tokens, packed.shape[1], k, 8, k // scales.shape[0], per_group, x.element_size())


def _case(
    num_tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    group: int = 128,
    has_zeros: bool = False,
    has_offsets: bool = False,
    sass: tuple[str, ...] = (),
    target: Target | None = None,
) -> Case:
    def build(device: str) -> tuple[torch.Tensor | None, ...]:
        draw = Draw(device, dtype)
        x = draw.normal(num_tokens, k)
        packed = draw.bits(k // (CODES_PER_WORD * lanes_of(group)), n, lanes_of(group), dtype=torch.int16)
        scales = draw.normal(k // group, n).mul_(0.01)
        zeros = draw.below(256, k // group, n, dtype=torch.uint8) if has_zeros else None
        return x, packed, scales, zeros, draw.normal(k // group, n) if has_offsets else None

    options = " zeros" * has_zeros + " offsets" * has_offsets
    return Case(f"{DTYPE_NAMES[dtype]} {num_tokens}x{n}x{k} group{group}{options}", dtype, build, sass, target)


FP16, BF16 = torch.float16, torch.bfloat16
_SASS = ("HGMMA", "LDGSTS")

SMALL = (
    _case(3, 100, 256, BF16),
    _case(17, 40, 384, FP16, has_zeros=True),
    _case(1, 130, 128, BF16, group=64, has_zeros=True),
    _case(5, 33, 192, FP16, group=32, has_offsets=True),
    _case(9, 36, 96, BF16, group=16),
    _case(70, 24, 128, BF16, group=32, has_offsets=True),
    _case(300, 31, 256, BF16, has_zeros=True),
)
FULL = (
    _case(1, 28672, 4096, BF16, sass=("HMMA", "LDGSTS"), target=Target(0.80, "memory")),
    _case(16, 28672, 4096, BF16, sass=_SASS, target=Target(0.85, "memory")),
    _case(16, 28672, 4096, FP16, has_zeros=True, sass=_SASS),
    _case(64, 28672, 4096, BF16, sass=_SASS),
    _case(256, 28672, 4096, BF16, sass=_SASS),
    _case(4096, 28672, 4096, BF16, sass=_SASS),
    _case(16, 28672, 4096, BF16, group=16, sass=_SASS),  # Q6_K
    _case(16, 28672, 4096, BF16, group=32, has_offsets=True, sass=_SASS),  # Q5_K
    _case(16, 4096, 14336, FP16, group=32, sass=_SASS),
)

LIMIT = (
    "Memory up to 64 tokens: the 16-token loop has 566 instructions, 322 in fp16, for the 16 KB of a 128x128 piece, "
    "which an SM's share of memory brings in about 880 cycles."
)

w8a16_gemm = Op(
    "w8a16_gemm", reference, launch, cpu, _cost, SMALL, FULL, tolerance={FP16: 2e-3, BF16: 1.6e-2}, limit=LIMIT
)
