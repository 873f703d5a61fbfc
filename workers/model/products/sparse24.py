"""Products with weights of which two in every four are kept. On CUDA 9 bytes are read for 8 weights, instead of 16.

On a CPU no product is faster for the zeros, so the weights become dense once. Knows nothing of checkpoints' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.gemm import sparse24
from workers.model.arithmetic import Arithmetic
from workers.model.products.dense import dequantized_linear
from workers.model.quant.weights import Sparse24Weight
from workers.model.weight_format import Linear, Quantised

_KIND = "2:4"


def sparse24_linear(
    weight: Sparse24Weight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> Linear:
    """The fastest that the device has."""
    if not has_sparse_product(dtype, arithmetic):
        return dequantized_linear(weight, sizes, dtype, arithmetic, bias, _KIND)
    values = weight.dense(dtype)  # for unchanged rows
    padding = -values.shape[1] % sparse24.BLOCK_K
    kept, places = sparse24.pack(F.pad(values, (0, padding)))
    return Sparse24Linear(kept, places, bias, sizes, padding)


def has_sparse_product(dtype: torch.dtype, arithmetic: Arithmetic) -> bool:
    """Whether the zeros are of use."""
    is_on_cuda = arithmetic.groups.device.type == "cuda" and not arithmetic.batch_invariant
    return is_on_cuda and dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Sparse24Linear:
    """The layout is that of kernels.gemm.sparse24."""

    kept: Tensor
    places: Tensor
    bias: Tensor | None
    output_sizes: list[int]
    num_added_inputs: int
    kind: str = _KIND
    input_scheme: None = None

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        assert isinstance(x, Tensor), "input_scheme asks for none"
        x = F.pad(x, (0, self.num_added_inputs)) if self.num_added_inputs else x.contiguous()
        y: Tensor = kernels.sparse24_gemm(x, self.kept, self.places)
        return y if self.bias is None else y + self.bias
