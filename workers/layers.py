"""Layers that are split over tensor-parallel ranks (Shoeybi et al., "Megatron-LM", arXiv:1909.08053).

Knows nothing of requests or caches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.loader import Weights
from workers.parallel import ParallelGroups


class ColumnParallelLinear:
    """y = x W^T, each rank with its share of the outputs; several equally split matrices share one product."""

    def __init__(
        self, weights: Weights, groups: ParallelGroups, names: list[str], sizes: list[int], inputs: int
    ) -> None:
        shares = [
            weights.read(name, (size, inputs), rows=groups.shard.slice_of(size))
            for name, size in zip(names, sizes, strict=True)
        ]
        self.weight = torch.cat(shares) if len(shares) > 1 else shares[0]
        self.output_sizes = [share.shape[0] for share in shares]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowParallelLinear:
    """y = x W^T, each rank with its share of the inputs; the partial sums are added up over the ranks."""

    def __init__(self, weights: Weights, groups: ParallelGroups, name: str, outputs: int, inputs: int) -> None:
        self.weight = weights.read(name, (outputs, inputs), columns=groups.shard.slice_of(inputs))
        self._groups = groups

    def __call__(self, x: Tensor) -> Tensor:
        return self._groups.all_reduce(F.linear(x, self.weight))


class VocabParallel:
    """A [vocab, hidden] matrix split by rows, padded to a multiple of tp; serves as embedding and as head."""

    def __init__(self, weights: Weights, groups: ParallelGroups, name: str, vocab_size: int, hidden: int) -> None:
        self._groups = groups
        share = -(-vocab_size // groups.shard.tp)
        self.first_id = groups.shard.tp_rank * share
        held = slice(min(self.first_id, vocab_size), min(self.first_id + share, vocab_size))
        weight = weights.read(name, (vocab_size, hidden), rows=held)
        self.weight = F.pad(weight, (0, 0, 0, share - weight.shape[0]))

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        if self._groups.shard.tp == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.first_id
        mine = (local >= 0) & (local < self.weight.shape[0])
        x = F.embedding(torch.where(mine, local, 0), self.weight) * mine[:, None]
        return self._groups.all_reduce(x)

    def logits(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab / tp], this rank's share; padded ids come out as 0."""
        return F.linear(x, self.weight)
