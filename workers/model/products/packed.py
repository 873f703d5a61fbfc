"""Grouped weights in the layouts that the CUDA kernels read: up to 4 bits as 4, more as 8.

Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm import codes4, codes8
from workers.model.quant.weights import GroupedWeight

_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """Inputs are padded with weights of zero. The layouts are those of kernels.gemm.w4a16 and w8a16."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    table: codes4.Table | None
    bits: int  # 4 or 8
    num_added_inputs: int

    @classmethod
    def of(cls, weight: GroupedWeight, dtype: torch.dtype) -> PackedCodes:
        """A weight that has a group_of."""
        group = group_of(weight)
        assert group is not None
        layout = codes4 if is_narrow(weight) else codes8
        lanes = layout.lanes_of(group)
        padding = -weight.codes.shape[1] % (layout.CODES_PER_WORD * lanes)

        def per_group(parameter: Tensor | None) -> Tensor | None:
            if parameter is None:
                return None
            repeated = parameter.repeat_interleave(weight.group_size // group, 1)
            return F.pad(repeated, (0, padding // group)).T.contiguous()

        scales, offsets = per_group(weight.scales.to(dtype)), per_group(weight.offsets)
        assert scales is not None
        codes = weight.codes
        if weight.zeros is None and weight.table is None:
            codes = codes + (layout.SYMMETRIC_ZERO - 2 ** (weight.bits - 1))
        return cls(
            layout.pack(F.pad(codes, (0, padding)), lanes),
            scales,
            per_group(weight.zeros),
            None if offsets is None else offsets.to(dtype),
            table_of(weight),
            4 if layout is codes4 else 8,
            padding,
        )


def is_narrow(weight: GroupedWeight) -> bool:
    """Whether its codes are packed as 4 bits."""
    return weight.bits <= 4


def group_of(weight: GroupedWeight) -> int | None:
    """Inputs per scale of the packed weight: a part of the weight's own. None where no kernel has them."""
    group = math.gcd(weight.group_size, _GROUPS[-1])
    has_layout = is_narrow(weight) or weight.table is None
    return group if has_layout and group in _GROUPS else None


def table_of(weight: GroupedWeight) -> codes4.Table | None:
    """As the kernels take it."""
    if weight.table is None:
        return None
    return (*weight.table.tolist(), *[0.0] * (16 - len(weight.table)))
