"""Writes fields of blocks as bytes: the inverse of workers.model.quant.gguf_blocks.fields. Knows no block type."""

from __future__ import annotations

import torch
from torch import Tensor


def half_bytes(numbers: Tensor) -> Tensor:
    """fp32 [n] -> uint8 [n, 2], each as a 16-bit float."""
    return numbers.to(torch.float16).contiguous().view(torch.uint8).view(-1, 2)


def as_half(numbers: Tensor) -> Tensor:
    """fp32: what is left of numbers that are stored in 16 bits."""
    return numbers.to(torch.float16).float()


def word_bytes(words: Tensor) -> Tensor:
    """int64 [n, m] below 2^32 -> uint8 [n, 4 * m], little-endian."""
    shifts = 8 * torch.arange(4, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).flatten(1)


def joined(parts: Tensor, bits: int) -> Tensor:
    """Codes of a few bits to bytes, the first part lowest: uint8 [..., 8 / bits, m] -> [..., m]."""
    packed = torch.zeros_like(parts[..., 0, :], dtype=torch.uint8)
    for index in range(parts.shape[-2]):
        packed |= parts[..., index, :].to(torch.uint8) << (bits * index)
    return packed


def joined_in_turn(parts: Tensor, bits: int) -> Tensor:
    """Neighbouring codes to one byte, the first lowest: uint8 [n, m * 8 / bits] -> [n, m]."""
    return joined(parts.unflatten(1, (-1, 8 // bits)).transpose(1, 2), bits)
