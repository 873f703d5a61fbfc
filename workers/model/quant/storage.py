"""How one matrix is stored, and a weight format that has such a storage for each matrix.

A quantized format is a rule that names the storage of a matrix; reading a rank's share, joining what is multiplied by
the same rows, and choosing a product is the same for all of them, and stands here. Torch is imported when weights are
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.weight_format import ExpertMatrices, Experts, Linear, Matrices, Piece, Split

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.arithmetic import Arithmetic
    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a stored matrix that is read."""

    name: str
    outputs: int  # of the whole matrix
    inputs: int
    rows: slice
    columns: slice


class MatrixStorage(Protocol):
    """What stands in a checkpoint for one matrix [outputs, inputs]. A frozen dataclass: its fields are part of what the
    model is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def edges(self) -> tuple[int, int]:
        """A rank's share begins and ends at multiples of these, among the outputs and among the inputs."""

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in WeightFormat. Raises ModelError where no such matrix can be stored so."""

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """A part of the matrix that begins and ends on edges. Raises ModelError for what the tensors hold."""


class StorageRule(Protocol):
    """Which storage each matrix has. A frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def storage_of(self, name: str) -> MatrixStorage:
        """That of the matrix of this name: model.layers.0.self_attn.q_proj."""


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """A WeightFormat by a rule."""

    rule: StorageRule

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in WeightFormat."""
        return self.rule.storage_of(name).tensors(name, outputs, inputs)

    def check_split(self, matrices: Matrices, tp: int) -> None:
        """As in WeightFormat."""
        check_even_split(matrices, tp)
        for name, _ in matrices.tensors():
            row_edge, column_edge = self.rule.storage_of(name).edges
            if matrices.split is Split.OUTPUTS:
                for size in matrices.outputs:
                    _check_edge(name, "outputs", size, row_edge, tp)
            elif matrices.split is Split.INPUTS:
                _check_edge(name, "inputs", matrices.inputs, column_edge, tp)

    def linear(self, matrices: Matrices, weights: Weights, arithmetic: Arithmetic, bias: Tensor | None) -> Linear:
        """As in WeightFormat."""
        from workers.model.products import linear_of

        pieces = matrices.pieces(arithmetic.shard)
        shares = [self._read(weights, piece, matrices.inputs) for piece in pieces]
        return linear_of(shares, weights.dtype, arithmetic, bias)

    def experts(self, experts: ExpertMatrices, weights: Weights, arithmetic: Arithmetic) -> Experts:
        """As in WeightFormat."""
        from workers.model.products import experts_of

        shares = [
            [self._read(weights, piece, matrices.inputs) for piece in matrices.pieces(arithmetic.shard)]
            for matrices in experts.as_matrices()
        ]
        return experts_of(shares[::2], [down for (down,) in shares[1::2]], weights.dtype, arithmetic)

    def table_tensors(self, name: str, shape: tuple[int, int]) -> Mapping[str, WantedTensor]:
        """As in WeightFormat."""
        return self.rule.storage_of(name).tensors(name, *shape)

    def table(self, name: str, shape: tuple[int, int], rows: slice, weights: Weights) -> Tensor:
        """As in WeightFormat."""
        cut = Cut(name, *shape, rows, slice(0, shape[1]))
        return self.rule.storage_of(name).read(weights, cut).dense(weights.dtype)

    def _read(self, weights: Weights, piece: Piece, inputs: int) -> QuantWeight:
        rows, columns = piece.part if len(piece.part) > 1 else (piece.part[0], slice(0, inputs))
        return self.rule.storage_of(piece.name).read(weights, Cut(piece.name, piece.num_rows, inputs, rows, columns))


def check_even_split(matrices: Matrices, tp: int) -> None:
    """Raise ModelError unless tp divides what is cut."""
    sizes = {Split.NONE: (), Split.OUTPUTS: matrices.outputs, Split.INPUTS: (matrices.inputs,)}[matrices.split]
    for size in sizes:
        if size % tp:
            kind = matrices.split.name.lower()
            raise ModelError(f"tp={tp} does not divide the {size} {kind} of {matrices.names[0]}")


def _check_edge(name: str, kind: str, size: int, edge: int, tp: int) -> None:
    if tp > 1 and size // tp % edge:
        raise ModelError(f"tp={tp} cuts the {size} {kind} of {name} within a group of {edge} that is stored together")
