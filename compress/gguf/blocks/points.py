"""Block types whose codes are points of a grid that is not derivable: IQ2_XXS and IQ3_XXS.

A block has 256 numbers in eight groups. A group has a scale of four bits, and for each eight numbers seven signs: the
eighth makes the number of minus signs even, so where it is odd, the number that costs least is turned. For each vector
of four or eight magnitudes all 256 points are compared: with products p = sum(w x g) and squares q = sum(w g g), the
error of a point at scale s is s s q - 2 s p and a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.gguf.blocks.pack import as_half, half_bytes, word_bytes
from compress.gguf.blocks.scales import inverse
from workers.model.quant.gguf_blocks.grids import grid_points

_TINY = 1e-30
_SHARES = (0.6, 0.68, 0.76, 0.83, 0.9, 0.97, 1.05, 1.15)
"""Of the scale that takes a group's largest magnitude to the largest coordinate: those that are tried."""
_REFITS = 2
_UNIT_SHARES = (0.94, 1.0, 1.06)
"""Of the unit that takes the block's largest scale to the largest of four bits: those that are tried."""


@dataclass(frozen=True, slots=True)
class PointType:
    """How a scale s of four bits is meant: d * (0.5 + s) * factor."""

    grid: str
    factor: float


@dataclass(frozen=True, slots=True)
class _Products:
    """Of groups' vectors with all points."""

    twice_p: Tensor  # fp32 [groups, vectors, points]
    q: Tensor

    def least_error(self, scale: Tensor) -> Tensor:
        """[groups]: with the best point for each vector; without the constant."""
        s = scale.view(-1, 1, 1)
        return (self.q * s).sub_(self.twice_p).amin(-1).sum(-1) * scale

    def points(self, scale: Tensor) -> Tensor:
        """int64 [groups, vectors]: the best."""
        return (self.q * scale.view(-1, 1, 1)).sub_(self.twice_p).argmin(-1)

    def sums(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """p and q of these points, [groups]."""
        at = points.unsqueeze(-1)
        return self.twice_p.gather(-1, at).sum((1, 2)) / 2, self.q.gather(-1, at).sum((1, 2))


def iq2_xxs(x: Tensor, weights: Tensor | None) -> Tensor:
    """d; for each group four points' numbers, and a word of signs and scale."""
    d, points, words = _search(x, weights, PointType("iq2_xxs", 0.25))
    of_groups = torch.cat((points.to(torch.uint8).view(-1, 4), word_bytes(words.view(-1, 1))), dim=1)
    return torch.cat((half_bytes(d), of_groups.view(len(x), -1)), dim=1)


def iq3_xxs(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, all points' numbers, all words."""
    d, points, words = _search(x, weights, PointType("iq3_xxs", 0.5))
    return torch.cat((half_bytes(d), points.to(torch.uint8).view(len(x), -1), word_bytes(words.view(-1, 8))), dim=1)


def _search(x: Tensor, weights: Tensor | None, kind: PointType) -> tuple[Tensor, Tensor, Tensor]:
    """d [n], points int64 [8 n, vectors], words int64 [8 n]."""
    weights = torch.ones_like(x) if weights is None else weights
    magnitudes, turned = _with_even_signs(x.view(-1, 8), weights.reshape(-1, 8))
    grid = grid_points(kind.grid, x.device)
    vectors, its_weights = magnitudes.reshape(-1, grid.shape[1]), weights.reshape(-1, grid.shape[1])
    of_group = 32 // grid.shape[1]
    twice_p = (2 * vectors * its_weights) @ grid.T
    products = _Products(twice_p.unflatten(0, (-1, of_group)), (its_weights @ grid.T**2).unflatten(0, (-1, of_group)))
    scale = _group_scales(products, magnitudes.view(-1, 32).amax(1) / grid.max())
    d, codes = _four_bit_scales(products, scale.view(-1, 8), kind.factor)
    points = products.points((d.unsqueeze(1) * (0.5 + codes) * kind.factor).view(-1))
    signs = ((turned[:, :7].long() << torch.arange(7, device=x.device)).sum(1)).view(-1, 4)
    packed = (signs << (7 * torch.arange(4, device=x.device))).sum(1)
    return d, points, packed | (codes.long().view(-1) << 28)


def _with_even_signs(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 8] -> magnitudes, of which one may be negative, and which numbers have a minus sign."""
    is_minus = x < 0
    is_odd = is_minus.sum(1, keepdim=True) % 2 == 1
    cheapest = torch.zeros_like(is_minus).scatter_(1, (weights * x * x).argmin(1, keepdim=True), True)
    is_minus = is_minus ^ (cheapest & is_odd)
    return torch.where(is_minus, -x, x), is_minus


def _group_scales(products: _Products, whole: Tensor) -> Tensor:
    """[groups]: the best of a few, refitted to the points that they choose."""
    whole = whole.clamp(min=0)
    tried = torch.stack([whole * share for share in _SHARES])
    errors = torch.stack([products.least_error(scale) for scale in tried])
    scale = tried.gather(0, errors.argmin(0, keepdim=True))[0]
    for _ in range(_REFITS):
        p, q = products.sums(products.points(scale))
        scale = (p / q.clamp(min=_TINY)).clamp(min=0)
    return scale


def _four_bit_scales(products: _Products, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """scale [n, 8] -> d [n], and codes [n, 8]: those of a few pairs with the least error."""
    start = scale.amax(1) / (15.5 * factor)
    d, codes, least = _codes_at(products, scale, start, factor)
    for share in (*_UNIT_SHARES, 0.0):
        unit = start * share if share else _refitted(products, d, codes, factor)
        other, other_codes, error = _codes_at(products, scale, unit, factor)
        is_better = error < least
        d, least = torch.where(is_better, other, d), torch.where(is_better, error, least)
        codes = torch.where(is_better.unsqueeze(1), other_codes, codes)
    return d, codes


def _codes_at(products: _Products, scale: Tensor, unit: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """The unit as it is stored, the best codes near the wanted scales, and the block's error."""
    d = as_half(unit)
    near = (scale * inverse(d * factor).unsqueeze(1) - 0.5).round()
    tried = torch.stack([(near + step).clamp(0, 15) for step in (-1, 0, 1)])
    errors = torch.stack(
        [products.least_error((d.unsqueeze(1) * (0.5 + codes) * factor).view(-1)).view(-1, 8) for codes in tried]
    )
    least, best = errors.min(0)
    return d, tried.gather(0, best.unsqueeze(0))[0], least.sum(1)


def _refitted(products: _Products, d: Tensor, codes: Tensor, factor: float) -> Tensor:
    """The unit that is best for these codes and their points."""
    meant = (0.5 + codes) * factor
    p, q = products.sums(products.points((d.unsqueeze(1) * meant).view(-1)))
    return (p.view(-1, 8) * meant).sum(1) / (q.view(-1, 8) * meant**2).sum(1).clamp(min=_TINY)
