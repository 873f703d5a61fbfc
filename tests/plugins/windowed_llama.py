"""A family outside of the packages: a Llama in which every second layer sees a window of the tokens, through attention
with sinks and capped scores, and whose projections around attention have biases. What it does to embeddings, norms and
logits is fixed."""

from __future__ import annotations

from dataclasses import replace

from checkpoint.config_keys import COMMON_KEYS
from checkpoint.keys import understood
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields
from workers.model.decoder import LayerConfig, PreNormDecoder
from workers.model.family import Family
from workers.model.parts import read_attention, read_mlp

ARCHITECTURE = "WindowedLlamaForCausalLM"
_KEYS = {
    **COMMON_KEYS,
    "sliding_window": understood("tokens that the odd layers see"),
    "attn_logit_softcapping": understood("bounds the odd layers' scores"),
}


def read(fields: ConfigFields) -> ModelConfig:
    """Even layers are Llama's."""
    full, mlp = read_attention(fields, has_bias=True, has_output_bias=True), read_mlp(fields)
    soft_cap = fields.number("attn_logit_softcapping", 0.0)
    windowed = replace(full, window=fields.size("sliding_window"), has_sinks=True, soft_cap=soft_cap)
    count = fields.size("num_hidden_layers")
    layers = tuple(LayerConfig(windowed if index % 2 else full, mlp) for index in range(count))
    model = fields.model(PreNormDecoder(layers))
    return replace(model, embedding_scale=2.0, norm_offset=0.5, logit_scale=0.25, logit_soft_cap=5.0)


FAMILIES = (Family(ARCHITECTURE, "windowed_llama", _KEYS, read),)
