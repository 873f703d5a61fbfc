"""Layers that are split over tensor-parallel ranks (Shoeybi et al., "Megatron-LM", arXiv:1909.08053).

Their sums are made by an `Arithmetic`: as fast as can be, or in an order that does not depend on the batch. Knows
nothing of requests or caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from workers.loader import Weights
from workers.parallel import ParallelGroups, Shard


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products and the sums over ranks are made on this rank."""

    groups: ParallelGroups
    batch_invariant: bool = False  # a row gives the same bits whatever rows are beside it

    @property
    def shard(self) -> Shard:
        """This rank's place."""
        return self.groups.shard

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T."""
        return kernels.fixed_order_linear(x, weight, None) if self.batch_invariant else F.linear(x, weight)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks. How a library cuts a sum depends on its size, so on the batch."""
        return self.groups.sum_in_rank_order(x) if self.batch_invariant else self.groups.all_reduce(x)


class ColumnParallelLinear:
    """y = x W^T, each rank with its share of the outputs; several equally split matrices share one product."""

    def __init__(
        self, weights: Weights, arithmetic: Arithmetic, names: list[str], sizes: list[int], inputs: int
    ) -> None:
        self._arithmetic = arithmetic
        shares = [
            weights.read(name, (size, inputs), rows=arithmetic.shard.slice_of(size))
            for name, size in zip(names, sizes, strict=True)
        ]
        self.weight = torch.cat(shares) if len(shares) > 1 else shares[0]
        self.output_sizes = [share.shape[0] for share in shares]

    def __call__(self, x: Tensor) -> Tensor:
        return self._arithmetic.linear(x, self.weight)


class RowParallelLinear:
    """y = x W^T, each rank with its share of the inputs; the partial sums are added up over the ranks."""

    def __init__(self, weights: Weights, arithmetic: Arithmetic, name: str, outputs: int, inputs: int) -> None:
        self._arithmetic = arithmetic
        self.weight = weights.read(name, (outputs, inputs), columns=arithmetic.shard.slice_of(inputs))

    def __call__(self, x: Tensor) -> Tensor:
        return self._arithmetic.all_reduce(self._arithmetic.linear(x, self.weight))


class VocabParallel:
    """A [vocab, hidden] matrix split by rows, padded to a multiple of tp; serves as embedding and as head."""

    def __init__(self, weights: Weights, arithmetic: Arithmetic, name: str, vocab_size: int, hidden: int) -> None:
        self._arithmetic = arithmetic
        share = -(-vocab_size // arithmetic.shard.tp)
        self.first_id = arithmetic.shard.tp_rank * share
        held = slice(min(self.first_id, vocab_size), min(self.first_id + share, vocab_size))
        weight = weights.read(name, (vocab_size, hidden), rows=held)
        self.weight = F.pad(weight, (0, 0, 0, share - weight.shape[0]))

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        if self._arithmetic.shard.tp == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.first_id
        mine = (local >= 0) & (local < self.weight.shape[0])
        x = F.embedding(torch.where(mine, local, 0), self.weight) * mine[:, None]
        return self._arithmetic.groups.all_reduce(x)  # one rank's row and zeros: exact in any order

    def logits(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab / tp], this rank's share; padded ids come out as 0."""
        return self._arithmetic.linear(x, self.weight)
