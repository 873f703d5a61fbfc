"""Products with floating-point weights: those that are stored so, and those that no other product here can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from workers.model.arithmetic import Arithmetic, Product
from workers.model.quant.weights import NO_CHANGE, DenseWeight, InputChange, QuantWeight
from workers.model.weight_format import Quantised


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """The product with a rank's weight."""

    product: Product
    output_sizes: list[int]
    kind: str
    inputs_change: InputChange = NO_CHANGE
    input_scheme: None = None

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert not isinstance(x, Quantised), "input_scheme asks for none"
        return self.product(self.inputs_change(x) if self.inputs_change else x)


def dense_linear(
    weight: DenseWeight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> DenseLinear:
    """As the weight is stored."""
    kind = str(dtype).removeprefix("torch.")
    kind = f"{weight.stored_as} dequantized to {kind}" if weight.stored_as else kind
    return DenseLinear(arithmetic.product(weight.values.to(dtype), bias), sizes, kind, weight.inputs_change)


def dequantized_linear(
    weight: QuantWeight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None, kind: str
) -> DenseLinear:
    """Dequantized once, here. kind: what the weight was."""
    kind = f"{kind} dequantized to {str(dtype).removeprefix('torch.')}"
    return DenseLinear(arithmetic.product(weight.dense(dtype), bias), sizes, kind)


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """gate_up [experts, 2 * width / tp, hidden], down [experts, hidden, width / tp]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        return kernels.moe_experts(x, self.gate_up, self.down, expert_ids, weights)
