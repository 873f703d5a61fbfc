"""Runs blocks of tokens through a model one layer at a time, with the engine's own layers.

Between layers only the blocks' hidden states are kept, so memory is that of one layer. Knows nothing of compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from workers.errors import ModelError
from workers.kv.schemes.paged_layer import PagedLayer
from workers.model.arithmetic import Arithmetic
from workers.model.batch import Batch, GroupInputs
from workers.model.cache_spec import CacheSpec
from workers.model.config import ModelConfig
from workers.model.layers.decoder import Layer
from workers.model.layers.layer_cache import LayerCache
from workers.model.layers.source import LayerSource
from workers.model.loader import Weights
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.stage import build_stage
from workers.model.weight_format import WeightFormat
from workers.parallel import ParallelGroups, Shard

_GROUP = 0  # all of the batch's groups have the same tables
_SLOTS = 64  # of a cache block
_ROWS_AT_ONCE = 2048

CacheTap = Callable[[Tensor], None]
"""May read and change a layer's cache [blocks, heads, K|V, slots, head_dim] before attention reads it."""


class ModelWalk:
    """A model on one device, of which one layer at a time is in memory."""

    def __init__(self, model: ModelConfig, weights: Weights, device: torch.device) -> None:
        if model.weight_format != PLAIN_FORMAT:
            raise ModelError(
                "quantization_config: the model is compressed already; --method dequantize makes a plain one"
            )
        self.model = model
        self.weights = weights
        self.device = device
        self._groups = ParallelGroups(Shard(), device)
        ends = replace(model, num_hidden_layers=0)
        self._ends = build_stage(ends, weights, self._groups)

    @property
    def num_cache_groups(self) -> int:
        """How many a batch has inputs for."""
        return len(dict.fromkeys(self.model.cache_specs))

    def enter(self, blocks: Tensor) -> Tensor:
        """Token ids [blocks, tokens] -> hidden states [blocks, tokens, hidden_size]."""
        if not len(blocks):
            return torch.zeros(0, 1, self.model.hidden_size, dtype=self.weights.dtype, device=self.device)
        return torch.cat([self.embed(self._batch(part)).view(*part.shape, -1) for part in _parts(blocks)])

    def embed(self, batch: Batch) -> Tensor:
        """[tokens, hidden_size]."""
        return self._ends.enter(batch, None)[0]

    def layer(self, index: int, weight_format: WeightFormat, weights: Weights | None = None) -> Layer:
        """A layer whose matrices are read by this format, from the checkpoint unless other weights are given."""
        model = replace(self.model, weight_format=weight_format)
        source = LayerSource(model, weights or self.weights, Arithmetic(self._groups))
        return model.decoder.layer(source, index)

    def plain_layer(self, index: int) -> Layer:
        """A layer of the checkpoint."""
        return self.layer(index, self.model.weight_format)

    def through(
        self,
        layer: Layer,
        index: int,
        x: Tensor,
        cache_tap: CacheTap | None = None,
        query_tap: CacheTap | None = None,
    ) -> Tensor:
        """Hidden states [blocks, tokens, hidden_size] before a layer -> those behind it. query_tap: sees queries
        [tokens, heads, head_dim]."""
        outputs, spec = [], self.model.cache_specs[index]
        for part in _parts(x):
            batch = self._batch(torch.zeros(part.shape[:2], dtype=torch.int64))
            keys_and_values = self.cache(spec, *part.shape[:2])
            cache = PagedLayer(_GROUP, keys_and_values)
            q, residual = layer.before_attention(part.flatten(0, 1), None, batch, cache)
            if cache_tap is not None:
                cache_tap(keys_and_values)
            if query_tap is not None:
                query_tap(q)
            hidden, residual = layer.after_attention(layer.attention(q, batch, cache), residual)
            outputs.append((hidden + residual).view_as(part))
        return torch.cat(outputs)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states behind the last layer, of a few blocks -> fp32 logits [blocks, tokens, vocab]."""
        batch = self._batch(torch.zeros(x.shape[:2], dtype=torch.int64))
        return self.logits_of_rows(x.flatten(0, 1), batch).view(*x.shape[:2], -1)

    def logits_of_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """[tokens, hidden_size] -> fp32 [tokens, vocab]."""
        return self._ends.leave(torch.zeros_like(x), x, batch).float()

    def cache(self, spec: CacheSpec, num_blocks: int, num_tokens: int) -> Tensor:
        """Of one layer, for so many sequences."""
        count = num_blocks * -(-num_tokens // _SLOTS)
        planes = () if spec.is_latent else (spec.num_kv_heads, 2)
        return torch.zeros((count, *planes, _SLOTS, spec.head_dim), dtype=self.weights.dtype, device=self.device)

    def layer_cache(self, spec: CacheSpec, num_blocks: int, num_tokens: int) -> LayerCache:
        """The same, as attention takes it."""
        return PagedLayer(_GROUP, self.cache(spec, num_blocks, num_tokens))

    def places(self, num_blocks: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Block table [sequences, blocks], and slots [sequences, tokens], in a `cache` of that size."""
        each = -(-num_tokens // _SLOTS)
        table = torch.arange(num_blocks * each, dtype=torch.int32, device=self.device).view(num_blocks, each)
        first = torch.arange(num_blocks, device=self.device)[:, None] * each * _SLOTS
        return table, first + torch.arange(num_tokens, device=self.device)

    def _batch(self, token_ids: Tensor) -> Batch:
        """All blocks as prefills."""
        count, length = token_ids.shape
        table, slots = self.places(count, length)
        return Batch(
            token_ids=token_ids.flatten().to(self.device),
            positions=torch.arange(length, device=self.device).repeat(count),
            groups=(GroupInputs(table, slots.flatten()),) * self.num_cache_groups,
            num_decodes=0,
            seq_lens=torch.full((count,), length, dtype=torch.int32, device=self.device),
            query_start_loc=torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=self.device),
            max_query_len=length,
            logit_rows=torch.arange(count * length, device=self.device),
        )


def _parts(blocks: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = blocks.split(max(1, _ROWS_AT_ONCE // blocks.shape[1]))
    return parts
