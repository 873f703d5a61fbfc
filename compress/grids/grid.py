"""What all grids have: scales for groups of columns, and rounding of an element by its scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scales:
    """Of a matrix [outputs, inputs]. What is stored (fp32, 16 bits, e4m3, a power of two) is exactly these numbers."""

    values: Tensor  # fp32 [outputs, groups]: a code times its value is meant
    zeros: Tensor | None = None  # fp32 [outputs, groups]: the code that means 0; None: 0
    divisor: Tensor | None = None  # fp32 []: what two-level scales share

    def at(self, group: int) -> tuple[Tensor, Tensor | None]:
        """Columns [outputs, 1] of one group."""
        zeros = None if self.zeros is None else self.zeros[:, group : group + 1]
        return self.values[:, group : group + 1], zeros

    def columns(self, group_of_column: Tensor) -> Scales:
        """[outputs, inputs]: spread over the columns."""
        zeros = None if self.zeros is None else self.zeros[:, group_of_column]
        return Scales(self.values[:, group_of_column], zeros, self.divisor)


class Grid(Protocol):
    """A frozen dataclass: the numbers that can be stored."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0: all."""

    @property
    def bits(self) -> int:
        """Of a code."""

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Raise CompressError, naming the matrix, unless it can be stored so."""

    def fit(self, weight: Tensor, peak: Tensor, dtype: torch.dtype) -> Scales:
        """The scales of whole groups. weight fp32 [outputs, inputs]; peak: the largest magnitude of the matrices that
        share this product; dtype: of stored scales, where the grid leaves it open."""

    def snap(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest number of the grid, elementwise; scale and zero broadcast."""

    def scale_bits(self, outputs: int, inputs: int) -> int:
        """What is stored beside the codes of a matrix."""


def num_groups(grid: Grid, inputs: int) -> int:
    """Of a row."""
    return -(-inputs // grid.group_size) if grid.group_size else 1


def group_of_column(grid: Grid, inputs: int, device: torch.device | None = None) -> Tensor:
    """int64 [inputs], groups one behind the other."""
    return torch.arange(inputs, device=device) // (grid.group_size or inputs)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[outputs, inputs] -> [outputs, groups, columns]; the last group is filled up with zeros."""
    size = group_size or weight.shape[1]
    filled: Tensor = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    return filled


def nearest(grid: Grid, weight: Tensor, scales: Scales) -> Tensor:
    """Each weight rounded by itself."""
    spread = scales.columns(group_of_column(grid, weight.shape[1], weight.device))
    return grid.snap(weight, spread.values, spread.zeros)
