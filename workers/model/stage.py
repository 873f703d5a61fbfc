"""One pipeline stage of a model on one rank: embedding, layers, final norm and head, and the hand-over between stages.

Knows nothing of families, which bring the layers, nor of requests: it sees rows of tokens and says where their keys and
values go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.model.arithmetic import Arithmetic
from workers.model.batch import Batch
from workers.model.config import ModelConfig
from workers.model.layers.decoder import Layer
from workers.model.layers.embedding import VocabParallel
from workers.model.layers.layer_cache import LayerCache
from workers.model.layers.norm import RmsNorm
from workers.model.layers.source import LayerSource
from workers.model.loader import Weights
from workers.model.lora.slots import LoraSlots
from workers.model.tensor_layout import EMBEDDING, FINAL_NORM, HEAD
from workers.parallel import ParallelGroups, stage_layers

log = logging.getLogger(__name__)


class Stage(Protocol):
    """What runs a batch through the layers of a rank."""

    is_first: bool
    is_last: bool
    layer_range: range  # of the model's layers
    hidden_size: int
    dtype: torch.dtype  # of weights and activations
    device: torch.device
    batch_invariant: bool
    on_layer: Callable[[], None]  # called when a layer is computed, or launched
    feature_layers: tuple[int, ...]  # hidden states before these layers are wanted; all layers' number: after the last

    @property
    def layers(self) -> Sequence[Layer]:
        """Those of layer_range."""

    def enter(self, batch: Batch, received: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """hidden, and the residual stream where there is one already. received: see forward."""

    def leave(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        """What forward returns."""

    def features(self, index: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        """What comes before a layer, [tokens, hidden_size], whole on every rank, where it is wanted; else nothing."""

    def final_hidden(
        self,
        batch: Batch,
        kv_caches: Sequence[LayerCache],
        received: Tensor | None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the last stage up to its head: the wanted rows' normed hidden states [rows, hidden_size]. features: as in
        forward."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] of final_hidden -> [rows, vocab / tp]."""

    def forward(
        self,
        batch: Batch,
        kv_caches: Sequence[LayerCache],
        received: Tensor | None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the stage. kv_caches: each layer's.

        received: [2, tokens, hidden_size] from the stage before; None on the first. features: gets what is wanted
        before layers, in the layers' order. Returns the same as received for the stage behind, or the wanted rows'
        logits [rows, vocab / tp] on the last.
        """


class DecoderStage:
    """The layers of one pipeline stage; the first also embeds, the last also has the head."""

    def __init__(self, source: LayerSource, dtype: torch.dtype) -> None:
        model, arithmetic = source.model, source.arithmetic
        shard = arithmetic.shard
        self.is_first, self.is_last = shard.is_first_stage, shard.is_last_stage
        self.layer_range = stage_layers(model.num_hidden_layers, shard.pp, shard.stage)
        self.hidden_size, self.dtype, self.device = model.hidden_size, dtype, arithmetic.groups.device
        self.batch_invariant = arithmetic.batch_invariant
        self.on_layer: Callable[[], None] = lambda: None
        self.feature_layers: tuple[int, ...] = ()
        self._embedding_scale = model.embedding_scale
        self._logit_scale, self._logit_soft_cap = model.logit_scale, model.logit_soft_cap
        self._embedding = self._head = None
        has_tied_head = self.is_last and model.tie_word_embeddings
        if self.is_first or has_tied_head:
            self._embedding = VocabParallel(source, EMBEDDING, self.is_first, has_tied_head)
        if self.is_last:
            self._head = self._embedding if has_tied_head else VocabParallel(source, HEAD, False, True)
            self._norm = RmsNorm(source, FINAL_NORM + ".weight")
        self.layers = [model.decoder.layer(source, index) for index in self.layer_range]

    def enter(self, batch: Batch, received: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in Stage."""
        if received is not None:
            return received[0], received[1]
        assert self._embedding is not None
        hidden = self._embedding.embed(batch.token_ids)
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale, None

    def leave(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        """As in Stage."""
        if not self.is_last:
            return torch.stack((hidden, residual))
        return self.logits(self._final_rows(hidden, residual, batch))

    def _final_rows(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        rows = batch.logit_rows
        normed, _ = self._norm.add(hidden[rows], residual[rows])
        assert isinstance(normed, Tensor)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """As in Stage."""
        assert self._head is not None
        logits = self._head.logits(hidden)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        return torch.tanh(logits / self._logit_soft_cap) * self._logit_soft_cap if self._logit_soft_cap else logits

    def features(self, index: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        """As in Stage."""
        if index not in self.feature_layers:
            return ()
        return (hidden if residual is None else hidden + residual,)

    def final_hidden(
        self,
        batch: Batch,
        kv_caches: Sequence[LayerCache],
        received: Tensor | None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """As in Stage."""
        return self._final_rows(*self._run_layers(batch, kv_caches, received, features), batch)

    def forward(
        self,
        batch: Batch,
        kv_caches: Sequence[LayerCache],
        received: Tensor | None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """As in Stage."""
        return self.leave(*self._run_layers(batch, kv_caches, received, features), batch)

    def _run_layers(
        self, batch: Batch, kv_caches: Sequence[LayerCache], received: Tensor | None, features: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """hidden and the residual stream after the last layer."""
        hidden, residual = self.enter(batch, received)
        for index, layer, kv_cache in zip(self.layer_range, self.layers, kv_caches, strict=True):
            if features is not None:
                features += self.features(index, hidden, residual)
            q, residual = layer.before_attention(hidden, residual, batch, kv_cache)
            hidden, residual = layer.after_attention(layer.attention(q, batch, kv_cache), residual)
            self.on_layer()
        assert residual is not None  # every stage has a layer
        if features is not None:
            features += self.features(self.layer_range.stop, hidden, residual)
        return hidden, residual


def build_stage(
    model: ModelConfig,
    weights: Weights,
    groups: ParallelGroups,
    batch_invariant: bool = False,
    lora: LoraSlots | None = None,
) -> Stage:
    """This rank's stage, its weights read. lora: with it, products take adapters. Raises ModelError."""
    source = LayerSource(model, weights, Arithmetic(groups, batch_invariant), lora)
    stage = DecoderStage(source, weights.dtype)
    kinds = source.num_linears_by_kind
    log.info("products: %s", "; ".join(f"{count} of {kind}" for kind, count in kinds.most_common()))
    return stage
