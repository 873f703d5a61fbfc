"""An EAGLE-3 head on one rank: what may follow a token, from the model's hidden states of those before it.

An entry of the head is the hidden state at a position, and the embedding of the token that follows it. From the entry's
output comes the token after that one; it also stands in for the hidden state that the model has not computed yet, when
the head goes on. Knows nothing of requests: it sees rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.arithmetic import Arithmetic
from workers.model.batch import Batch
from workers.model.config import ModelConfig
from workers.model.heads.eagle3_config import Eagle3Config, draft_ids
from workers.model.layers.attention import Attention
from workers.model.layers.layer_cache import LayerCache
from workers.model.layers.mlp import make_mlp
from workers.model.layers.norm import RmsNorm
from workers.model.layers.source import LayerSource
from workers.model.loader import Weights
from workers.model.tensor_layout import EMBEDDING
from workers.parallel import ParallelGroups


class Eagle3Head:
    """Its weights; the whole head."""

    def __init__(self, config: Eagle3Config, weights: Weights, groups: ParallelGroups, embedding: Tensor) -> None:
        """embedding: [vocab_size, hidden_size], of read_embedding. Raises ModelError."""
        source = LayerSource(config.model, weights, Arithmetic(groups))
        names, hidden = config.names, config.model.hidden_size
        self.hidden_size, self.dtype, self.device = hidden, weights.dtype, groups.device
        self._vocab_size = config.model.vocab_size
        self._norms_residual = config.norm_before_residual
        self._embedding = embedding
        fusion = source.tensor(names.fusion + ".weight", (hidden, config.feature_width))
        self._fuse = source.arithmetic.product(fusion)
        self._hidden_norm = RmsNorm(source, names.layer + "hidden_norm.weight")
        self._input_norm = RmsNorm(source, names.layer + "input_layernorm.weight")
        self._attention = Attention(source, names.layer + "self_attn.", config.layer.attention)
        self._post_norm = RmsNorm(source, names.layer + "post_attention_layernorm.weight")
        self._mlp = make_mlp(source, names.layer + "mlp.", config.layer.mlp)
        self._norm = RmsNorm(source, names.norm)
        self._head = source.arithmetic.product(source.tensor("lm_head.weight", (config.draft_vocab_size, hidden)))
        ids = draft_ids(config)
        is_whole = len(ids) == self._vocab_size and bool((ids[1:] > ids[:-1]).all())
        self._ids = None if is_whole else torch.from_numpy(ids).to(groups.device)

    def fuse(self, features: Tensor) -> Tensor:
        """[tokens, feature_width] of the model -> [tokens, hidden_size]."""
        return self._fuse(features.to(self.dtype))

    def forward(self, batch: Batch, kv_cache: LayerCache, hidden: Tensor) -> Tensor:
        """hidden: [tokens, hidden_size], fused, or what this returned for the entry before; the batch's tokens are
        those that follow it. Returns the same shape."""
        embedded, _ = self._input_norm.add(F.embedding(batch.token_ids, self._embedding), None)
        normed, _ = self._hidden_norm.add(hidden, None)
        assert isinstance(embedded, Tensor)
        assert isinstance(normed, Tensor)
        residual = normed if self._norms_residual else hidden
        q = self._attention.queries(torch.cat((embedded, normed), dim=-1), batch, kv_cache)
        attended = self._attention.output(self._attention.attend(q, batch, kv_cache))
        x, residual = self._post_norm.add(attended, residual)
        return self._mlp(x) + residual

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] of forward -> [rows, vocab_size] of the model's ids; -inf for those never proposed."""
        normed, _ = self._norm.add(hidden, None)
        assert isinstance(normed, Tensor)
        logits = self._head(normed)
        if self._ids is None:
            return logits
        whole = logits.new_full((len(logits), self._vocab_size), float("-inf"))
        return whole.index_copy_(1, self._ids, logits)


def read_embedding(
    config: Eagle3Config, weights: Weights, target: ModelConfig, target_weights: Weights, groups: ParallelGroups
) -> Tensor:
    """[vocab_size, hidden_size]: the head's own embedding, or else the model's."""
    rows = slice(0, target.vocab_size)
    if config.has_embedding:
        shape = (target.vocab_size, config.model.hidden_size)
        return weights.read(config.names.embedding + ".weight", shape)
    return LayerSource(target, target_weights, Arithmetic(groups)).vocab_rows(EMBEDDING, rows)
