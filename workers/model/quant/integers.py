"""Matrices that are stored as integers: several to a word with scales per group, or a byte each.

The names of the tensors are those of compressed-tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from checkpoint.tensors import WantedTensor
from workers.errors import ModelError
from workers.model.quant.storage import Cut

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.loader import Weights
    from workers.model.quant.weights import InputChange, QuantWeight

InputRounding = Literal["none", "row", "fixed"]
"""How a product's inputs are rounded: not at all, by a scale of each row, or by one of the checkpoint."""


@dataclass(frozen=True, slots=True)
class PackedStorage:
    """NAME.weight_packed int32 [outputs, inputs * bits / 32], the first input lowest, each code plus 2 ** (bits - 1);
    NAME.weight_scale [outputs, groups]; without symmetry NAME.weight_zero_point int32 [outputs * bits / 32, groups]."""

    bits: int
    group_size: int  # 0: all inputs
    is_symmetric: bool
    rounds_inputs: bool = False

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        return 1 if self.is_symmetric else self._per_word, math.lcm(self._per_word, self.group_size or 1)

    @property
    def _per_word(self) -> int:
        return 32 // self.bits

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        groups = num_groups(name, inputs, self.group_size)
        wanted = {
            f"{name}.weight_packed": WantedTensor((outputs, -(-inputs // self._per_word)), ("I32",)),
            f"{name}.weight_scale": WantedTensor((outputs, groups)),
            f"{name}.weight_shape": WantedTensor((2,), ("I64", "I32"), is_optional=True),
            f"{name}.weight_g_idx": WantedTensor((inputs,), ("I32", "I64"), is_optional=True),
        }
        if not self.is_symmetric:
            shape = (-(-outputs // self._per_word), groups)
            wanted[f"{name}.weight_zero_point"] = WantedTensor(shape, ("I32",))
        return wanted

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.words import span, unpack

        name, wanted = cut.name, self.tensors(cut.name, cut.outputs, cut.inputs)
        check_stored_shape(weights, cut)
        columns = span(cut.columns, self._per_word)
        packed_name = f"{name}.weight_packed"
        packed = weights.read(packed_name, wanted[packed_name].shape, (cut.rows, columns), as_stored=True)
        codes = unpack(packed, self.bits)[:, : cut.columns.stop - cut.columns.start]
        g_idx = None
        if weights.shape_of(f"{name}.weight_g_idx") is not None:
            g_idx = weights.read(f"{name}.weight_g_idx", (cut.inputs,), (cut.columns,), as_stored=True)
        groups = groups_of(cut, self.group_size, g_idx is not None)
        scale_name = f"{name}.weight_scale"
        scales = weights.read(scale_name, wanted[scale_name].shape, (cut.rows, groups), as_stored=True).float()
        zeros = None
        if not self.is_symmetric:
            zero_name, rows = f"{name}.weight_zero_point", span(cut.rows, self._per_word)
            words = weights.read(zero_name, wanted[zero_name].shape, (rows, groups), as_stored=True)
            zeros = unpack(words.T.contiguous(), self.bits).T[: len(codes)]
        return grouped(name, codes, scales, zeros, g_idx, self.bits, self.rounds_inputs)


@dataclass(frozen=True, slots=True)
class IntegerStorage:
    """NAME.weight int8 [outputs, inputs] and NAME.weight_scale [outputs, 1], or [1], or [outputs, groups]; for fixed
    scales of the inputs NAME.input_scale [1], and NAME.input_zero_point int8 [1]; NAME.pre_quant_scale [inputs] may
    multiply them before (SmoothQuant)."""

    bits: int
    group_size: int  # 0: all inputs
    input_rounding: InputRounding
    has_input_zero: bool = False
    has_multiplier: bool = False

    @property
    def edges(self) -> tuple[int, int]:
        """As in MatrixStorage."""
        return 1, self.group_size or 1

    def tensors(self, name: str, outputs: int, inputs: int) -> Mapping[str, WantedTensor]:
        """As in MatrixStorage."""
        groups = num_groups(name, inputs, self.group_size)
        others = () if self.group_size else ((outputs,), (1,), ())
        wanted = {
            f"{name}.weight": WantedTensor((outputs, inputs), ("I8",)),
            f"{name}.weight_scale": WantedTensor((outputs, groups), other_shapes=others),
        }
        if self.input_rounding == "fixed":
            wanted[f"{name}.input_scale"] = WantedTensor((1,), other_shapes=((),))
        if self.has_input_zero:
            wanted[f"{name}.input_zero_point"] = WantedTensor((1,), ("I8",), other_shapes=((),))
        if self.has_multiplier:
            wanted[f"{name}.pre_quant_scale"] = WantedTensor((inputs,), is_optional=True)
        return wanted

    def read(self, weights: Weights, cut: Cut) -> QuantWeight:
        """As in MatrixStorage."""
        from workers.model.quant.weights import DenseWeight, Int8Weight, StaticScale

        name, limit = cut.name, 2 ** (self.bits - 1)
        codes = weights.read(f"{name}.weight", (cut.outputs, cut.inputs), (cut.rows, cut.columns), as_stored=True)
        if self.bits < 8 and codes.numel() and not -limit <= codes.min() <= codes.max() < limit:
            raise ModelError(f"{name}.weight holds integers of more than {self.bits} bits")
        if self.group_size:
            groups = groups_of(cut, self.group_size, False)
            shape = (cut.outputs, num_groups(name, cut.inputs, self.group_size))
            scales = weights.read(f"{name}.weight_scale", shape, (cut.rows, groups), as_stored=True).float()
            unsigned = (codes.short() + limit).byte()
            return grouped(name, unsigned, scales, None, None, self.bits, self.input_rounding == "row")
        scales = row_scales(weights, f"{name}.weight_scale", cut)
        if self.input_rounding == "none":
            return DenseWeight(codes.float() * scales.unsqueeze(-1))
        fixed = None
        if self.input_rounding == "fixed":
            zero = int(scalar(weights, f"{name}.input_zero_point")) if self.has_input_zero else 0
            fixed = StaticScale(positive_scalar(weights, f"{name}.input_scale"), zero)
        return Int8Weight(codes, scales, fixed, inputs_change=input_change(weights, cut))


def num_groups(name: str, inputs: int, group_size: int) -> int:
    """Groups of a matrix. Raises ModelError where they do not divide it."""
    if group_size and inputs % group_size:
        raise ModelError(f"{name}: groups of {group_size} do not divide its {inputs} inputs")
    return inputs // group_size if group_size else 1


def groups_of(cut: Cut, group_size: int, are_mixed: bool) -> slice:
    """The groups of a cut's columns. are_mixed: any column may be of any group."""
    if not group_size:
        return slice(0, 1)
    if are_mixed:
        return slice(0, cut.inputs // group_size)
    return slice(cut.columns.start // group_size, -(-cut.columns.stop // group_size))


def grouped(
    name: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    rounds_inputs: bool = False,
) -> QuantWeight:
    """Codes uint8 [outputs, inputs] with scales and zeros [outputs, groups]. g_idx: the group of each input, in any
    order (GPTQ's act-order); None: they are of equal sizes, one behind the other.

    With g_idx the columns are gathered by group. A rank's share of inputs may have groups of unequal sizes; then the
    weight is dequantized. Raises ModelError for a group that does not exist.
    """
    import torch

    from workers.model.quant.weights import DenseWeight, GroupedWeight, InputChange

    scheme: Literal["int8"] | None = "int8" if rounds_inputs else None
    if g_idx is None:
        return GroupedWeight(codes, scales, bits, zeros, input_scheme=scheme)
    num_all = scales.shape[1]
    g_idx = g_idx.long()
    if g_idx.numel() and not 0 <= g_idx.min() <= g_idx.max() < num_all:
        raise ModelError(f"{name}: an input is of group {int(g_idx.max())}, and there are {num_all}")
    sizes = torch.bincount(g_idx, minlength=num_all)
    if bool((sizes == sizes[0]).all()) and int(sizes[0]):
        order = torch.argsort(g_idx, stable=True)
        is_sorted = torch.equal(order, torch.arange(len(order), device=order.device))
        change = InputChange() if is_sorted else InputChange(order)
        codes = codes if is_sorted else codes[:, order].contiguous()
        return GroupedWeight(codes, scales, bits, zeros, input_scheme=scheme, inputs_change=change)
    middle = 2.0 ** (bits - 1) if zeros is None else zeros.float()[:, g_idx]
    return DenseWeight((codes.float() - middle) * scales[:, g_idx])


def check_stored_shape(weights: Weights, cut: Cut) -> None:
    """Raise ModelError where NAME.weight_shape, if there is one, is another."""
    name = f"{cut.name}.weight_shape"
    if weights.shape_of(name) is not None:
        shape = weights.read(name, (2,), as_stored=True).tolist()
        if shape != [cut.outputs, cut.inputs]:
            raise ModelError(f"{name} is {shape}, config.json says {[cut.outputs, cut.inputs]}")


def row_scales(weights: Weights, name: str, cut: Cut) -> Tensor:
    """fp32 [rows of the cut], of a tensor with a scale per output or one for all."""
    shape = weights.shape_of(name)
    if shape is None:
        raise ModelError(f"no tensor {name}")
    if math.prod(shape) == 1:
        one: Tensor = weights.read(name, shape, as_stored=True).float().reshape(1)
        return one.repeat(cut.rows.stop - cut.rows.start)
    return weights.read(name, shape, (cut.rows,), as_stored=True).float().reshape(-1)


def input_change(weights: Weights, cut: Cut) -> InputChange:
    """By NAME.pre_quant_scale, where there is one."""
    from workers.model.quant.weights import NO_CHANGE, InputChange

    name = f"{cut.name}.pre_quant_scale"
    if weights.shape_of(name) is None:
        return NO_CHANGE
    return InputChange(multiplier=weights.read(name, (cut.inputs,), (cut.columns,), as_stored=True).float())


def scalar(weights: Weights, name: str) -> float:
    """The one number of a tensor. Raises ModelError."""
    shape = weights.shape_of(name)
    if shape is None or math.prod(shape) != 1:
        raise ModelError(f"{name} must be one number, and is {'missing' if shape is None else list(shape)}")
    return float(weights.read(name, shape, as_stored=True).float().item())


def positive_scalar(weights: Weights, name: str) -> float:
    """The same, above 0."""
    value = scalar(weights, name)
    if value <= 0:
        raise ModelError(f"{name} is {value}, and a scale is above 0")
    return value
