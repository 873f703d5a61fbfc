"""A model's sizes and settings as the metadata of a GGUF. The way back is checkpoint.gguf.config.

Knows nothing of texts and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint.gguf.container import Value
from checkpoint.gguf.metadata_keys import SAMPLING_KEYS
from checkpoint.gguf.rope import rope_divisors
from compress.errors import CompressError
from workers.model.config import ModelConfig
from workers.model.decoder import LayerConfig, PreNormDecoder
from workers.model.parts import ExpertsConfig, RopeScaling

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe"}
_QUANTIZATION_VERSION = 2  # of ggml's block types


def architecture_of(model: ModelConfig) -> str:
    """general.architecture. Raises CompressError."""
    found = _ARCHITECTURES.get(model.architecture)
    if found is None:
        known = ", ".join(_ARCHITECTURES)
        raise CompressError(f"--format gguf: architecture {model.architecture} is not supported (supported: {known})")
    return found


def parts_of(model: ModelConfig) -> LayerConfig:
    """Of each layer, as all are equal. Raises CompressError as architecture_of does."""
    architecture_of(model)
    assert isinstance(model.decoder, PreNormDecoder)
    return model.decoder.layers[0]


def model_metadata(model: ModelConfig, name: str, file_type: int) -> dict[str, Value]:
    """general.* and the architecture's keys. Raises CompressError for what a GGUF cannot say of this architecture."""
    layer, architecture = parts_of(model), architecture_of(model)
    attention, mlp = layer.attention, layer.mlp
    sizes: dict[str, Value] = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "block_count": model.num_hidden_layers,
        "attention.head_count": attention.num_attention_heads,
        "attention.head_count_kv": attention.num_key_value_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": float(attention.rope.rope_theta),
    }
    if isinstance(mlp, ExpertsConfig):
        if not mlp.norm_topk_prob:
            raise CompressError("norm_topk_prob=false: llama.cpp's qwen3moe makes the chosen experts' weights add up")
        sizes |= {
            "expert_count": mlp.num_experts,
            "expert_used_count": mlp.num_experts_per_tok,
            "expert_feed_forward_length": mlp.moe_intermediate_size,
            "feed_forward_length": mlp.moe_intermediate_size,  # llama.cpp wants one; no layer has it
        }
    else:
        sizes["feed_forward_length"] = mlp.intermediate_size
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
    }


def sampling_metadata(generation_config: Mapping[str, Any]) -> dict[str, Value]:
    """What generation_config.json recommends."""
    found: dict[str, Value] = {}
    for ours, theirs in SAMPLING_KEYS.items():
        value = generation_config.get(theirs)
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            found[f"general.sampling.{ours}"] = int(value) if ours == "top_k" else float(value)
    return found


def rope_factors(model: ModelConfig) -> list[float]:
    """The values of rope_freqs.weight; [] where nothing is scaled. Raises CompressError."""
    attention = parts_of(model).attention
    scaling = attention.rope.rope_scaling
    if scaling is None:
        return []
    found = rope_divisors(_said(scaling), attention.rope.rope_theta, attention.head_dim)
    if found is None:
        raise CompressError("rope_scaling: other parameters than Meta's models have cannot be read back from a GGUF")
    return found


def _said(scaling: RopeScaling) -> dict[str, object]:
    return {field: getattr(scaling, field) for field in RopeScaling.__slots__}
