"""Fields of blocks, read from their bytes. Knows nothing of any block type."""

from __future__ import annotations

import torch
from torch import Tensor


def half(blocks: Tensor, begin: int) -> Tensor:
    """The 16-bit float that begins at a byte of each block: uint8 [n, block_bytes] -> fp32 [n, 1]."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16).float()


def words(data: Tensor, num_bytes: int) -> Tensor:
    """Little-endian unsigned integers: uint8 [n, bytes] -> int64 [n, bytes / num_bytes]."""
    parts = data.reshape(len(data), -1, num_bytes).long()
    return (parts << (8 * torch.arange(num_bytes, device=data.device))).sum(-1)


def spread(data: Tensor, bits: int) -> Tensor:
    """The parts of each byte, lowest first, each part of all bytes together: uint8 [..., m] -> [..., 8 / bits, m]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).unsqueeze(-1)
    return (data.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)


def in_turn(data: Tensor, bits: int) -> Tensor:
    """The parts of each byte, lowest first, byte after byte: uint8 [n, m] -> [n, m * 8 / bits]."""
    return spread(data.unsqueeze(-1), bits).reshape(len(data), -1)


def signs(data: Tensor) -> Tensor:
    """1 for a bit that is 0, -1 for one that is 1: uint8 [n, m] -> fp32 [n, m * 8]."""
    return 1.0 - 2.0 * in_turn(data, 1).float()
