"""Block types of 32 numbers: Q4_0, Q5_0, Q5_1, Q8_0 and IQ4_NL."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compress.gguf.blocks.pack import as_half, half_bytes, joined, joined_in_turn
from compress.gguf.blocks.scales import affine_codes, best_affine, best_scales, inverse, reaches, whole_reaches
from workers.model.quant.gguf_blocks.levels import IQ4_LEVELS


def _rounded(x: Tensor, weights: Tensor | None, half_range: int) -> tuple[Tensor, Tensor]:
    """Scales [n], and codes [n, 32] of which half_range is 0."""

    def to_codes(scaled: Tensor) -> Tensor:
        return scaled.round_().clamp_(-half_range, half_range - 1)

    scale = as_half(best_scales(x, weights, whole_reaches(-half_range), to_codes))
    codes = to_codes(x * inverse(scale).unsqueeze(1)).add_(half_range)
    return scale, codes.to(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    """Low nibbles are the first sixteen."""
    return joined((codes & 15).unflatten(1, (2, 16)), 4)


def q4_0(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, nibbles."""
    scale, codes = _rounded(x, weights, 8)
    return torch.cat((half_bytes(scale), _halves(codes)), dim=1)


def q5_0(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, fifth bits, nibbles."""
    scale, codes = _rounded(x, weights, 16)
    return torch.cat((half_bytes(scale), joined_in_turn(codes >> 4, 1), _halves(codes)), dim=1)


def q5_1(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, m, fifth bits, nibbles."""
    scale, offset = (as_half(t) for t in best_affine(x, weights, 31, is_below_zero=False))
    codes = affine_codes(x, scale.unsqueeze(1), offset.unsqueeze(1), 31).to(torch.uint8)
    return torch.cat(
        (half_bytes(scale), half_bytes(offset), joined_in_turn(codes >> 4, 1), _halves(codes)),
        dim=1,
    )


def q8_0(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, bytes: byte for byte what ggml makes, so weights are not looked at."""
    scale = x.abs().amax(1) / 127
    scaled = x * inverse(scale).unsqueeze(1)
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()  # halves are rounded away from 0
    return torch.cat((half_bytes(scale), codes.to(torch.int8).view(torch.uint8)), dim=1)


def iq4_nl(x: Tensor, weights: Tensor | None) -> Tensor:
    """d, nibbles that number sixteen uneven levels."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=x.device)
    borders = torch.tensor([(a + b) / 2 for a, b in pairwise(IQ4_LEVELS)], device=x.device)
    scale = as_half(best_scales(x, weights, reaches(120.0, 12.0), lambda t: levels[torch.bucketize(t, borders)]))
    codes = torch.bucketize(x * inverse(scale).unsqueeze(1), borders).to(torch.uint8)
    return torch.cat((half_bytes(scale), _halves(codes)), dim=1)
