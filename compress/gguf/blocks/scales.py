"""Finds the scale of a group of numbers, by weighted squared error. Knows nothing of how scales are stored.

Each try takes a scale, rounds the group by it, and then solves for the scale that is best for these codes, as ggml's
quantisers do (make_qx_quants, make_qkx2_quants).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_TINY = 1e-30
_STEPS = tuple(step / 10 for step in range(-14, 11, 2))
"""By how many codes a group's range is tried to be wider or narrower than that of the codes."""


def reaches(extreme: float, unit: float = 1.0) -> tuple[float, ...]:
    """What a group's largest magnitude may become, in units of its scale. extreme: the largest code; unit: from one
    code to the next."""
    return tuple(sign * (extreme + step * unit) for sign in (1.0, -1.0) for step in _STEPS)


def best_scales(x: Tensor, weights: Tensor, reach: Sequence[float], to_codes: Callable[[Tensor], Tensor]) -> Tensor:
    """fp32 [n] of groups [n, size]; 0 for a group of zeros, and negative where its codes should change their signs.

    to_codes: numbers in units of the scale to the values of their codes.
    """
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    found, best = torch.zeros_like(peak), torch.zeros_like(peak)
    weighted = weights * x
    for most in reach:
        codes = to_codes(x * inverse(peak / most))
        product = (weighted * codes).sum(1, keepdim=True)
        square = (weights * codes * codes).sum(1, keepdim=True).clamp(min=_TINY)
        gain = product * product / square
        is_better = gain > best
        found, best = torch.where(is_better, product / square, found), torch.where(is_better, gain, best)
    return found[:, 0]


def best_affine(x: Tensor, weights: Tensor, most: int, is_below_zero: bool) -> tuple[Tensor, Tensor]:
    """Scales [n] and offsets [n] of groups [n, size] whose codes are 0 .. most: code * scale + offset is meant.

    is_below_zero: offsets are not above 0.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if is_below_zero:
        low = low.clamp(max=0)
    reach = high - low
    sum_w, sum_x = weights.sum(1, keepdim=True), (weights * x).sum(1, keepdim=True)
    scale, offset = torch.where(reach > 0, reach / most, 0.0), low
    least = _affine_error(x, weights, scale, offset, most)
    for step in _STEPS:
        codes = ((x - low) * ((most + step) / reach.clamp(min=_TINY))).round().clamp(0, most)
        wc = weights * codes
        sum_c, sum_cc, sum_xc = (t.sum(1, keepdim=True) for t in (wc, wc * codes, wc * x))
        determinant = sum_w * sum_cc - sum_c * sum_c
        slope = (sum_w * sum_xc - sum_x * sum_c) / determinant.clamp(min=_TINY)
        start = (sum_cc * sum_x - sum_c * sum_xc) / determinant.clamp(min=_TINY)
        if is_below_zero:
            slope = torch.where(start > 0, sum_xc / sum_cc.clamp(min=_TINY), slope)
            start = start.clamp(max=0)
        error = (weights * (codes * slope + start - x).square()).sum(1, keepdim=True)
        is_better = (error < least) & (determinant > 0) & (slope > 0)
        scale, offset = torch.where(is_better, slope, scale), torch.where(is_better, start, offset)
        least = torch.where(is_better, error, least)
    return scale[:, 0], offset[:, 0]


def _affine_error(x: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, most: int) -> Tensor:
    codes = affine_codes(x, scale, offset, most)
    return (weights * (codes * scale + offset - x).square()).sum(1, keepdim=True)


def affine_codes(x: Tensor, scale: Tensor, offset: Tensor, most: int) -> Tensor:
    """fp32: the nearest codes; 0 where the scale is 0."""
    return ((x - offset) * inverse(scale)).round().clamp(0, most)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for 0."""
    return torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
