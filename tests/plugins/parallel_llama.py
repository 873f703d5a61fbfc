"""A family outside of the packages that brings layers of its own form: attention and MLP work on the same normed rows,
x + attention(norm(x)) + mlp(norm(x)), as in GPT-J. Positions count half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.config_keys import COMMON_KEYS
from workers.model.cache_spec import CacheSpec
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields
from workers.model.family import Family
from workers.model.parts import AttentionConfig, MlpConfig, RopeConfig, check_full_attention, read_attention, read_mlp

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.batch import Batch
    from workers.model.layers.attention import Attention
    from workers.model.layers.layer_cache import LayerCache
    from workers.model.layers.mlp import SwiGlu
    from workers.model.layers.norm import RmsNorm
    from workers.model.layers.source import LayerSource
    from workers.model.tensor_layout import TensorLayout


@dataclass(frozen=True, slots=True)
class ParallelDecoder:
    num_layers: int
    attention: AttentionConfig
    mlp: MlpConfig

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        return (self.attention.cache_spec,) * self.num_layers

    def check_split(self, tp: int) -> None:
        self.attention.check_split(tp)
        self.mlp.check_split(tp)

    def add_tensors(self, layout: TensorLayout, hidden_size: int, index: int) -> None:
        prefix = f"model.layers.{index}."
        layout.tensor(prefix + "norm.weight", (hidden_size,))
        layout.attention(prefix + "self_attn.", self.attention, hidden_size)
        layout.mlp(prefix + "mlp.", self.mlp, hidden_size)

    def layer(self, source: LayerSource, index: int) -> ParallelLayer:
        from workers.model.layers.attention import Attention
        from workers.model.layers.mlp import SwiGlu
        from workers.model.layers.norm import RmsNorm

        rope, head_dim = self.attention.rope, self.attention.head_dim
        cos_sin = source.shared_table("half as far", lambda: _table(source, rope, head_dim))
        prefix = f"model.layers.{index}."
        return ParallelLayer(
            RmsNorm(source, prefix + "norm.weight"),
            Attention(source, prefix + "self_attn.", self.attention, cos_sin),
            SwiGlu(source, prefix + "mlp.", self.mlp),
        )


def _table(source: LayerSource, rope: RopeConfig, head_dim: int) -> Tensor:
    import torch

    turns = rope.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(source.model.max_position_embeddings).float()[:, None] * turns / 2
    return torch.cat((angles.cos(), angles.sin()), -1).to(source.arithmetic.groups.device)


class ParallelLayer:
    def __init__(self, norm: RmsNorm, attention: Attention, mlp: SwiGlu) -> None:
        self._norm, self._attention, self._mlp = norm, attention, mlp
        self.attended_width = attention.attended_width

    def before_attention(
        self, hidden: Tensor, residual: Tensor | None, batch: Batch, kv_cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        x, residual = self._norm.add(hidden, residual)
        return self._attention.queries(x, batch, kv_cache), residual

    def attention(self, q: Tensor, batch: Batch, kv_cache: LayerCache) -> Tensor:
        return self._attention.attend(q, batch, kv_cache)

    def after_attention(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self._norm.add(residual, None)
        return self._attention.output(attended) + self._mlp(x), residual


def read(fields: ConfigFields) -> ModelConfig:
    check_full_attention(fields)
    attention = read_attention(fields, has_bias=True, has_output_bias=True)
    return fields.model(ParallelDecoder(fields.size("num_hidden_layers"), attention, read_mlp(fields)))


FAMILIES = (Family("ParallelLlamaForCausalLM", "parallel_llama", COMMON_KEYS, read),)
