"""Linear layers that compute with rounded weights and train the numbers behind them (straight-through: the gradient
passes a rounding as if it were not there). Each stores itself as a server reads it.

W4: four bits and a scale for each 64 inputs, the scales trained too (arXiv:1902.08153). Ternary: -1, 0 and 1 times the
mean magnitude, inputs in 8 bits per token (BitNet b1.58, arXiv:2402.17764). Knows nothing of models, data or losses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.grids.grid import Scales, group_of_column
from compress.grids.integer import IntGrid
from compress.rounded import RoundedMatrix
from compress.schemes import scheme_named
from compress.stored import StoredModel

GROUP_SIZE = 64
_INT8_MOST = 127.0
_SMALLEST = 1e-8
_TERNARY_PER_BYTE = 4


class _Through(torch.autograd.Function):
    """round(x), with the gradient of x."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class _AsStored(torch.autograd.Function):
    """x as bfloat16 has it, with the gradient of x."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).float()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def _through(function: type[torch.autograd.Function], x: Tensor) -> Tensor:
    found: Tensor = function.apply(x)
    return found


class W4Linear(nn.Module):
    """Codes -8 .. 7 times a scale for each group, as compressed-tensors stores W4A16."""

    def __init__(self, weight: Tensor, searches_range: bool = True) -> None:
        super().__init__()
        grid = scheme_named("w4a16", GROUP_SIZE, searches_range).grid
        assert isinstance(grid, IntGrid)
        self.grid = grid
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(grid.fit(weight.detach(), weight.detach().abs().max(), torch.bfloat16).values)

    def _stored_scale(self) -> Tensor:
        return _through(_AsStored, self.scale.clamp(min=_SMALLEST))

    def rounded(self) -> Tensor:
        """fp32 [outputs, inputs]: what is computed with."""
        scale = self._stored_scale().unsqueeze(-1)
        scaled = self.weight.unflatten(1, (-1, GROUP_SIZE)) / scale
        return (_through(_Through, scaled).clamp(self.grid.least, self.grid.most) * scale).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded())

    @torch.no_grad()
    def stored(self, encoder: StoredModel) -> dict[str, Tensor]:
        """Tensors by the part of their names behind the matrix's. encoder: of the model's file format."""
        groups = group_of_column(self.grid, self.weight.shape[1])
        matrix = RoundedMatrix(self.grid, self.rounded(), Scales(self._stored_scale()), groups)
        return encoder.encode(matrix, torch.bfloat16, None)


class TernaryLinear(nn.Module):
    """-1, 0 and 1 times the weights' mean magnitude; inputs in 8 bits per token."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def _scale(self) -> Tensor:
        return self.weight.detach().abs().mean().clamp(min=_SMALLEST)

    def _codes(self) -> Tensor:
        return _through(_Through, self.weight / self._scale()).clamp(-1, 1)

    def rounded(self) -> Tensor:
        """As in W4Linear. A weight beyond the outer codes has no gradient."""
        return self._codes() * self._scale()

    def forward(self, x: Tensor) -> Tensor:
        peak = x.detach().abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
        rounded = _through(_Through, x * (_INT8_MOST / peak)) * (peak / _INT8_MOST)
        return F.linear(rounded, self.rounded())

    @torch.no_grad()
    def stored(self, encoder: StoredModel) -> dict[str, Tensor]:
        """As in W4Linear: the layout of transformers' BitNet, whose scale multiplies."""
        parts = (self._codes() + 1).to(torch.uint8).unflatten(0, (_TERNARY_PER_BYTE, -1))
        packed = torch.zeros_like(parts[0])
        for index, part in enumerate(parts):
            packed |= part << (2 * index)
        return {"weight": packed, "weight_scale": self._scale().reshape(1)}


RoundedLinear = W4Linear | TernaryLinear
