"""Block types of 256 numbers in groups, whose scales are small integers times one of the block's: Q4_K, Q5_K, Q6_K."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.gguf.blocks.pack import as_half, half_bytes, joined
from compress.gguf.blocks.scales import affine_codes, best_affine, best_scales, inverse, whole_reaches

_BLOCK = 256
_MOST_SCALE = 63  # six bits


def q4_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, dmin, scales and minima, nibbles of pairs of groups."""
    head, codes = _affine(x, weights, 15)
    return torch.cat((head, _nibbles(codes)), dim=1)


def q5_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, dmin, scales and minima, fifth bits, nibbles of pairs of groups."""
    head, codes = _affine(x, weights, 31)
    return torch.cat((head, joined((codes >> 4).unflatten(1, (8, 32)), 1), _nibbles(codes & 15)), dim=1)


def _nibbles(codes: Tensor) -> Tensor:
    return joined(codes.unflatten(1, (4, 2, 32)), 4).flatten(1)


def _affine(x: Tensor, weights: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """The first sixteen bytes, and codes [n, 256]."""
    groups, group_weights = x.view(-1, 32), None if weights is None else weights.reshape(-1, 32)
    scale, offset = best_affine(groups, group_weights, most, is_below_zero=True)
    d, scales = _small(scale.view(-1, 8))
    dmin, minima = _small(-offset.view(-1, 8))
    meant, below = (d.unsqueeze(1) * scales).view(-1, 1), (dmin.unsqueeze(1) * minima).view(-1, 1)
    codes = affine_codes(groups, meant, -below, most).to(torch.uint8).view(-1, _BLOCK)
    head = torch.cat((half_bytes(d), half_bytes(dmin), _six_bits(scales.to(torch.uint8), minima.to(torch.uint8))), 1)
    return head, codes


def _small(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 8], none negative, as a 16-bit float for each block times integers of six bits."""
    unit = as_half(numbers.amax(1) / _MOST_SCALE)
    return unit, (numbers * inverse(unit).unsqueeze(1)).round().clamp(0, _MOST_SCALE)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """uint8 [n, 8] twice -> [n, 12]: the first four in low bits; of the others four bits last, two above the first."""
    (scale, scale_late), (low, low_late) = scales.split(4, dim=1), minima.split(4, dim=1)
    first, second = scale | ((scale_late >> 4) << 6), low | ((low_late >> 4) << 6)
    return torch.cat((first, second, (scale_late & 15) | ((low_late & 15) << 4)), dim=1)


def q6_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """Low nibbles, high pairs of bits, int8 scales of sixteen, d."""
    groups = x.view(-1, 16)
    group_weights = None if weights is None else weights.reshape(-1, 16)
    scale = best_scales(groups, group_weights, whole_reaches(-32), lambda t: t.round_().clamp_(-32, 31)).view(-1, 16)
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]
    d = as_half(peak / -128)
    small = (scale * inverse(d).unsqueeze(1)).round().clamp(-128, 127)
    meant = (d.unsqueeze(1) * small).view(-1, 1)
    codes = (groups * inverse(meant)).round_().clamp_(-32, 31).add_(32).to(torch.uint8).view(-1, _BLOCK)
    low = joined((codes & 15).unflatten(1, (2, 2, 64)), 4).flatten(1)
    high = joined((codes >> 4).unflatten(1, (2, 4, 32)), 2).flatten(1)
    return torch.cat((low, high, small.to(torch.int8).view(torch.uint8), half_bytes(d)), dim=1)
