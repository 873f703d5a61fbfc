"""Products with pairs of thin matrices: two products, where that is fewer bytes than the one with what they stand for.

Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from workers.model.arithmetic import Arithmetic, Product
from workers.model.products.dense import dequantized_linear
from workers.model.quant.weights import InputChange, LowRankWeight
from workers.model.weight_format import Linear, Quantised

_CUDA_RANK = 256  # of the kernel, at most


def low_rank_linear(
    weight: LowRankWeight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> Linear:
    """The fastest that the device has."""
    kind = f"low rank {weight.rank}"
    if not weight.is_thin:
        return dequantized_linear(weight, sizes, dtype, arithmetic, bias, kind)
    left, right = weight.left.to(dtype).contiguous(), weight.right.to(dtype).contiguous()
    on_cuda = arithmetic.groups.device.type == "cuda" and not arithmetic.batch_invariant
    if on_cuda and weight.rank <= _CUDA_RANK and dtype in (torch.bfloat16, torch.float16):
        return LowRankLinear(_fused(left, right, bias), sizes, kind, weight.inputs_change)
    narrow, wide = arithmetic.product(right), arithmetic.product(left, bias)
    return LowRankLinear(lambda x: wide(narrow(x)), sizes, kind, weight.inputs_change)


@dataclass(frozen=True, slots=True)
class LowRankLinear:
    """x right^T left^T."""

    product: Product
    output_sizes: list[int]
    kind: str
    inputs_change: InputChange
    input_scheme: None = None

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert isinstance(x, Tensor), "input_scheme asks for none"
        return self.product(self.inputs_change(x) if self.inputs_change else x)


def _fused(left: Tensor, right: Tensor, bias: Tensor | None) -> Product:
    """Added to the bias, or to zeros."""

    def product(x: Tensor) -> Tensor:
        rows, outputs = len(x), len(left)
        out = x.new_zeros(rows, outputs) if bias is None else bias.to(x.dtype).expand(rows, -1).contiguous()
        return kernels.add_low_rank(out, x.contiguous(), right, left)

    return product
