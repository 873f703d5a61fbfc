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
from kernels.quantise import Scheme
from workers.model.products.rounded_rows import RoundedRows
from workers.model.quant.weights import Int8Weight
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
    rows: RoundedRows
    kind: str = "W2A8 int"

    @classmethod
    def of(cls, weight: Int8Weight, sizes: list[int], dtype: torch.dtype, bias: Tensor | None) -> TernaryLinear:
        """Inputs are padded with weights of zero."""
        padding = -weight.codes.shape[1] % w2a8.BLOCK_K
        packed = w2a8.pack(F.pad(weight.codes, (0, padding)))
        return cls(
            packed,
            weight.scales.float().contiguous(),
            bias,
            dtype,
            sizes,
            RoundedRows("int8", weight.inputs_change, padding),
        )

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return self.rows.input_scheme

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        values, scales = self.rows(x)
        y = kernels.w2a8_gemm(values, self.packed, scales.squeeze(-1), self.scales).to(self.dtype)
        return y if self.bias is None else y + self.bias
