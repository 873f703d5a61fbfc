"""Small integers that are stored several to a word. Knows nothing of formats."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., words] -> uint8 [..., words * 32 / bits]: the lowest bits first, codes across words where they do not
    fit (3 bits)."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.to(torch.uint8).flatten(-2)
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    single: Tensor = ((words.unsqueeze(-1) >> places) & 1).to(torch.uint8).flatten(-2).unflatten(-1, (-1, bits))
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=words.device)
    return (single * weights).sum(-1, dtype=torch.uint8)


def nibbles(values: Tensor, high_first: bool = False) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n], below 16."""
    low, high = values & 0xF, values >> 4
    return torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(-2)


def span(part: slice, per_word: int) -> slice:
    """The words that hold these codes, which begin and end on words; the last word may be filled up."""
    return slice(part.start // per_word, -(-part.stop // per_word))
