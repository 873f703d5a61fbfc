"""Weights of 4 bits in the layout that the CUDA kernels read. Knows nothing of checkpoints' formats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm import codes4
from workers.model.quant.weights import GroupedWeight

_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Packed4:
    """Inputs are padded with weights of zero. The layouts are those of kernels.gemm.codes4 and w4a16."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    num_added_inputs: int

    @classmethod
    def of(cls, weight: GroupedWeight, dtype: torch.dtype) -> Packed4:
        """A weight that has a group_of. Its offsets stay with the caller."""
        group = group_of(weight)
        assert group is not None
        lanes = codes4.lanes_of(group)
        padding = -weight.codes.shape[1] % (codes4.CODES_PER_WORD * lanes)

        def per_group(parameter: Tensor) -> Tensor:
            repeated = parameter.repeat_interleave(weight.group_size // group, 1)
            return F.pad(repeated, (0, padding // group)).T.contiguous()

        return cls(
            codes4.pack(F.pad(weight.codes, (0, padding)), lanes),
            per_group(weight.scales.to(dtype)),
            None if weight.zeros is None else per_group(weight.zeros),
            padding,
        )


def group_of(weight: GroupedWeight) -> int | None:
    """Inputs per scale of the packed weight: a part of the weight's own. None where no kernel has them."""
    group = math.gcd(weight.group_size, _GROUPS[-1])
    return group if weight.bits == 4 and group in _GROUPS else None


def table_of(weight: GroupedWeight) -> codes4.Table | None:
    """As the kernels take it."""
    return None if weight.table is None else tuple(weight.table.tolist())
