"""How products, and sums over tensor-parallel ranks, are made: as fast as can be, or in an order of their own.

On a CPU weights are packed once, into the layout that oneDNN wants for its products: at few rows a product then reads
at the memory's speed, where torch's own linear reads at half of it or less. Knows nothing of layers or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from workers.parallel import ParallelGroups, Shard

Product = Callable[[Tensor], Tensor]
"""[rows, inputs] -> [rows, outputs]."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products and the sums over ranks are made on this rank."""

    groups: ParallelGroups
    batch_invariant: bool = False  # a row gives the same bits whatever rows are beside it

    @property
    def shard(self) -> Shard:
        """This rank's shard."""
        return self.groups.shard

    def product(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        """x -> x W^T + bias. The weight [outputs, inputs] may be packed: its owner need not keep it."""
        is_on_cpu = weight.device.type == "cpu"
        if is_on_cpu and not self.batch_invariant and weight.numel() and _onednn_takes(weight.dtype):
            return PackedProduct(torch.ops.mkldnn._reorder_linear_weight(weight), bias)
        return lambda x: self.linear(x, weight, bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, for a weight that is made anew for each product."""
        return kernels.fixed_order_linear(x, weight, bias) if self.batch_invariant else F.linear(x, weight, bias)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks. How a library cuts a sum depends on its size, so on the batch."""
        return self.groups.sum_in_rank_order(x) if self.batch_invariant else self.groups.all_reduce(x)


@dataclass(frozen=True, slots=True)
class PackedProduct:
    """A product by oneDNN."""

    weight: Tensor  # in oneDNN's layout, which no other operation reads
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether this processor has the arithmetic. Without it oneDNN converts to fp32 and back, row by row."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
