"""Decoders whose layers all have the usual form: a norm before attention, a norm before the MLP. Without torch.

A family whose layers differ only in sizes and options is one of these; another brings a Decoder of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.model.cache_spec import CacheSpec
from workers.model.parts import AttentionConfig, ExpertsConfig, MlpConfig

if TYPE_CHECKING:
    from workers.model.layers.decoder import Layer
    from workers.model.layers.source import LayerSource
    from workers.model.tensor_layout import TensorLayout


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One layer."""

    attention: AttentionConfig
    mlp: MlpConfig | ExpertsConfig


@dataclass(frozen=True, slots=True)
class PreNormDecoder:
    """x + attention(norm(x)), then x + mlp(norm(x)), with Llama's names."""

    layers: tuple[LayerConfig, ...]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """As in Decoder."""
        return tuple(layer.attention.cache_spec for layer in self.layers)

    def check_split(self, tp: int) -> None:
        """As in Decoder."""
        for layer in dict.fromkeys(self.layers):
            layer.attention.check_split(tp)
            layer.mlp.check_split(tp)

    def add_tensors(self, layout: TensorLayout, hidden_size: int, index: int) -> None:
        """As in Decoder."""
        prefix, layer = _prefix(index), self.layers[index]
        layout.tensor(prefix + "input_layernorm.weight", (hidden_size,))
        layout.tensor(prefix + "post_attention_layernorm.weight", (hidden_size,))
        layout.attention(prefix + "self_attn.", layer.attention, hidden_size)
        layout.mlp(prefix + "mlp.", layer.mlp, hidden_size)

    def layer(self, source: LayerSource, index: int) -> Layer:
        """As in Decoder."""
        from workers.model.layers.attention import Attention
        from workers.model.layers.decoder import PreNormLayer
        from workers.model.layers.mlp import make_mlp
        from workers.model.layers.norm import RmsNorm

        prefix, layer = _prefix(index), self.layers[index]
        return PreNormLayer(
            RmsNorm(source, prefix + "input_layernorm.weight"),
            Attention(source, prefix + "self_attn.", layer.attention),
            RmsNorm(source, prefix + "post_attention_layernorm.weight"),
            make_mlp(source, prefix + "mlp.", layer.mlp),
        )


def _prefix(index: int) -> str:
    return f"model.layers.{index}."
