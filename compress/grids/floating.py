"""8-bit and 4-bit floats: e4m3 with a scale for each row, matrix or block; e2m1 in MXFP4 and NVFP4; NormalFloat 4."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.grids.grid import Scales, grouped

BLOCK = 128
FP8_MOST, FP4_MOST = 448.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST = 1e-12
# Quantiles of a normal distribution (arXiv:2305.14314, appendix E), as bitsandbytes stores them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def round_e4m3(x: Tensor) -> Tensor:
    """fp32 to the nearest e4m3 number; what is beyond +-448 becomes that."""
    return x.clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn).float()


def round_e2m1(x: Tensor) -> Tensor:
    """fp32 to the nearest e2m1 number, ties to even."""
    size = x.abs()
    index = torch.zeros_like(size, dtype=torch.int64)
    for i, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        index += (size > middle) if i % 2 == 0 else (size >= middle)
    return torch.tensor(E2M1, device=x.device)[index].copysign(x)


@dataclass(frozen=True, slots=True)
class Fp8Grid:
    """e4m3 times a scale."""

    scale_per: Literal["row", "matrix", "block"]  # block: 128 x 128
    bits: int = 8

    @property
    def group_size(self) -> int:
        """As in Grid."""
        return BLOCK if self.scale_per == "block" else 0

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """As in Grid. Ragged blocks at the edges are allowed."""

    def fit(self, weight: Tensor, peak: Tensor, dtype: torch.dtype) -> Scales:
        """As in Grid."""
        if self.scale_per == "matrix":
            peaks = peak.expand(len(weight), 1)
        elif self.scale_per == "row":
            peaks = weight.abs().amax(1, keepdim=True)
        else:
            columns = grouped(weight, BLOCK).abs().amax(-1)
            tall = torch.nn.functional.pad(columns, (0, 0, 0, -len(weight) % BLOCK)).unflatten(0, (-1, BLOCK)).amax(1)
            peaks = tall.repeat_interleave(BLOCK, 0)[: len(weight)]
        return Scales((peaks / FP8_MOST).clamp(min=_SMALLEST).to(dtype).float())

    def snap(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """As in Grid."""
        return round_e4m3(weight / scale) * scale

    def scale_bits(self, outputs: int, inputs: int) -> int:
        """As in Grid."""
        count = {"row": outputs, "matrix": 1, "block": -(-outputs // BLOCK) * -(-inputs // BLOCK)}[self.scale_per]
        return 16 * count


@dataclass(frozen=True, slots=True)
class Mxfp4Grid:
    """e2m1 times a power of two for 32 columns (OCP Microscaling Formats 1.0)."""

    searches_exponent: bool = True
    """The standard's exponent or one less or more, by squared error: what is stored is MXFP4 all the same."""
    group_size: int = 32
    bits: int = 4

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """As in Grid."""
        if inputs % self.group_size:
            raise CompressError(f"{name}: MXFP4's groups of {self.group_size} do not divide its {inputs} inputs")

    def fit(self, weight: Tensor, peak: Tensor, dtype: torch.dtype) -> Scales:
        """As in Grid."""
        groups = grouped(weight, self.group_size)
        exponent = groups.abs().amax(-1).clamp(min=2.0**-120).log2().floor() - 2
        if not self.searches_exponent:
            return Scales(exponent.exp2())
        tried = torch.stack([(exponent + step).exp2() for step in (0, -1, 1)])
        errors = torch.stack([(self.snap(groups, t[..., None], None) - groups).square().sum(-1) for t in tried])
        return Scales(tried.gather(0, errors.argmin(0, keepdim=True))[0])

    def snap(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """As in Grid."""
        return round_e2m1(weight / scale) * scale

    def scale_bits(self, outputs: int, inputs: int) -> int:
        """As in Grid."""
        return 8 * outputs * (inputs // self.group_size)


@dataclass(frozen=True, slots=True)
class Nvfp4Grid:
    """e2m1 times an e4m3 scale for 16 columns, over a divisor of the matrices that share a product."""

    group_size: int = 16
    bits: int = 4

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """As in Grid."""
        if inputs % self.group_size:
            raise CompressError(f"{name}: NVFP4's groups of {self.group_size} do not divide its {inputs} inputs")

    def fit(self, weight: Tensor, peak: Tensor, dtype: torch.dtype) -> Scales:
        """As in Grid."""
        divisor = FP8_MOST * FP4_MOST / peak.clamp(min=_SMALLEST)
        peaks = grouped(weight, self.group_size).abs().amax(-1)
        stored = round_e4m3(peaks / FP4_MOST * divisor).clamp(min=2.0**-9)  # the smallest e4m3 number
        return Scales(stored / divisor, divisor=divisor)

    def snap(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """As in Grid."""
        return round_e2m1(weight / scale) * scale

    def scale_bits(self, outputs: int, inputs: int) -> int:
        """As in Grid."""
        return 8 * outputs * (inputs // self.group_size) + 32


@dataclass(frozen=True, slots=True)
class Nf4Grid:
    """The sixteen numbers of QLoRA (arXiv:2305.14314) times the largest magnitude of 64 columns."""

    group_size: int = 64
    bits: int = 4

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """As in Grid."""
        if inputs % self.group_size:
            raise CompressError(f"{name}: NF4's groups of {self.group_size} do not divide its {inputs} inputs")

    def fit(self, weight: Tensor, peak: Tensor, dtype: torch.dtype) -> Scales:
        """As in Grid."""
        return Scales(grouped(weight, self.group_size).abs().amax(-1).clamp(min=_SMALLEST))

    def snap(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """As in Grid."""
        levels = torch.tensor(NF4, device=weight.device)
        return levels[nf4_codes(weight / scale)] * scale

    def scale_bits(self, outputs: int, inputs: int) -> int:
        """As in Grid."""
        return 32 * outputs * (inputs // self.group_size)


def nf4_codes(x: Tensor) -> Tensor:
    """int64: which of the sixteen numbers is nearest."""
    levels = torch.tensor(NF4, device=x.device)
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)
