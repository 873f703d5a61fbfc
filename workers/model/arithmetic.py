"""How products, and sums over tensor-parallel ranks, are made: as fast as can be, or in an order of their own.

Knows nothing of layers or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import kernels
from workers.parallel import ParallelGroups, Shard


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products and the sums over ranks are made on this rank."""

    groups: ParallelGroups
    batch_invariant: bool = False  # a row gives the same bits whatever rows are beside it

    @property
    def shard(self) -> Shard:
        """This rank's shard."""
        return self.groups.shard

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        return kernels.fixed_order_linear(x, weight, bias) if self.batch_invariant else F.linear(x, weight, bias)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks. How a library cuts a sum depends on its size, so on the batch."""
        return self.groups.sum_in_rank_order(x) if self.batch_invariant else self.groups.all_reduce(x)
