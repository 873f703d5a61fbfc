"""A decoder layer, cut at its attention: everything before and after it works on each row by itself."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from workers.model.batch import Batch
from workers.model.layers.attention import Attention
from workers.model.layers.layer_cache import LayerCache
from workers.model.layers.mlp import Mlp
from workers.model.layers.norm import RmsNorm


class Layer(Protocol):
    """One decoder layer on one rank. `hidden` is what the layer before added last, `residual` the sum before that."""

    @property
    def attended_width(self) -> int:
        """Columns of what attention returns."""

    def before_attention(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, kv_cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """hidden [tokens, hidden_size] and the residual stream before it; returns q [tokens, heads, head_dim] and the
        residual stream, with this pass's keys and values in the cache."""

    def attention(self, q: Tensor, batch: Batch, kv_cache: LayerCache) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, attended_width]; the only part in which rows meet."""

    def after_attention(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden and the residual stream after the layer."""


class PreNormLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, input_norm: RmsNorm, attention: Attention, post_norm: RmsNorm, mlp: Mlp) -> None:
        self.input_norm, self.post_norm = input_norm, post_norm
        self.self_attention, self.mlp = attention, mlp
        self.attended_width = attention.attended_width

    def before_attention(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, kv_cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """As in Layer."""
        x, residual = self.input_norm.add(hidden, residual, self.self_attention.qkv.input_scheme)
        return self.self_attention.queries(x, batch, kv_cache), residual

    def attention(self, q: Tensor, batch: Batch, kv_cache: LayerCache) -> Tensor:
        """As in Layer."""
        return self.self_attention.attend(q, batch, kv_cache)

    def after_attention(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As in Layer."""
        x, residual = self.post_norm.add(self.self_attention.output(attended), residual, self.mlp.input_scheme)
        return self.mlp(x), residual
