"""The products of a mixture of experts with weights of 4 bits and a scale per group.

Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.gemm.codes4 import CODES_PER_WORD, Table, lanes_of
from workers.model.products.packed import PackedCodes, group_of, is_narrow, table_of
from workers.model.quant.weights import GroupedWeight, QuantWeight, joined


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """The layouts are those of kernels.moe_w4a16."""

    gate_up: Tensor
    gate_up_scales: Tensor
    gate_up_zeros: Tensor | None
    down: Tensor
    down_scales: Tensor
    down_zeros: Tensor | None
    table: Table | None
    num_added_inputs: int

    @classmethod
    def of(
        cls, gate_ups: Sequence[Sequence[QuantWeight]], downs: Sequence[QuantWeight], dtype: torch.dtype
    ) -> GroupedExperts | None:
        """None for weights of another kind, or of several."""
        up, down = _whole([matrix for expert in gate_ups for matrix in expert]), _whole(downs)
        if dtype not in (torch.bfloat16, torch.float16) or up is None or down is None:
            return None
        if table_of(up) != table_of(down):
            return None
        block = CODES_PER_WORD * lanes_of(group_of(down) or 0)
        gate_up = PackedCodes.of(_with_rows(up, 2 * len(downs), -down.codes.shape[1] % block), dtype)
        packed_down = PackedCodes.of(down, dtype)
        return cls(
            *_by_expert(gate_up, len(downs)),
            *_by_expert(packed_down, len(downs)),
            table_of(up),
            gate_up.num_added_inputs,
        )

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        return kernels.moe_experts_w4a16(
            F.pad(x, (0, self.num_added_inputs)) if self.num_added_inputs else x,
            self.gate_up, self.down, self.gate_up_scales, self.down_scales, expert_ids, weights,
            self.gate_up_zeros, self.down_zeros, self.table,
        )  # fmt: skip


def _whole(matrices: Sequence[QuantWeight]) -> GroupedWeight | None:
    """All experts' matrices, one below the other, where they are of one kind that the kernel takes."""
    if len({matrix.num_outputs for matrix in matrices}) > 1:
        return None
    whole = joined(matrices)
    if not isinstance(whole, GroupedWeight) or group_of(whole) is None or not is_narrow(whole):
        return None
    is_plain = whole.offsets is None and whole.input_scheme is None and not whole.inputs_change
    return whole if is_plain else None


def _with_rows(whole: GroupedWeight, count: int, num_added: int) -> GroupedWeight:
    """Each of `count` matrices gets rows of zeros at its end."""

    def padded(tensor: Tensor) -> Tensor:
        each: Tensor = F.pad(tensor.unflatten(0, (count, -1)), (0, 0, 0, num_added))
        return each.flatten(0, 1)

    zeros = None if whole.zeros is None else padded(whole.zeros)
    return replace(whole, codes=padded(whole.codes), scales=padded(whole.scales), zeros=zeros)


def _by_expert(whole: PackedCodes, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """[blocks or groups, experts * outputs, ..] -> [experts, blocks or groups, outputs, ..]."""

    def turned(tensor: Tensor) -> Tensor:
        each: Tensor = tensor.unflatten(1, (count, -1)).transpose(0, 1)
        return each.contiguous()

    return turned(whole.codes), turned(whole.scales), None if whole.zeros is None else turned(whole.zeros)
