"""Block types whose 4-bit codes are looked up in a table of sixteen levels: IQ4_NL, IQ4_XS, MXFP4 and NVFP4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.quant.gguf_blocks.fields import half, spread, words

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of FP4, as scales are halves


@dataclass(frozen=True, slots=True)
class Levels:
    """Values of n blocks: scales * table[codes]."""

    codes: Tensor  # uint8 [n, block_size]
    scales: Tensor  # fp32 [n, groups]; a group is as many values of a block, side by side
    table: Tensor  # fp32 [16]

    def values(self) -> Tensor:
        """fp32 [n, block_size]."""
        numbers = self.table[self.codes.int()].unflatten(1, (self.scales.shape[1], -1))
        values: Tensor = (self.scales.unsqueeze(-1) * numbers).flatten(1)
        return values


def _levels(table: tuple[int, ...], codes: Tensor, scales: Tensor) -> Levels:
    return Levels(codes, scales, torch.tensor(table, dtype=torch.float32, device=codes.device))


def _iq4_nl(blocks: Tensor) -> Levels:
    return _levels(IQ4_LEVELS, spread(blocks[:, 2:], 4).flatten(1), half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Levels:
    high = (words(blocks[:, 2:4], 2) >> (2 * torch.arange(8, device=blocks.device))) & 3
    low = spread(blocks[:, 4:8].unsqueeze(-1), 4).flatten(1)
    scales = half(blocks, 0) * ((low | (high << 4)).float() - 32)
    return _levels(IQ4_LEVELS, spread(blocks[:, 8:].unflatten(1, (8, 16)), 4).flatten(1), scales)


def _mxfp4(blocks: Tensor) -> Levels:
    exponents = blocks[:, :1].int()
    bits = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    return _levels(_E2M1, spread(blocks[:, 1:], 4).flatten(1), bits.view(torch.float32))


def _nvfp4(blocks: Tensor) -> Levels:
    codes = blocks[:, :4].int()
    exponents, mantissas = (codes >> 3) & 15, (codes & 7).float()
    scales = torch.where(exponents == 0, mantissas / 8, 1 + mantissas / 8)
    scales = scales * torch.exp2(exponents.clamp(min=1).float() - 7) / 2
    scales = torch.where((codes == 0) | (codes == 127), 0.0, scales)
    return _levels(_E2M1, spread(blocks[:, 4:].unflatten(1, (4, 8)), 4).flatten(1), scales)


LEVELS: dict[str, Callable[[Tensor], Levels]] = {
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
"""By type: uint8 [n, block_bytes] -> Levels."""
