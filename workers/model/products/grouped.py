"""Products with weights of 2 to 8 bits and a scale per group: weight-only quantization, activations in 16 bits.

On a CPU torch's packed product is the faster one for one row, and falls behind the dense one soon after, so a bfloat16
copy takes what has more rows. On CUDA there is a kernel for 4 bits and one for 8; k is padded with groups of zeros.
What no product takes is dequantized once. Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.quantise import Scheme, quantise
from workers.model.arithmetic import Arithmetic, Product
from workers.model.products.dense import dequantized_linear
from workers.model.products.grouped_int8 import GroupedInt8Linear, has_integer_product
from workers.model.products.packed import PackedCodes, group_of
from workers.model.quant.weights import NO_CHANGE, GroupedWeight, InputChange
from workers.model.weight_format import Linear, Quantised

_PACKED_ROWS = 1  # up to so many the packed product is the faster one
_CPU_GROUPS = (32, 64, 128, 256)
_CPU_OUTPUTS = 16  # outputs are a multiple of it


def grouped_linear(
    weight: GroupedWeight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> Linear:
    """The fastest that the device has."""
    kind = kind_of(weight)
    product: Product | None = None
    if not arithmetic.batch_invariant and arithmetic.groups.device.type == "cuda":
        if has_integer_product(weight):
            return GroupedInt8Linear.of(weight, sizes, dtype, bias, kind)
        product = _cuda_product(weight, dtype, bias)
    elif not arithmetic.batch_invariant and dtype == torch.bfloat16:
        product = _cpu_product(weight, arithmetic, bias)
        kind += f", dequantized to bfloat16 for more than {_PACKED_ROWS} row" if product is not None else ""
    if product is None and weight.input_scheme is None:
        return dequantized_linear(weight, sizes, dtype, arithmetic, bias, kind)
    if product is None:
        kind += f" dequantized to {str(dtype).removeprefix('torch.')}"
        return GroupedLinear(arithmetic.product(weight.dense(dtype), bias), sizes, kind, weight.input_scheme)
    return GroupedLinear(product, sizes, kind, weight.input_scheme, weight.inputs_change)


def kind_of(weight: GroupedWeight) -> str:
    """For the log: W4A16 g64."""
    return f"W{weight.bits}A{8 if weight.input_scheme else 16} g{weight.group_size}"


def is_dequantized(weight: GroupedWeight, dtype: torch.dtype, arithmetic: Arithmetic) -> bool:
    """Whether grouped_linear takes the weight's numbers alone, with rows as they are."""
    if weight.input_scheme is not None:
        return False
    if arithmetic.batch_invariant:
        return True
    if arithmetic.groups.device.type == "cuda":
        return not _has_cuda_product(weight, dtype)
    return dtype != torch.bfloat16 or not _has_cpu_product(weight)


@dataclass(frozen=True, slots=True)
class GroupedLinear:
    """A product whose rows may be rounded to 8 bits before it."""

    product: Product
    output_sizes: list[int]
    kind: str
    rounding: Scheme | None = None
    inputs_change: InputChange = NO_CHANGE
    input_scheme: None = None

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert isinstance(x, Tensor), "input_scheme asks for none"
        x = self.inputs_change(x) if self.inputs_change else x
        if self.rounding is not None:
            values, scales = quantise(x.float(), self.rounding)
            x = (values.float() * scales).to(x.dtype)
        return self.product(x)


def _has_cpu_product(weight: GroupedWeight) -> bool:
    is_integer = weight.bits == 4 and weight.table is None
    return is_integer and weight.group_size in _CPU_GROUPS and weight.num_outputs % _CPU_OUTPUTS == 0


def _has_cuda_product(weight: GroupedWeight, dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and group_of(weight) is not None


def _cpu_product(weight: GroupedWeight, arithmetic: Arithmetic, bias: Tensor | None) -> Product | None:
    if not _has_cpu_product(weight):
        return None
    # (code - 8) * scale + minimum; ours is (code - zero) * scale + offset.
    minima = torch.zeros_like(weight.scales) if weight.offsets is None else weight.offsets
    if weight.zeros is not None:
        minima = minima + (8.0 - weight.zeros.float()) * weight.scales
    parameters = torch.stack((weight.scales, minima), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    many = arithmetic.product(replace(weight, inputs_change=NO_CHANGE).dense(torch.bfloat16), bias)
    return Int4Product(packed, parameters, weight.group_size, bias, many)


@dataclass(frozen=True, slots=True)
class Int4Product:
    """On a CPU: by torch's packed product for one row, by a bfloat16 copy for more."""

    packed: Tensor  # uint8, in torch's layout
    parameters: Tensor  # bfloat16 [groups, outputs, 2]: scales and minima
    group_size: int
    bias: Tensor | None
    many: Product

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > _PACKED_ROWS:  # not len: it would be traced as a constant
            return self.many(x)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.parameters)
        return y if self.bias is None else y + self.bias


def _cuda_product(weight: GroupedWeight, dtype: torch.dtype, bias: Tensor | None) -> Product | None:
    if not _has_cuda_product(weight, dtype):
        return None
    w = PackedCodes.of(weight, dtype)
    padding = w.num_added_inputs

    def product(x: Tensor) -> Tensor:
        x = F.pad(x, (0, padding)) if padding else x
        if w.bits == 4:
            y = kernels.w4a16_gemm(x, w.codes, w.scales, w.zeros, w.table, w.offsets)
        else:
            y = kernels.w8a16_gemm(x, w.codes, w.scales, w.zeros, w.offsets)
        return y if bias is None else y + bias

    return product
