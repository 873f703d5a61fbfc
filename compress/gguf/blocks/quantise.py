"""Rows of numbers to rows of blocks, whatever their type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from checkpoint.gguf.block_types import QUANTISED
from compress.gguf.blocks import k_quants, points, simple

_VALUES_AT_ONCE = 1 << 18
_POINT_VALUES_AT_ONCE = 1 << 16  # 256 products of each are held

_KINDS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "Q4_0": simple.q4_0,
    "Q5_0": simple.q5_0,
    "Q5_1": simple.q5_1,
    "Q8_0": simple.q8_0,
    "IQ4_NL": simple.iq4_nl,
    "Q4_K": k_quants.q4_k,
    "Q5_K": k_quants.q5_k,
    "Q6_K": k_quants.q6_k,
    "IQ2_XXS": points.iq2_xxs,
    "IQ3_XXS": points.iq3_xxs,
}
"""By type: fp32 [n, block_size] and what an error weighs at each number, positive, of the same shape (None: the same
everywhere) -> uint8 [n, block_bytes]."""
BLOCK_KINDS = tuple(_KINDS)


def quantise(kind: str, rows: Tensor, importances: Tensor | None = None) -> Tensor:
    """fp32 [rows, columns] to one of BLOCK_KINDS: uint8 [rows, row_bytes].

    importances: fp32 [columns], the mean square of what each column is multiplied by; None: errors of all columns weigh
    the same.
    """
    block = QUANTISED[kind]
    blocks = rows.reshape(-1, block.block_size)
    columns = None if importances is None else _spread(importances).view(-1, block.block_size)
    made = torch.empty(len(blocks), block.block_bytes, dtype=torch.uint8, device=rows.device)
    at_once = _POINT_VALUES_AT_ONCE if kind in ("IQ2_XXS", "IQ3_XXS") else _VALUES_AT_ONCE
    step = max(1, at_once // block.block_size)
    for begin in range(0, len(blocks), step):
        x = blocks[begin : begin + step].contiguous()
        made[begin : begin + step] = _KINDS[kind](x, _weights(x, columns, begin))
    return made.view(len(rows), -1)


def _spread(importances: Tensor) -> Tensor:
    """With a mean of 1, and none so small that its column is given up."""
    mean = importances.mean()
    return torch.ones_like(importances) if mean <= 0 else (importances / mean).clamp(min=1e-4)


def _weights(x: Tensor, columns: Tensor | None, begin: int) -> Tensor | None:
    """As ggml has it: columns' importances, and within a block larger numbers weigh a little more."""
    if columns is None:
        return None
    of_blocks = columns[torch.arange(begin, begin + len(x), device=x.device) % len(columns)]
    return of_blocks * (x.square().mean(1, keepdim=True) + x.square()).sqrt().clamp(min=1e-12)
