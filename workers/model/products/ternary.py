"""Products of rows that are rounded to 8 bits with weights of -1, 0 and 1, in 2 bits each on CUDA.

Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.gemm import w2a8
from kernels.quantise import Scheme, quantise
from workers.model.quant.weights import InputChange, Int8Weight
from workers.model.weight_format import Quantised


def is_ternary(weight: Int8Weight) -> bool:
    """Whether TernaryLinear takes it."""
    low, high = torch.aminmax(weight.codes)
    fits = bool(low >= -2) and bool(high <= 1)
    return fits and weight.input_scale is None and not weight.outlier_threshold


@dataclass(frozen=True, slots=True)
class TernaryLinear:
    """The layout is that of kernels.gemm.w2a8."""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    output_sizes: list[int]
    inputs_change: InputChange
    num_added_inputs: int
    kind: str = "W2A8 int"

    @classmethod
    def of(cls, weight: Int8Weight, sizes: list[int], dtype: torch.dtype, bias: Tensor | None) -> TernaryLinear:
        """Inputs are padded with weights of zero."""
        padding = -weight.codes.shape[1] % w2a8.BLOCK_K
        packed = w2a8.pack(F.pad(weight.codes, (0, padding)))
        return cls(packed, weight.scales.float().contiguous(), bias, dtype, sizes, weight.inputs_change, padding)

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return None if self.inputs_change or self.num_added_inputs else "int8"

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        if isinstance(x, Quantised):
            values, scales = x.values, x.scales
        else:
            values, scales = quantise(self.inputs_change(x).float(), "int8")
        values = F.pad(values, (0, self.num_added_inputs)) if self.num_added_inputs else values
        y = kernels.w2a8_gemm(values, self.packed, scales.squeeze(-1), self.scales).to(self.dtype)
        return y if self.bias is None else y + self.bias
