"""A mixture of experts whose weights are in e4m3 with a scale per block of 128x128, on CUDA: DeepSeek-V3's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels.quantise import quantise
from workers.model.quant.weights import FP8_BLOCK, Fp8Weight, QuantWeight


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """The layouts are those of kernels.experts.moe_fp8."""

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor

    @classmethod
    def of(cls, gate_ups: Sequence[Sequence[QuantWeight]], downs: Sequence[QuantWeight]) -> Fp8Experts | None:
        """None for weights of another kind, or of sizes that are no multiples of a block."""
        parts = [weight for expert in gate_ups for weight in expert]
        weights = [weight for weight in (*parts, *downs) if isinstance(weight, Fp8Weight)]
        if len(weights) < len(parts) + len(downs) or not all(map(_has_whole_blocks, weights)):
            return None
        up, down = weights[: len(parts)], weights[len(parts) :]
        count = len(downs)
        return cls(
            torch.cat([weight.values for weight in up]).unflatten(0, (count, -1)),
            torch.cat([weight.scales for weight in up]).unflatten(0, (count, -1)),
            torch.stack([weight.values for weight in down]),
            torch.stack([weight.scales for weight in down]),
        )

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        values, scales = quantise(x.float(), "fp8 groups")
        y = kernels.moe_experts_fp8(
            values, self.gate_up, self.down, scales, self.gate_up_scales, self.down_scales, expert_ids, weights
        )
        return y.to(x.dtype)


def _has_whole_blocks(weight: Fp8Weight) -> bool:
    is_whole = all(size % FP8_BLOCK == 0 for size in weight.values.shape)
    return weight.has_blocks and weight.input_scheme == "fp8 groups" and not weight.inputs_change and is_whole
