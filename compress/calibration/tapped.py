"""Plain weights whose inputs are seen, and may be changed, on their way into each product.

Calibration records inputs this way, and the loss of rounded activations is measured this way. Any family's layers are
built with it, since families ask a WeightFormat for their products. Knows nothing of compression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.arithmetic import Arithmetic
from workers.model.loader import Weights
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.quant.storage import StoredFormat
from workers.model.weight_format import ExpertMatrices, Linear, Matrices, Quantised

Tap = Callable[[Matrices, Tensor], Tensor]
"""The matrices and the rows [tokens, inputs] that are about to be multiplied by them -> the rows that are."""


@dataclass(frozen=True, slots=True)
class TappedFormat:
    """Plain matrices with a tap before each product. One rank only."""

    tap: Tap
    plain: StoredFormat = PLAIN_FORMAT

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in WeightFormat."""
        return self.plain.tensors(name, outputs, inputs)

    def check_split(self, matrices: Matrices, tp: int) -> None:
        """As in WeightFormat."""
        if tp > 1:
            raise ModelError("models are compressed by one rank")

    def linear(self, matrices: Matrices, weights: Weights, arithmetic: Arithmetic, bias: Tensor | None) -> TappedLinear:
        """As in WeightFormat."""
        return TappedLinear(self.plain.linear(matrices, weights, arithmetic, bias), matrices, self.tap)

    def experts(self, experts: ExpertMatrices, weights: Weights, arithmetic: Arithmetic) -> TappedExperts:
        """As in WeightFormat. Each expert's products are made by themselves, so that each sees its own rows."""
        linears = [self.linear(matrices, weights, arithmetic, None) for matrices in experts.as_matrices()]
        return TappedExperts(linears[::2], linears[1::2])

    def table_tensors(self, name: str, shape: tuple[int, int]) -> Mapping[str, WantedTensor]:
        """As in WeightFormat."""
        return self.plain.table_tensors(name, shape)

    def table(self, name: str, shape: tuple[int, int], rows: slice, weights: Weights) -> Tensor:
        """As in WeightFormat."""
        return self.plain.table(name, shape, rows, weights)


@dataclass(frozen=True, slots=True)
class TappedLinear:
    """A product behind its tap."""

    inner: Linear
    matrices: Matrices
    tap: Tap
    input_scheme: None = None

    @property
    def output_sizes(self) -> list[int]:
        """As in Linear."""
        return self.inner.output_sizes

    @property
    def kind(self) -> str:
        """As in Linear."""
        return self.inner.kind

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert isinstance(x, Tensor), "input_scheme asks for no other"
        return self.inner(self.tap(self.matrices, x))


@dataclass(frozen=True, slots=True)
class TappedExperts:
    """Experts, one after the other."""

    gate_ups: list[TappedLinear]
    downs: list[TappedLinear]

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        total = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.gate_ups, self.downs, strict=True)):
            rows, choices = (expert_ids == expert).nonzero(as_tuple=True)
            if len(rows):
                share = down(kernels.swiglu(gate_up(x[rows])))
                total.index_add_(0, rows, share * weights[rows, choices, None].to(share.dtype))
        return total


class Replaced:
    """Weights of which some are given here and the rest are read."""

    def __init__(self, stored: Weights, given: Mapping[str, Tensor]) -> None:
        self.dtype = stored.dtype
        self._stored, self._given = stored, given

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), as_stored: bool = False) -> Tensor:
        """As in Weights."""
        tensor = self._given.get(name)
        if tensor is None:
            return self._stored.read(name, shape, part, as_stored)
        assert tensor.shape == shape, name
        return tensor[part] if as_stored else tensor[part].to(self.dtype)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """As in Weights."""
        tensor = self._given.get(name)
        return self._stored.shape_of(name) if tensor is None else tuple(tensor.shape)
