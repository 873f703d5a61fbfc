"""The products of a mixture of experts with weights of 2 to 8 bits and a scale per group.

Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.experts.moe_weight_only import ExpertCodes
from workers.model.products.packed import PackedCodes, group_of
from workers.model.quant.weights import GroupedWeight, QuantWeight, joined


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """The layouts are those of kernels.experts.moe_weight_only."""

    gate_up: ExpertCodes
    down: ExpertCodes
    num_added_inputs: int

    @classmethod
    def of(
        cls, gate_ups: Sequence[Sequence[QuantWeight]], downs: Sequence[QuantWeight], dtype: torch.dtype
    ) -> GroupedExperts | None:
        """None for weights of another kind, or of several."""
        up, down = _whole([matrix for expert in gate_ups for matrix in expert]), _whole(downs)
        if dtype not in (torch.bfloat16, torch.float16) or up is None or down is None:
            return None
        count = len(downs)
        second = PackedCodes.of(down, dtype)
        first = PackedCodes.of(_with_rows(up, 2 * count, second.num_added_inputs), dtype)
        return cls(_by_expert(first, count), _by_expert(second, count), first.num_added_inputs)

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        x = F.pad(x, (0, self.num_added_inputs)) if self.num_added_inputs else x
        return kernels.moe_experts_weight_only(x, self.gate_up, self.down, expert_ids, weights)


def _whole(matrices: Sequence[QuantWeight]) -> GroupedWeight | None:
    """All experts' matrices, one below the other, where they are of one kind that the kernel takes."""
    if len({matrix.num_outputs for matrix in matrices}) > 1:
        return None
    whole = joined(matrices)
    if not isinstance(whole, GroupedWeight) or group_of(whole) is None:
        return None
    return whole if whole.input_scheme is None and not whole.inputs_change else None


def _with_rows(whole: GroupedWeight, count: int, num_added: int) -> GroupedWeight:
    """Each of `count` matrices gets rows of zeros at its end."""

    def padded(tensor: Tensor) -> Tensor:
        each: Tensor = F.pad(tensor.unflatten(0, (count, -1)), (0, 0, 0, num_added))
        return each.flatten(0, 1)

    zeros, offsets = (None if every is None else padded(every) for every in (whole.zeros, whole.offsets))
    return replace(whole, codes=padded(whole.codes), scales=padded(whole.scales), zeros=zeros, offsets=offsets)


def _by_expert(whole: PackedCodes, count: int) -> ExpertCodes:
    """[blocks or groups, experts * outputs, ..] -> [experts, blocks or groups, outputs, ..]."""

    def turned(tensor: Tensor) -> Tensor:
        each: Tensor = tensor.unflatten(1, (count, -1)).transpose(0, 1)
        return each.contiguous()

    zeros, offsets = (None if every is None else turned(every) for every in (whole.zeros, whole.offsets))
    return ExpertCodes(turned(whole.codes), turned(whole.scales), zeros, offsets, whole.table, whole.bits)
