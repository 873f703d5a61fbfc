"""The model that every fixture quantizes: two layers, weights from a seed, a few outlier columns.

The weights depend on torch's generator alone, so that every tool's environment makes the same ones.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WEIGHT_STD = 0.08
_WEIGHT_OUTLIERS = (3, 40, 90)  # input columns of every projection, four times as large
_NORM_OUTLIERS = (5, 77)  # channels that the norms make six times as large


def tiny_llama(dtype: torch.dtype = torch.bfloat16, **changes: object) -> LlamaForCausalLM:
    return _seeded(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})), dtype)


def tiny_experts(dtype: torch.dtype = torch.bfloat16, **changes: object) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(**{**SHAPE, **_EXPERTS, "norm_topk_prob": True, **changes})
    return _seeded(Qwen3MoeForCausalLM(config), dtype)


def token_ids(seed: int = 0, num_rows: int = 1, num_tokens: int = 24) -> torch.Tensor:
    """int64 [num_rows, num_tokens]. Seed 0 is the prompt of the oracles; others are for calibration."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, int(str(SHAPE["vocab_size"])), (num_rows, num_tokens), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """Tools want one; they tokenize nothing with it."""
    words = {f"w{i}": i for i in range(int(str(SHAPE["vocab_size"])))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0")


@torch.no_grad()
def _seeded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.1 * values
            if parameter.numel() > max(_NORM_OUTLIERS):
                values[list(_NORM_OUTLIERS)] *= 6
        elif "embed_tokens" not in name:
            values *= _WEIGHT_STD
            columns = [column for column in _WEIGHT_OUTLIERS if column < parameter.shape[-1]]
            values[..., columns] *= 4
        # To 16 bits first: fixtures in f32 and in bf16 hold the same weights.
        parameter.data = values.to(torch.bfloat16).to(dtype)
    return model.eval()  # its buffers stay float32, as from_pretrained() keeps them
