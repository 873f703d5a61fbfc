"""What a quantized matrix is once it is read, whatever its checkpoint's format: integers or 8-bit floats, and scales.

A format (the files beside this one) reads its tensors into one of these kinds, and `workers.model.products` multiplies
by them. So formats and devices are independent of one another. Knows nothing of files, shards or kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.quantise import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class InputChange:
    """What is done to a product's rows before it: gathered, then multiplied."""

    order: Tensor | None = None
    """int64 [inputs]: column i of the weight belongs to input order[i] (GPTQ's act-order)."""
    multiplier: Tensor | None = None
    """[inputs], in the order of the weight's columns (SmoothQuant's scales that no norm took over)."""

    def __bool__(self) -> bool:
        return self.order is not None or self.multiplier is not None

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> the same shape."""
        x = x if self.order is None else x[:, self.order]
        return x if self.multiplier is None else x * self.multiplier.to(x.dtype)

    def undone(self, weight: Tensor) -> Tensor:
        """The weight [outputs, inputs] that gives the same product with unchanged rows."""
        weight = weight if self.multiplier is None else weight * self.multiplier.to(weight.dtype)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)

    def equals(self, other: InputChange) -> bool:
        """Whether the two do the same."""
        return _are_equal(self.order, other.order) and _are_equal(self.multiplier, other.multiplier)


NO_CHANGE = InputChange()
_VALUES_AT_ONCE = 1 << 22  # that are dequantized in fp32
_ROWS_FOR_A_GUESS = 4  # of a matrix, which nearly always tell that it has no pattern


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """Numbers as they are."""

    values: Tensor  # [outputs, inputs], floating-point
    inputs_change: InputChange = NO_CHANGE
    stored_as: str = ""
    """What the numbers were computed from, for the log; "" where they are those of the checkpoint."""

    @property
    def num_outputs(self) -> int:
        """Rows."""
        return len(self.values)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], for unchanged rows."""
        return self.inputs_change.undone(self.values).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """Codes with a scale per output and group of inputs: (code - zero) * scale + offset."""

    codes: Tensor  # uint8 [outputs, inputs], below 2 ** bits
    scales: Tensor  # fp32 [outputs, groups]; inputs is a multiple of groups
    bits: int
    zeros: Tensor | None = None  # uint8 [outputs, groups], up to 2 ** bits; None: 2 ** (bits - 1)
    offsets: Tensor | None = None  # fp32 [outputs, groups]
    table: Tensor | None = None  # fp32 [2 ** bits]: numbers that the codes stand for; then there are no zeros
    input_scheme: Scheme | None = None
    """The inputs are meant to be rounded by it, a scale per row: W4A8."""
    inputs_change: InputChange = NO_CHANGE

    @property
    def num_outputs(self) -> int:
        """Rows."""
        return len(self.codes)

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], for unchanged rows; computed in fp32, some rows at a time."""
        values = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        step = max(1, _VALUES_AT_ONCE // max(1, self.codes.shape[1]))
        for begin in range(0, len(self.codes), step):
            rows = slice(begin, begin + step)
            values[rows] = self._values(rows)
        return self.inputs_change.undone(values)

    def _values(self, rows: slice) -> Tensor:
        """fp32, of some rows."""
        grouped = self.codes[rows].unflatten(1, (self.scales.shape[1], -1))
        if self.table is not None:
            values = self.table[grouped.int()]
        elif self.zeros is not None:
            values = grouped.float() - self.zeros[rows].float().unsqueeze(-1)
        else:
            values = grouped.float() - 2.0 ** (self.bits - 1)
        values *= self.scales[rows].unsqueeze(-1)
        if self.offsets is not None:
            values += self.offsets[rows].unsqueeze(-1)
        return values.flatten(1)


@dataclass(frozen=True, slots=True)
class StaticScale:
    """A scale of a product's inputs that was fixed in calibration."""

    scale: float
    zero: int = 0  # the code that means 0


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """Integers with a scale per output, and how the inputs become integers."""

    codes: Tensor  # int8 [outputs, inputs]
    scales: Tensor  # fp32 [outputs]
    input_scale: StaticScale | None = None  # None: each row has its own
    outlier_threshold: float = 0.0
    """Inputs whose magnitude reaches it are multiplied unrounded (LLM.int8, arXiv:2208.07339); 0: none are."""
    inputs_change: InputChange = NO_CHANGE

    @property
    def num_outputs(self) -> int:
        """Rows."""
        return len(self.codes)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], for unchanged rows."""
        return self.inputs_change.undone((self.codes.float() * self.scales.unsqueeze(-1)).to(dtype))


FP8_BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """e4m3 floats with a scale per output or per block of 128x128, and how the inputs become such floats."""

    values: Tensor  # float8_e4m3fn [outputs, inputs]
    scales: Tensor  # fp32 [outputs], or [outputs / 128, inputs / 128], both rounded up
    input_scheme: Scheme | None = "fp8"  # None: the inputs stay as they are
    input_scale: StaticScale | None = None  # in place of a scale per row
    inputs_change: InputChange = NO_CHANGE

    @property
    def num_outputs(self) -> int:
        """Rows."""
        return len(self.values)

    @property
    def has_blocks(self) -> bool:
        """Whether a scale is that of a block."""
        return self.scales.dim() == 2

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], for unchanged rows; computed in fp32."""
        scales = self.scales.unsqueeze(-1)
        if self.has_blocks:
            rows, columns = self.values.shape
            scales = self.scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
        return self.inputs_change.undone((self.values.float() * scales).to(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Sparse24Weight:
    """Numbers of which two in every four neighbours along the inputs are kept; the others are zero."""

    kept: Tensor  # [outputs, inputs / 2], floating-point
    places: Tensor  # uint8 [outputs, inputs / 4]: the first of the two in the low two bits, then the second
    inputs_change: InputChange = NO_CHANGE

    @classmethod
    def of(cls, values: Tensor) -> Sparse24Weight | None:
        """From [outputs, inputs]; None where some four have more than two."""
        if values.shape[1] % 4 or not values.numel():
            return None
        for rows in (values[:_ROWS_FOR_A_GUESS], values):
            if bool(((rows.unflatten(1, (-1, 4)) != 0).sum(-1, dtype=torch.int8) > 2).any()):
                return None
        fours = values.unflatten(1, (-1, 4))
        # Those that are not zero, in their order; a zero fills up.
        where = (fours == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
        first, second = where.to(torch.uint8).unbind(-1)
        return cls(fours.gather(-1, where).flatten(1), first | second << 2)

    @property
    def num_outputs(self) -> int:
        """Rows."""
        return len(self.kept)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], for unchanged rows."""
        where = torch.stack((self.places & 3, self.places >> 2), -1).long()
        fours = torch.zeros(*self.places.shape, 4, dtype=dtype, device=self.kept.device)
        fours.scatter_(-1, where, self.kept.to(dtype).unflatten(1, (-1, 2)))
        return self.inputs_change.undone(fours.flatten(1))


@dataclass(frozen=True, slots=True, eq=False)
class LowRankWeight:
    """The product of two thin matrices."""

    left: Tensor  # [outputs, rank], floating-point
    right: Tensor  # [rank, inputs]
    inputs_change: InputChange = NO_CHANGE

    @property
    def num_outputs(self) -> int:
        """Rows."""
        return len(self.left)

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        return self.left.shape[1]

    @property
    def is_thin(self) -> bool:
        """Whether the two have fewer numbers than their product."""
        outputs, inputs = len(self.left), self.right.shape[1]
        return self.rank * (outputs + inputs) < outputs * inputs

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], for unchanged rows; multiplied in fp32."""
        return self.inputs_change.undone((self.left.float() @ self.right.float()).to(dtype))


QuantWeight = DenseWeight | GroupedWeight | Int8Weight | Fp8Weight | Sparse24Weight | LowRankWeight


def joined(weights: Sequence[QuantWeight]) -> QuantWeight | None:
    """One below the other as a single weight, for products with the same rows; None where they do not fit."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(type(weight) is not type(first) for weight in weights):
        return None
    if not all(weight.inputs_change.equals(first.inputs_change) for weight in weights):
        return None
    whole: QuantWeight | None = _JOINING[type(first)](weights)  # type: ignore[operator]
    return whole


def _joined_dense(weights: Sequence[DenseWeight]) -> DenseWeight:
    stored_as = " and ".join(dict.fromkeys(weight.stored_as for weight in weights if weight.stored_as))
    return replace(weights[0], values=torch.cat([weight.values for weight in weights]), stored_as=stored_as)


def _joined_grouped(weights: Sequence[GroupedWeight]) -> GroupedWeight | None:
    first = weights[0]
    options = (first.bits, first.scales.shape[1], first.input_scheme)
    if any((weight.bits, weight.scales.shape[1], weight.input_scheme) != options for weight in weights):
        return None
    if not all(_are_equal(weight.table, first.table) for weight in weights):
        return None
    has_zeros = any(weight.zeros is not None for weight in weights)
    has_offsets = any(weight.offsets is not None for weight in weights)
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=torch.cat([_zeros(weight) for weight in weights]) if has_zeros else None,
        offsets=torch.cat([_offsets(weight) for weight in weights]) if has_offsets else None,
    )


def _zeros(weight: GroupedWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, 2 ** (weight.bits - 1), dtype=torch.uint8)


def _offsets(weight: GroupedWeight) -> Tensor:
    return torch.zeros_like(weight.scales) if weight.offsets is None else weight.offsets


def _joined_int8(weights: Sequence[Int8Weight]) -> Int8Weight | None:
    first = weights[0]
    options = (first.input_scale, first.outlier_threshold)
    if any((weight.input_scale, weight.outlier_threshold) != options for weight in weights):
        return None
    codes, scales = (torch.cat(parts) for parts in zip(*((w.codes, w.scales) for w in weights), strict=True))
    return replace(first, codes=codes, scales=scales)


def _joined_fp8(weights: Sequence[Fp8Weight]) -> Fp8Weight | None:
    first = weights[0]
    options = (first.input_scheme, first.input_scale, first.has_blocks)
    if any((weight.input_scheme, weight.input_scale, weight.has_blocks) != options for weight in weights):
        return None
    if first.has_blocks and any(weight.num_outputs % FP8_BLOCK for weight in weights[:-1]):
        return None
    values, scales = (torch.cat(parts) for parts in zip(*((w.values, w.scales) for w in weights), strict=True))
    return replace(first, values=values, scales=scales)


def _joined_sparse24(weights: Sequence[Sparse24Weight]) -> Sparse24Weight:
    kept, places = (torch.cat(parts) for parts in zip(*((w.kept, w.places) for w in weights), strict=True))
    return replace(weights[0], kept=kept, places=places)


def _never_joined(weights: Sequence[LowRankWeight]) -> None:
    """Each has a thin matrix of its own for the rows."""


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


_JOINING = {
    DenseWeight: _joined_dense,
    GroupedWeight: _joined_grouped,
    Int8Weight: _joined_int8,
    Fp8Weight: _joined_fp8,
    Sparse24Weight: _joined_sparse24,
    LowRankWeight: _never_joined,
}
