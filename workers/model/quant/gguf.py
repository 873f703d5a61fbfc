"""Matrices in the blocks of a GGUF: rows of bytes, each block with its scales. Types differ from matrix to matrix.

A model directory that was made from such a file (checkpoint.gguf.directory) lists in its quantization_config which type
each matrix has; those that are not listed are numbers as they are. Types whose codes have scales by group, and minima
or a table of sixteen numbers, keep them, and are multiplied as they are where a device can. Where codes are points of a
grid (IQ1 to IQ3) they become numbers once, when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.gguf.block_types import QUANTISED, BlockType
from checkpoint.gguf.config import QUANT_METHOD, TYPES
from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.options import Options
from workers.model.quant.plain import PLAIN
from workers.model.quant.storage import Cut, MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.loader import Weights
    from workers.model.quant.weights import DenseWeight, GroupedWeight, QuantWeight

_BITS = {
    "Q1_0": 1, "Q2_0": 2, "TQ1_0": 2, "TQ2_0": 2, "Q2_K": 2, "Q3_K": 3, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5,
    "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8, "Q8_1": 8, "Q8_K": 8,
}  # fmt: skip
"""Of the codes of types of gguf_blocks.affine."""
_TABLES = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")  # of gguf_blocks.levels
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class BlocksStorage:
    """NAME.weight uint8 [outputs, row_bytes]: rows of blocks."""

    kind: str

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        return 1, self._block.block_size

    @property
    def _block(self) -> BlockType:
        return QUANTISED[self.kind]

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        if inputs % self._block.block_size:
            raise ModelError(f"{name}: {inputs} inputs are not whole blocks of {self.kind}, {self._block.block_size}")
        return {f"{name}.weight": WantedTensor((outputs, self._block.row_bytes(inputs)), (self.kind,))}

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        ((name, wanted),) = self.tensors(cut.name, cut.outputs, cut.inputs).items()
        columns = slice(self._block.row_bytes(cut.columns.start), self._block.row_bytes(cut.columns.stop))
        rows = weights.read(name, wanted.shape, (cut.rows, columns), as_stored=True)
        weight = _read(self.kind, rows, weights)
        _check_finite(name, weight)
        return weight


def _read(kind: str, rows: Tensor, weights: Weights) -> DenseWeight | GroupedWeight:
    from workers.model.quant.gguf_blocks.dequantise import dequantise
    from workers.model.quant.weights import DenseWeight

    if kind in _BITS:
        return _affine(kind, rows)
    if kind in _TABLES:
        return _levels(kind, rows)
    return DenseWeight(dequantise(kind, rows, weights.dtype), stored_as=kind)


def _affine(kind: str, rows: Tensor) -> GroupedWeight:
    import torch

    from workers.model.quant.gguf_blocks.affine import AFFINE
    from workers.model.quant.weights import GroupedWeight

    affine, bits = AFFINE[kind](rows.reshape(-1, QUANTISED[kind].block_bytes)), _BITS[kind]
    scales = affine.scales.view(len(rows), -1)
    is_symmetric = affine.zero == 2 ** (bits - 1)
    return GroupedWeight(
        affine.codes.view(len(rows), -1),
        scales,
        bits,
        zeros=None if is_symmetric else torch.full_like(scales, affine.zero, dtype=torch.uint8),
        offsets=None if affine.offsets is None else affine.offsets.reshape(scales.shape),
    )


def _levels(kind: str, rows: Tensor) -> GroupedWeight:
    from workers.model.quant.gguf_blocks.levels import LEVELS
    from workers.model.quant.weights import GroupedWeight

    levels = LEVELS[kind](rows.reshape(-1, QUANTISED[kind].block_bytes))
    scales = levels.scales.reshape(len(rows), -1)
    return GroupedWeight(levels.codes.view(len(rows), -1), scales, bits=4, table=levels.table)


def _check_finite(name: str, weight: DenseWeight | GroupedWeight) -> None:
    from workers.model.quant.weights import DenseWeight

    numbers = [weight.values] if isinstance(weight, DenseWeight) else [weight.scales, weight.offsets]
    if any(each is not None and each.numel() and not bool(each.isfinite().all()) for each in numbers):
        raise ModelError(f"{name} holds values that are not finite numbers")


@dataclass(frozen=True, slots=True)
class BlockTypes:
    """The types of the matrices, as the file's own table has them."""

    types: Mapping[str, str]
    """By name of the matrix, with * for the number of an expert."""

    def storage_of(self, name: str) -> MatrixStorage:
        """As in StorageRule."""
        kind = self.types.get(_EXPERT.sub(".experts.*.", name))
        return PLAIN if kind is None else BlocksStorage(kind)


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known("quant_method", TYPES)
    types = quantization.get(TYPES)
    if not isinstance(types, dict):
        raise options.wrong(TYPES, "an object: it is written when a GGUF is opened by itself")
    for name, kind in types.items():
        if kind not in QUANTISED:
            raise ModelError(f"{where}.{TYPES}.{name}={kind!r}: no type of blocks")
    return StoredFormat(BlockTypes(types))


QUANT_METHODS = (QuantMethod(QUANT_METHOD, read),)
