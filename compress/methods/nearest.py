"""Each weight to its nearest number of the grid (RTN)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.grids.grid import Grid, group_of_column, nearest
from compress.rounded import RoundedMatrix


def round_to_nearest(weight: Tensor, grid: Grid, peak: Tensor, dtype: torch.dtype) -> RoundedMatrix:
    """weight fp32 [outputs, inputs]; peak and dtype as in Grid.fit."""
    scales = grid.fit(weight, peak, dtype)
    return RoundedMatrix(
        grid, nearest(grid, weight, scales), scales, group_of_column(grid, weight.shape[1], weight.device)
    )
