"""Matrices that are stored as they are: one floating-point tensor each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.weight_format import ExpertMatrices, Matrices, Quantised, Split

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.arithmetic import Arithmetic, Product
    from workers.model.loader import Weights


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """NAME.weight [outputs, inputs]."""

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in WeightFormat."""
        return {name + ".weight": WantedTensor((outputs, inputs))}

    def check_split(self, matrices: Matrices, tp: int) -> None:
        """As in WeightFormat."""
        check_even_split(matrices, tp)

    def linear(self, matrices: Matrices, weights: Weights, arithmetic: Arithmetic, bias: Tensor | None) -> PlainLinear:
        """As in WeightFormat."""
        import torch

        shares = [
            weights.read(piece.name + ".weight", (piece.num_rows, matrices.inputs), piece.part)
            for piece in matrices.pieces(arithmetic.shard)
        ]
        weight = torch.cat(shares) if len(shares) > 1 else shares[0]
        return PlainLinear(arithmetic.product(weight, bias), [len(share) for share in shares])

    def experts(self, experts: ExpertMatrices, weights: Weights, arithmetic: Arithmetic) -> PlainExperts:
        """As in WeightFormat."""
        import torch

        if arithmetic.batch_invariant:
            raise ModelError("batch_invariant: a mixture of experts groups its rows by the batch")
        into, out, mine = (
            (experts.width, experts.hidden),
            (experts.hidden, experts.width),
            arithmetic.shard.slice_of(experts.width),
        )
        gate_up, down = [], []
        for gate, up, back in zip(experts.gates, experts.ups, experts.downs, strict=True):
            gate_up.append(torch.cat([weights.read(name + ".weight", into, (mine,)) for name in (gate, up)]))
            down.append(weights.read(back + ".weight", out, (slice(None), mine)))
        return PlainExperts(torch.stack(gate_up), torch.stack(down))


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """The product with this rank's weight."""

    product: Product
    output_sizes: list[int]
    input_scheme: None = None

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert not isinstance(x, Quantised), "input_scheme asks for none"
        return self.product(x)


@dataclass(frozen=True, slots=True)
class PlainExperts:
    """gate_up [experts, 2 * width / tp, hidden], down [experts, hidden, width / tp]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        import kernels

        return kernels.moe_experts(x, self.gate_up, self.down, expert_ids, weights)


def check_even_split(matrices: Matrices, tp: int) -> None:
    """Raise ModelError unless tp divides what is cut."""
    sizes = {Split.NONE: (), Split.OUTPUTS: matrices.outputs, Split.INPUTS: (matrices.inputs,)}[matrices.split]
    for size in sizes:
        if size % tp:
            kind = matrices.split.name.lower()
            raise ModelError(f"tp={tp} does not divide the {size} {kind} of {matrices.names[0]}")
