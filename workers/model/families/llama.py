"""Llama 2 and 3: grouped-query attention, rotary embedding with Llama 3's frequency scaling or none, SwiGLU."""

from __future__ import annotations

from checkpoint.config_keys import COMMON_KEYS
from checkpoint.keys import refused
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields
from workers.model.decoder import LayerConfig, PreNormDecoder
from workers.model.family import Family
from workers.model.parts import check_full_attention, read_attention, read_mlp

_KEYS = {**COMMON_KEYS, "sliding_window": refused("attention sees the whole context")}


def read(fields: ConfigFields) -> ModelConfig:
    """All layers are equal."""
    check_full_attention(fields)
    layer = LayerConfig(read_attention(fields), read_mlp(fields))
    return fields.model(PreNormDecoder((layer,) * fields.size("num_hidden_layers")))


FAMILIES = (Family("LlamaForCausalLM", "llama", _KEYS, read, {"max_position_embeddings": 2048}),)
