"""Rows of blocks to rows of numbers, whatever their type."""

from __future__ import annotations

import torch
from torch import Tensor

from checkpoint.gguf.block_types import QUANTISED
from workers.model.quant.gguf_blocks.affine import AFFINE
from workers.model.quant.gguf_blocks.grids import GRIDS
from workers.model.quant.gguf_blocks.levels import LEVELS

_VALUES_AT_ONCE = 1 << 22  # steps in between take up to 20 bytes a value


def dequantise(kind: str, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [rows, row_bytes] of a type of checkpoint.gguf.block_types.QUANTISED -> dtype [rows, columns]."""
    block = QUANTISED[kind]
    blocks = rows.reshape(-1, block.block_bytes)
    values = torch.empty(len(blocks), block.block_size, dtype=dtype, device=rows.device)
    step = max(1, _VALUES_AT_ONCE // block.block_size)
    for begin in range(0, len(blocks), step):
        values[begin : begin + step] = _values(kind, blocks[begin : begin + step])
    return values.view(len(rows), -1)


def _values(kind: str, blocks: Tensor) -> Tensor:
    if kind in AFFINE:
        return AFFINE[kind](blocks).values()
    return LEVELS[kind](blocks).values() if kind in LEVELS else GRIDS[kind](blocks)
