"""Scales moved from a product's inputs into its weights, column by column: AWQ and SmoothQuant.

x W^T = (x / s) (W s)^T. AWQ (arXiv:2306.00978) makes the weights of large inputs larger, so that rounding hurts them
less. SmoothQuant (arXiv:2211.10438) makes large input columns smaller, so that rounding the inputs hurts less. Both try
a few strengths and keep the one with the least output error. Whoever makes the inputs must divide them by s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibration.statistics import InputStatistics
from compress.grids.grid import Grid, grouped
from compress.methods.nearest import round_to_nearest
from compress.schemes import Scheme

_SMALLEST = 1e-5
_AWQ_STEPS = 20
_SMOOTHQUANT_ALPHAS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


@dataclass(frozen=True, slots=True)
class Consumers:
    """Matrices that have one input."""

    weights: Sequence[Tensor]  # fp32 [outputs, inputs] each
    statistics: InputStatistics
    scheme: Scheme
    dtype: torch.dtype  # of stored scales

    def error(self, factors: Tensor) -> float:
        """Mean squared change of all outputs, when the weights are multiplied by these factors, and rounded."""
        return sum(self._error(weight, factors) for weight in self.weights)

    def _error(self, weight: Tensor, factors: Tensor) -> float:
        grid, rounding = self.scheme.grid, self.scheme.activations
        assert grid is not None
        scaled = weight * factors
        rounded = round_to_nearest(scaled, grid, scaled.abs().max(), self.dtype).values
        if rounding is None:
            return self.statistics.output_error(rounded / factors - weight)
        rows, scale = self.statistics.rows / factors, rounding.scale_of(self.statistics.peak / factors)
        change = rounding.round(rows, scale) @ rounded.T - self.statistics.rows @ weight.T
        return float(change.square().sum() / max(1, len(rows)))


def awq_factors(consumers: Consumers) -> Tensor:
    """fp32 [inputs]; ones where nothing is better."""
    size = consumers.statistics.mean_magnitude.clamp(min=1e-8)
    tried = [_centred(size ** (step / _AWQ_STEPS)) for step in range(_AWQ_STEPS)]  # the first are ones
    return _best(consumers.error, tried)


def smoothquant_factors(consumers: Consumers) -> Tensor:
    """fp32 [inputs]; ones where nothing is better."""
    inputs = consumers.statistics.peak.clamp(min=_SMALLEST)
    weights = torch.stack([weight.abs().amax(0) for weight in consumers.weights]).amax(0).clamp(min=_SMALLEST)
    tried = [(inputs**alpha / weights ** (1 - alpha)).clamp(min=_SMALLEST) for alpha in _SMOOTHQUANT_ALPHAS]
    return _best(consumers.error, [torch.ones_like(inputs), *tried])


def _best(error: Callable[[Tensor], float], tried: Sequence[Tensor]) -> Tensor:
    errors = [error(factors) for factors in tried]
    return tried[errors.index(min(errors))]


def _centred(factors: Tensor) -> Tensor:
    return factors / (factors.max() * factors.min()).sqrt()


def clip_to_best_range(weight: Tensor, statistics: InputStatistics, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Weights cut off where their group's output error becomes least: at 100 % to 50 % of the largest magnitude."""
    hessian, size = statistics.hessian, grid.group_size or weight.shape[1]
    if hessian is None or weight.shape[1] % size:
        return weight
    blocks = hessian.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    groups, peak = grouped(weight, size), weight.abs().max()
    most = groups.abs().amax(-1, keepdim=True)
    best, least = groups, torch.full_like(most, float("inf"))
    for step in range(20):
        limit = most * (1 - step / 40)
        clipped = torch.minimum(torch.maximum(groups, -limit), limit)
        rounded = grouped(round_to_nearest(clipped.flatten(1), grid, peak, dtype).values, size)
        change = rounded - groups
        error = (torch.einsum("ogi,gij->ogj", change, blocks) * change).sum(-1, keepdim=True)
        best = torch.where(error < least, clipped, best)
        least = torch.minimum(error, least)
    return best.flatten(1)
