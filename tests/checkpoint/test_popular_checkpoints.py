"""Keys and values as the config files of widely used checkpoints have them: none of these may be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.generation_keys import GENERATION_KEYS
from checkpoint.keys import check_keys
from workers.model.registry import load_config

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
_QWEN: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN_SAMPLING = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


# name: config.json, generation_config.json, and head_dim, eos ids as they must be understood
POPULAR: dict[str, tuple[dict[str, Any], dict[str, Any], int, set[int]]] = {
    "Llama-2-7b-chat": (
        {
            **_LLAMA,
            **sizes(4096, 11008, 32, 32, 32, 32000),
            "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
            "max_length": 4096,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_length": 4096,
            "pad_token_id": 0,
            "temperature": 0.6,
            "top_p": 0.9,
        },
        128,
        {2},
    ),
    "Llama-3.1-8B-Instruct": (
        {
            **_LLAMA,
            **sizes(4096, 14336, 32, 32, 8, 128256),
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        {
            "bos_token_id": 128000,
            "do_sample": True,
            "eos_token_id": [128001, 128008, 128009],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.42.3",
        },
        128,
        {128001, 128008, 128009},
    ),
    "SmolLM2-135M-Instruct": (
        {
            **_LLAMA,
            **sizes(576, 1536, 30, 9, 3, 49152),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "pad_token_id": 2,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        },
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        64,
        {2},
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        {
            **_LLAMA,
            **sizes(4096, 14336, 32, 32, 8, 128256),
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        {
            "_from_model_config": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
        128,
        {128001},
    ),
    "Qwen3-0.6B": (
        {
            **_QWEN,
            **sizes(1024, 3072, 28, 16, 8, 151936),
            "architectures": ["Qwen3ForCausalLM"],
            "max_window_layers": 28,
            "model_type": "qwen3",
            "tie_word_embeddings": True,
        },
        _QWEN_SAMPLING,
        128,
        {151645, 151643},
    ),
    "Qwen3-30B-A3B": (
        {
            **_QWEN,
            **sizes(2048, 6144, 48, 32, 4, 151936),
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "use_qk_norm": True,
            "qkv_bias": False,
        },
        _QWEN_SAMPLING,
        128,
        {151645, 151643},
    ),
}


@pytest.mark.parametrize("name", POPULAR)
def test_it_is_understood(name: str, tmp_path: Path) -> None:
    config, generation, head_dim, ends = POPULAR[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = load_config(tmp_path)
    assert model.cache_specs[0].head_dim == head_dim
    assert set(model.eos_token_ids) == ends
    check_keys(generation, GENERATION_KEYS, "generation_config.json")
