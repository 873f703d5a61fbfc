"""A matrix as a method leaves it: numbers of a grid, and the scales that they are of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.grids.grid import Grid, Scales


@dataclass(frozen=True, slots=True)
class RoundedMatrix:
    """[outputs, inputs], its columns in their own order."""

    grid: Grid
    values: Tensor  # fp32 [outputs, inputs]: numbers of the grid
    scales: Scales
    group_of_column: Tensor  # int64 [inputs]
    has_mixed_groups: bool = False  # whether columns of a group lie apart, as after act-order with permuted groups

    def codes(self) -> Tensor:
        """fp32 [outputs, inputs], before their scales."""
        spread = self.scales.columns(self.group_of_column)
        codes = self.values / spread.values
        return codes if spread.zeros is None else codes + spread.zeros
