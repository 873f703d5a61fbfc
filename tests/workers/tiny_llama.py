"""Tiny random checkpoints of several shapes, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

END_ID = 96  # of the tokenizer
_BASE: dict[str, object] = {
    "vocab_size": 97,  # not a multiple of 2: the vocabulary-parallel split must pad
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # not a multiple of 2: pipeline stages are uneven
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, dict[str, object]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
    "llama3_rope": {"rope_parameters": _LLAMA3_ROPE},
    "qwen3": {"head_dim": 16},
    "qwen3_experts": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
_CONFIGS: dict[str, type[PretrainedConfig]] = {"qwen3": Qwen3Config, "qwen3_experts": Qwen3MoeConfig}


def make_checkpoint(shape: str, directory: Path, **save: object) -> Path:
    """A random model in bf16, large enough weights that greedy choices are clear."""
    torch.manual_seed(sum(map(ord, shape)))
    config = _CONFIGS.get(shape, LlamaConfig)(**{**_BASE, **SHAPES[shape], "initializer_range": 0.2})
    model = AutoModelForCausalLM.from_config(config)
    path = directory / shape
    model.to(torch.bfloat16).save_pretrained(path, **save)
    return path


def with_kv_channels(path: Path) -> Path:
    """The same checkpoint, with a scale and a shift of each channel of its cache; those of a calibration would fit."""
    file = path / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(7)
    config = AutoConfig.from_pretrained(path)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_key_value_heads, head_dim)
    for name in (
        f"model.layers.{i}.self_attn.{kind}_channel" for i in range(config.num_hidden_layers) for kind in "kv"
    ):
        tensors[f"{name}_scale"] = torch.rand(shape, generator=generator) + 0.5
        tensors[f"{name}_shift"] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, file, {"format": "pt"})
    return path


def write_tokenizer(file: Path) -> None:
    """One token for each printable character, as byte-level tokenizers spell them."""
    characters = ["\u0120", *(chr(code) for code in range(33, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)} | {"~~": 95}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("~", "~")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.token_to_id("<end>") == END_ID
    tokenizer.save(str(file))


def prompts(seed: int = 0) -> list[list[int]]:
    """Prompts of several lengths; two share a prefix."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(97, (13,), generator=generator).tolist()
    return [
        torch.randint(97, (9,), generator=generator).tolist(),
        shared + torch.randint(97, (10,), generator=generator).tolist(),
        shared + torch.randint(97, (4,), generator=generator).tolist(),
    ]


def generate_with_transformers(path: Path, token_ids: list[int], max_tokens: int) -> list[int]:
    """Greedy, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor([token_ids])
    mask = torch.ones_like(prompt)  # without it, generate takes the prompt's own zeros for padding
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[0, len(token_ids) :].tolist()
