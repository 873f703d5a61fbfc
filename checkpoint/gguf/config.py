"""config.json and generation_config.json of the model that a GGUF holds, from its metadata and the shapes of its
tensors. Knows nothing of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.gguf.metadata import Metadata
from checkpoint.gguf.metadata_keys import SAMPLING_KEYS
from checkpoint.gguf.names import ROPE_FACTORS
from checkpoint.gguf.rope import llama3_scaling

QUANT_METHOD = "gguf"
"""In config.json's quantization_config."""
TYPES = "types"
"""There: the type of each matrix of blocks, by name, with * for the number of an expert."""


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """What the table of tensors says."""

    vocab_size: int  # rows of the embedding
    has_head: bool  # beside the embedding
    rope_divisors: Sequence[float]  # of rope_freqs.weight; () where there is none
    block_types: Mapping[str, str]  # as TYPES says


def config_json(metadata: Metadata, architecture: str, shapes: ModelShapes, end_ids: Sequence[int]) -> dict[str, Any]:
    """What config.json says. end_ids: of the tokens that end a stream. Raises CheckpointError."""
    size = _sizes(metadata, architecture)
    heads = size("attention.head_count", None)
    if metadata.values.get(f"{architecture}.vocab_size", shapes.vocab_size) != shapes.vocab_size:
        raise metadata.refuse(f"{architecture}.vocab_size is not the {shapes.vocab_size} rows of the embedding")
    theta = metadata.number(f"{architecture}.rope.freq_base", 10000.0)
    return {
        **_FAMILIES[architecture](size),
        "hidden_size": size("embedding_length", None),
        "num_hidden_layers": size("block_count", None),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim(metadata, architecture),
        "vocab_size": shapes.vocab_size,
        "max_position_embeddings": size("context_length", None),
        "rms_norm_eps": metadata.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        **_rope_scaling(metadata, shapes, theta),
        "tie_word_embeddings": not shapes.has_head,
        "hidden_act": "silu",
        **({"eos_token_id": list(end_ids)} if end_ids else {}),
        "quantization_config": {"quant_method": QUANT_METHOD, TYPES: dict(shapes.block_types)},
    }


def generation_config_json(metadata: Metadata, end_ids: Sequence[int]) -> dict[str, Any]:
    """What generation_config.json says: the ends of a stream, and what the file recommends."""
    found: dict[str, Any] = {"eos_token_id": list(end_ids)} if end_ids else {}
    for ours, theirs in SAMPLING_KEYS.items():
        if f"general.sampling.{ours}" in metadata.values:
            value = metadata.number(f"general.sampling.{ours}")
            found[theirs] = int(value) if value.is_integer() else value
    return found


def head_dim(metadata: Metadata, architecture: str) -> int:
    """Values of a head: the same for queries, keys and values, and all of them are rotated. Raises CheckpointError."""
    size = _sizes(metadata, architecture)
    even = size("embedding_length", None) // size("attention.head_count", None)
    found = size("attention.key_length", max(1, even))
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, found) != found:
            raise metadata.refuse(f"{architecture}.{name} is not {found}, the size of a head")
    return found


def _sizes(metadata: Metadata, architecture: str) -> Callable[[str, int | None], int]:
    return lambda name, default: metadata.size(f"{architecture}.{name}", default)


def _rope_scaling(metadata: Metadata, shapes: ModelShapes, theta: float) -> dict[str, Any]:
    if not shapes.rope_divisors:
        return {}
    scaling = llama3_scaling(shapes.rope_divisors, theta)
    if scaling is None:
        raise metadata.refuse(f"{ROPE_FACTORS} is not Llama 3's scaling of rotary frequencies; no other is supported")
    return {"rope_scaling": scaling} if scaling else {}


def _llama(size: Callable[[str, int | None], int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": size("feed_forward_length", None),
    }


def _qwen3(size: Callable[[str, int | None], int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": size("feed_forward_length", None),
    }


def _qwen3_moe(size: Callable[[str, int | None], int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": size("expert_count", None),
        "num_experts_per_tok": size("expert_used_count", None),
        "moe_intermediate_size": size("expert_feed_forward_length", None),
        "norm_topk_prob": True,  # as llama.cpp computes it
    }


_FAMILIES: Mapping[str, Callable[[Callable[[str, int | None], int]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
}
"""By general.architecture: the keys that its family alone has."""

ARCHITECTURES = tuple(_FAMILIES)
