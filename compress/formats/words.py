"""Small integers packed several to a word or byte. The way back is workers.model.quant.words."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD_BITS = 32


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, columns] -> int32 [rows, columns / per word], the first column in the lowest bits."""
    per_word = _WORD_BITS // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (padded << (torch.arange(per_word, device=codes.device) * bits)).sum(-1)
    signed: Tensor = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return signed


def pack_halves(codes: Tensor, high_first: bool = False) -> Tensor:
    """4-bit codes [rows, columns] -> uint8 [rows, columns / 2], the first in the lower half, or in the higher."""
    pairs: Tensor = codes.to(torch.uint8).unflatten(1, (-1, 2))
    first, second = (pairs[..., 1], pairs[..., 0]) if high_first else (pairs[..., 0], pairs[..., 1])
    return first | (second << 4)
