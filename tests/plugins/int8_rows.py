"""A weight format outside of the packages: int8, with a scale for each row; products are made in floating point.

With `rounds_activations` the norms hand over rows in 8 bits, too, as a format with integer products would have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.storage import check_even_split
from workers.model.weight_format import ExpertMatrices, Matrices, Part, Quantised, QuantMethod

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantise import Scheme
    from workers.model.arithmetic import Arithmetic
    from workers.model.loader import Weights


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """NAME.weight int8 [outputs, inputs], NAME.weight_scale fp32 [outputs, 1]."""

    rounds_activations: bool = False
    fuses: bool = True  # whether the layers before do the rounding

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        return {
            f"{name}.weight": WantedTensor((outputs, inputs), ("I8",)),
            f"{name}.weight_scale": WantedTensor((outputs, 1), ("F32",)),
        }

    def check_split(self, matrices: Matrices, tp: int) -> None:
        if tp > 2:
            raise ModelError(f"int8_rows is served with tp up to 2, and {matrices.names[0]} by no more")
        check_even_split(matrices, tp)

    def linear(self, matrices: Matrices, weights: Weights, arithmetic: Arithmetic, bias: Tensor | None) -> Int8Linear:
        import torch

        pieces = matrices.pieces(arithmetic.shard)
        shares = [_read(weights, piece.name, piece.num_rows, matrices.inputs, piece.part) for piece in pieces]
        rows, scales = (torch.cat(tensors) for tensors in zip(*shares, strict=True))
        return Int8Linear(arithmetic, rows, scales, [len(share) for share, _ in shares], bias, self)

    def experts(self, experts: ExpertMatrices, weights: Weights, arithmetic: Arithmetic) -> Int8Experts:
        import torch

        if arithmetic.batch_invariant:
            raise ModelError("batch_invariant: a mixture of experts groups its rows by the batch")
        mine, gate_up, down = arithmetic.shard.slice_of(experts.width), [], []
        for gate, up, back in zip(experts.gates, experts.ups, experts.downs, strict=True):
            gate_up += [_read(weights, name, experts.width, experts.hidden, (mine,)) for name in (gate, up)]
            down.append(_read(weights, back, experts.hidden, experts.width, (slice(None), mine)))
        count = len(experts.gates)
        return Int8Experts(
            *(torch.cat(tensors).unflatten(0, (count, -1)) for tensors in zip(*gate_up, strict=True)),
            *(torch.stack(tensors) for tensors in zip(*down, strict=True)),
        )

    def table_tensors(self, name: str, shape: tuple[int, int]) -> Mapping[str, WantedTensor]:
        return {f"{name}.weight": WantedTensor(shape)}

    def table(self, name: str, shape: tuple[int, int], rows: slice, weights: Weights) -> Tensor:
        return weights.read(f"{name}.weight", shape, (rows,))


def _read(weights: Weights, name: str, outputs: int, inputs: int, part: Part) -> tuple[Tensor, Tensor]:
    rows = weights.read(f"{name}.weight", (outputs, inputs), part, as_stored=True)
    return rows, weights.read(f"{name}.weight_scale", (outputs, 1), part[:1], as_stored=True)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    arithmetic: Arithmetic
    rows: Tensor
    scales: Tensor
    output_sizes: list[int]
    bias: Tensor | None
    options: Int8Rows

    kind = "int8 rows"

    @property
    def input_scheme(self) -> Scheme | None:
        return "int8" if self.options.rounds_activations and self.options.fuses else None

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        from kernels.quantise import quantise

        if self.options.rounds_activations:
            values, scales = (x.values, x.scales) if isinstance(x, Quantised) else quantise(x.float(), "int8")
            x = values.float() * scales
        weight = self.rows.float() * self.scales
        return self.arithmetic.linear(x, weight.to(x.dtype), self.bias)


@dataclass(frozen=True, slots=True)
class Int8Experts:
    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        import kernels

        gate_up, down = self.gate_up.float() * self.gate_up_scales, self.down.float() * self.down_scales
        return kernels.moe_experts(x, gate_up.to(x.dtype), down.to(x.dtype), expert_ids, weights)


def read(quantization: Mapping[str, Any], where: str) -> Int8Rows:
    """The options; a format refuses those that it does not know."""
    unknown = set(quantization) - {"quant_method", "rounds_activations", "fuses"}
    if unknown:
        raise ModelError(f"{where}.{min(unknown)}: unknown key")
    return Int8Rows(quantization.get("rounds_activations", False), quantization.get("fuses", True))


QUANT_METHODS = (QuantMethod("int8_rows", read),)
