"""Small random models that groups of 32 divide, and token blocks for them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from compress.calibration.blocks import TokenBlocks

VOCAB = 96
_BASE: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
_KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "llama64": (LlamaConfig, {}),
    "mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "qwen3_experts": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
}


def make_model(kind: str, folder: Path) -> Path:
    """A checkpoint in bf16, with inputs that are not all alike: norms have weights of several sizes."""
    torch.manual_seed(sum(map(ord, kind)))
    make, options = _KINDS[kind]
    model = AutoModelForCausalLM.from_config(make(**{**_BASE, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.rand(parameter.shape) * 2 + 0.05)
    path = folder / kind
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def make_blocks(num_calibration: int = 6, num_held_out: int = 3, num_tokens: int = 40) -> TokenBlocks:
    """Random ids."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (num_calibration + num_held_out, num_tokens), generator=generator)
    return TokenBlocks(ids[:num_calibration], ids[num_calibration:])
