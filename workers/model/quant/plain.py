"""Matrices that are stored as they are: one floating-point tensor each.

Where two of every four numbers are zero, that is kept: there is a product for it (2:4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.tensors import WantedTensor
from workers.model.quant.storage import Cut, StoredFormat

if TYPE_CHECKING:
    from workers.model.loader import Weights
    from workers.model.quant.weights import QuantWeight


@dataclass(frozen=True, slots=True)
class PlainStorage:
    """NAME.weight [outputs, inputs]."""

    edges: tuple[int, int] = (1, 1)

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        return {name + ".weight": WantedTensor((outputs, inputs))}

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import DenseWeight, Sparse24Weight

        values = weights.read(cut.name + ".weight", (cut.outputs, cut.inputs), (cut.rows, cut.columns))
        return Sparse24Weight.of(values) or DenseWeight(values)


PLAIN = PlainStorage()


@dataclass(frozen=True, slots=True)
class AllPlain:
    """Every matrix is stored as it is."""

    def storage_of(self, name: str) -> PlainStorage:
        """As in StorageRule."""
        return PLAIN


PLAIN_FORMAT = StoredFormat(AllPlain())
