"""Finds the scale of a group of numbers, by weighted squared error. Knows nothing of how scales are stored.

Groups lie side by side while tries are made, [size, n]: sums over a group are then sums of rows.

Each try takes a scale, rounds the group by it, and then solves for the scale that is best for these codes, as ggml's
quantisers do (make_qx_quants, make_qkx2_quants).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30
_STEPS = (-1.2, -0.8, -0.4, 0.0, 0.4)
"""By how many codes a group's range is tried to be wider or narrower than that of the codes. Thirteen from -1.4 to 1.0
leave 0.1 to 0.8 % less error, and take 2.6 times as long."""


def reaches(extreme: float, unit: float = 1.0) -> tuple[float, ...]:
    """What a group's largest magnitude may become, in units of its scale. extreme: the largest code; unit: from one
    code to the next."""
    return tuple(sign * (extreme + step * unit) for sign in (1.0, -1.0) for step in _STEPS)


def whole_reaches(least: int) -> tuple[float, ...]:
    """The same for the codes least .. -least - 1: where no number reaches the least code, turning all signs changes
    nothing."""
    return tuple(most for most in reaches(-least) if most > 0 or round(most) <= least)


def best_scales(
    x: Tensor, weights: Tensor | None, reach: Sequence[float], to_codes: Callable[[Tensor], Tensor]
) -> Tensor:
    """fp32 [n] of groups [n, size]; 0 for a group of zeros, and negative where its codes should change their signs.

    weights: of the squared errors; None: all are 1. to_codes: numbers in units of the scale to the values of their
    codes; may overwrite them.
    """
    by_number, w = x.T.contiguous(), None if weights is None else weights.T.contiguous()
    low, high = by_number.amin(0), by_number.amax(0)
    peak = torch.where(high >= -low, high, low)
    weighted = by_number if w is None else by_number * w
    scaled, each = torch.empty_like(by_number), torch.empty_like(by_number)
    found, best = torch.zeros_like(peak), torch.zeros_like(peak)
    of_peak = inverse(peak)
    for most in reach:
        codes = to_codes(torch.mul(by_number, of_peak * most, out=scaled))
        product = torch.mul(weighted, codes, out=each).sum(0)
        torch.mul(codes, codes, out=each)
        square = (each if w is None else each.mul_(w)).sum(0).clamp_(min=_TINY)
        scale = product / square
        gain = product.mul_(scale)
        found, best = torch.where(gain > best, scale, found), torch.maximum(gain, best)
    return found


def best_affine(x: Tensor, weights: Tensor | None, most: int, is_below_zero: bool) -> tuple[Tensor, Tensor]:
    """Scales [n] and offsets [n] of groups [n, size] whose codes are 0 .. most: code * scale + offset is meant.

    weights: as in best_scales. is_below_zero: offsets are not above 0.
    """
    above = x.T.contiguous()
    low, high = above.amin(0), above.amax(0)
    if is_below_zero:
        low = low.clamp(max=0)
    reach = high - low
    above -= low
    w = None if weights is None else weights.T.contiguous()
    sums = _sums(above, w, reach, most)
    slope, start = sums.line()
    if is_below_zero:
        is_above = start + low > 0
        slope = torch.where(is_above, (sums.xc + low * sums.c) / sums.cc.clamp(min=_TINY), slope)
        start = torch.where(is_above, -low, start)
    errors = sums.error(slope, start).masked_fill((sums.determinant <= 0) | (slope <= 0), float("inf"))
    least, best = errors.min(0, keepdim=True)
    plain = torch.where(reach > 0, reach / most, 0.0)  # the range itself, with the codes that it gives
    is_better = (least < sums.error(plain, torch.zeros_like(plain))[_STEPS.index(0.0)])[0]
    scale = torch.where(is_better, slope.gather(0, best)[0], plain)
    return scale, torch.where(is_better, start.gather(0, best)[0] + low, low)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over a group, of weights w, codes c, and what numbers lie above the group's least, x: fp32 [n], and for those
    with codes [tries, n]."""

    w: Tensor
    x: Tensor
    xx: Tensor
    c: Tensor
    cc: Tensor
    xc: Tensor

    @property
    def determinant(self) -> Tensor:
        """Of the equations for the best line; 0 where all codes are equal."""
        return self.w * self.cc - self.c * self.c

    def line(self) -> tuple[Tensor, Tensor]:
        """Slopes and starts with the least error."""
        determinant = self.determinant.clamp(min=_TINY)
        slope = (self.w * self.xc - self.x * self.c) / determinant
        return slope, (self.cc * self.x - self.c * self.xc) / determinant

    def error(self, slope: Tensor, start: Tensor) -> Tensor:
        """sum of w (c slope + start - x)^2."""
        squares = slope * slope * self.cc + start * start * self.w + self.xx
        return squares + 2 * (slope * start * self.c - slope * self.xc - start * self.x)


def _sums(above: Tensor, w: Tensor | None, reach: Tensor, most: int) -> _Sums:
    """above [size, n]; codes of ranges that are a little wider or narrower."""
    weighted = above if w is None else above * w
    total = torch.full_like(reach, len(above)) if w is None else w.sum(0)
    c, cc, xc = (torch.empty(len(_STEPS), len(reach), device=above.device) for _ in range(3))
    codes, each = torch.empty_like(above), torch.empty_like(above)
    xx = torch.mul(weighted, above, out=each).sum(0)
    for i, step in enumerate(_STEPS):
        torch.mul(above, (most + step) / reach.clamp(min=_TINY), out=codes).round_().clamp_(max=most)
        torch.sum(torch.mul(weighted, codes, out=each), 0, out=xc[i])
        wc = codes if w is None else torch.mul(codes, w, out=each)
        torch.sum(wc, 0, out=c[i])
        torch.sum(torch.mul(wc, codes, out=each), 0, out=cc[i])
    return _Sums(total, weighted.sum(0), xx, c, cc, xc)


def affine_codes(x: Tensor, scale: Tensor, offset: Tensor, most: int) -> Tensor:
    """fp32: the nearest codes; 0 where the scale is 0."""
    return (x - offset).mul_(inverse(scale)).round_().clamp_(0, most)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for 0."""
    return torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
