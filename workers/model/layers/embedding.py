"""A matrix over the vocabulary, split over the ranks: the embedding, the head, or both. Knows nothing of
sampling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import kernels
from workers.model.layers.source import LayerSource


class VocabParallel:
    """A [vocab, hidden] matrix split by rows, padded to a multiple of tp; serves as embedding, as head, or as both."""

    def __init__(self, source: LayerSource, name: str, is_embedding: bool, is_head: bool) -> None:
        vocab_size = source.model.vocab_size
        self._arithmetic = source.arithmetic
        shard = source.arithmetic.shard
        share = -(-vocab_size // shard.tp)
        self.first_id = shard.tp_rank * share
        held = slice(min(self.first_id, vocab_size), min(self.first_id + share, vocab_size))
        weight = source.vocab_rows(name, held)
        weight = F.pad(weight, (0, 0, 0, share - weight.shape[0]))
        self._rows = weight if is_embedding else None
        self._product = source.arithmetic.product(weight) if is_head else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        assert self._rows is not None
        if self._arithmetic.shard.tp == 1:
            return F.embedding(token_ids, self._rows)
        x = kernels.vocab_embedding(self._rows, token_ids, self.first_id)
        return self._arithmetic.groups.all_reduce(x)  # one rank's row and zeros: exact in any order

    def logits(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab / tp], this rank's share; padded ids come out as 0."""
        assert self._product is not None
        return self._product(x)
