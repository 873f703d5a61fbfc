"""Products of rows that are rounded to 8 bits, each by its own scale, with weights of 4 bits: W4A8, in integers.

Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.gemm import w4a8
from kernels.quantise import Scheme
from workers.model.products.rounded_rows import RoundedRows
from workers.model.quant.weights import GroupedWeight
from workers.model.weight_format import Quantised

_GROUPS = (32, 64, 128)


def has_integer_product(weight: GroupedWeight) -> bool:
    """Whether GroupedInt8Linear takes it."""
    is_integer = weight.input_scheme == "int8" and weight.table is None and weight.offsets is None
    return is_integer and weight.bits == 4 and _group_of(weight) in _GROUPS


def _group_of(weight: GroupedWeight) -> int:
    return math.gcd(weight.group_size, _GROUPS[-1])


@dataclass(frozen=True, slots=True)
class GroupedInt8Linear:
    """The layouts are those of kernels.gemm.w4a8."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    output_sizes: list[int]
    rows: RoundedRows
    kind: str

    @classmethod
    def of(
        cls, weight: GroupedWeight, sizes: list[int], dtype: torch.dtype, bias: Tensor | None, kind: str
    ) -> GroupedInt8Linear:
        """Inputs are padded with weights of zero."""
        group = _group_of(weight)
        lanes = w4a8.lanes_of(group)
        padding = -weight.codes.shape[1] % (w4a8.CODES_PER_BYTE * lanes)

        def per_group(parameter: Tensor) -> Tensor:
            repeated = parameter.repeat_interleave(weight.group_size // group, 1)
            return F.pad(repeated, (0, padding // group)).T.contiguous()

        packed = w4a8.pack(F.pad(weight.codes, (0, padding)), lanes)
        zeros = None if weight.zeros is None else per_group(weight.zeros)
        scales = per_group(weight.scales.to(dtype))
        return cls(packed, scales, zeros, bias, dtype, sizes, RoundedRows("int8", weight.inputs_change, padding), kind)

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return self.rows.input_scheme

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        values, scales = self.rows(x)
        y = kernels.w4a8_gemm(values, self.packed, scales.squeeze(-1), self.scales, self.zeros).to(self.dtype)
        return y if self.bias is None else y + self.bias
