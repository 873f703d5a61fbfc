"""Integers of a few bits, by row or by group, with or without a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.grids.grid import Scales, grouped

_SMALLEST = 1e-10  # scale of a group of zeros


@dataclass(frozen=True, slots=True)
class IntGrid:
    """Codes -2^(bits-1) .. 2^(bits-1) - 1."""

    bits: int
    group_size: int = 0  # 0: a scale for each row
    is_symmetric: bool = True
    searches_range: bool = False
    """Try ranges smaller than a group's extremes, and keep the one with the least squared error."""
    is_balanced: bool = False  # without -2^(bits-1): as many codes below 0 as above

    @property
    def least(self) -> int:
        """The smallest code."""
        return int(self.is_balanced) - (1 << (self.bits - 1))

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """As in Grid."""
        if self.group_size and inputs % self.group_size:
            raise CompressError(f"{name}: groups of {self.group_size} do not divide its {inputs} inputs")
        if not self.is_symmetric and self.group_size and outputs % (32 // self.bits):
            raise CompressError(f"{name}: zero points are packed by {32 // self.bits}, which {outputs} rows are not")

    def fit(self, weight: Tensor, peak: Tensor, dtype: torch.dtype) -> Scales:
        """As in Grid."""
        groups = grouped(weight, self.group_size)
        if not self.searches_range:
            return self._scales(groups, 1.0, dtype)
        best, least = None, torch.full(groups.shape[:2], float("inf"), device=weight.device)
        for step in range(41):
            tried = self._scales(groups, 1 - step / 80, dtype)
            zeros = None if tried.zeros is None else tried.zeros[..., None]
            error = (self.snap(groups, tried.values[..., None], zeros) - groups).abs().pow(2.4).sum(-1)
            if best is None:
                best, least = tried, error
            else:
                is_better = error < least
                best = _choose(is_better, tried, best)
                least = torch.where(is_better, error, least)
        assert best is not None
        return best

    def _scales(self, groups: Tensor, share: float, dtype: torch.dtype) -> Scales:
        """By a share of each group's range."""
        if self.is_symmetric:
            scale = groups.abs().amax(-1) * share * 2 / (self.most - self.least)
            return Scales(scale.clamp(min=_SMALLEST).to(dtype).float())
        low, high = groups.amin(-1).clamp(max=0) * share, groups.amax(-1).clamp(min=0) * share
        scale = ((high - low) / (self.most - self.least)).clamp(min=_SMALLEST).to(dtype).float()
        zero = (self.least - low / scale).round().clamp(self.least, self.most)
        return Scales(scale, zero)

    def snap(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """As in Grid."""
        if zero is None:
            return (weight / scale).round().clamp(self.least, self.most) * scale
        return ((weight / scale + zero).round().clamp(self.least, self.most) - zero) * scale

    def scale_bits(self, outputs: int, inputs: int) -> int:
        """As in Grid."""
        count = outputs * (inputs // self.group_size if self.group_size else 1)
        return count * (16 if self.is_symmetric else 16 + self.bits)


def _choose(is_first: Tensor, first: Scales, second: Scales) -> Scales:
    zeros = None
    if first.zeros is not None and second.zeros is not None:
        zeros = torch.where(is_first, first.zeros, second.zeros)
    return Scales(torch.where(is_first, first.values, second.values), zeros)
