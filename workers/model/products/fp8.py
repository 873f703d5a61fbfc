"""Products with weights in e4m3. On a CPU they are dequantized once: no processor here multiplies such numbers.

Activations are rounded to e4m3 where the checkpoint asks for it and the device multiplies in it; on a CPU they stay as
they are, which loses less. Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.quantise import FP8, Scheme
from workers.model.arithmetic import Arithmetic
from workers.model.products.dense import dequantized_linear
from workers.model.products.rounded_rows import RoundedRows
from workers.model.quant.weights import Fp8Weight
from workers.model.weight_format import Linear, Quantised

_MULTIPLE = 16  # of inputs and outputs


def fp8_linear(
    weight: Fp8Weight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> Linear:
    """The fastest that the device has."""
    kind = "FP8 blocks" if weight.has_blocks else "FP8"
    scheme: Scheme = "fp8 groups" if weight.has_blocks else "fp8"
    has_kernel = arithmetic.groups.device.type == "cuda" and not arithmetic.batch_invariant
    if not has_kernel or weight.input_scheme != scheme:
        return dequantized_linear(weight, sizes, dtype, arithmetic, bias, kind)
    rows, columns = (-size % _MULTIPLE for size in weight.values.shape)
    values = F.pad(weight.values.view(torch.uint8), (0, columns, 0, rows)).contiguous().view(FP8)
    scales = weight.scales if weight.has_blocks else F.pad(weight.scales, (0, rows))
    rows_of_x = RoundedRows(scheme, weight.inputs_change, columns, weight.input_scale)
    return Fp8Linear(values, scales, bias, dtype, sizes, rows_of_x, kind)


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """On CUDA."""

    weight: Tensor  # e4m3 [outputs, inputs], both rounded up to multiples of 16
    scales: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    output_sizes: list[int]
    rows: RoundedRows
    kind: str

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return self.rows.input_scheme

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        values, scales = self.rows(x)
        if self.rows.scheme == "fp8 groups":
            y = kernels.fp8_block_gemm(values, self.weight, scales, self.scales)
        else:
            y = kernels.fp8_gemm(values, self.weight, scales.squeeze(-1), self.scales)
        y = y[:, : sum(self.output_sizes)].to(self.dtype)
        return y if self.bias is None else y + self.bias
