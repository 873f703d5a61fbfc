"""A compressed-tensors checkpoint in activation order, with weight_g_idx: newer llmcompressor no longer writes it.

Run by the driver (`python -m tests.quant.make_fixtures`) in an environment of requirements_llmcompressor_old.txt.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from datasets import Dataset
from fixture_files import run, sampled_weights, versions, write_oracle
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from tiny_model import tiny_llama, token_ids, tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

NUM_ROWS, NUM_TOKENS = 16, 64  # of the calibration
WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
    "actorder": "group",
}
RECIPE = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}


def make(folder: Path) -> dict[str, object]:
    tokens = token_ids(1, NUM_ROWS, NUM_TOKENS)
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    with tempfile.TemporaryDirectory() as base:
        tiny_llama().save_pretrained(base)
        tokenizer().save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        oneshot(
            model=model,
            dataset=rows,
            recipe=[GPTQModifier(**RECIPE)],
            num_calibration_samples=NUM_ROWS,
            max_seq_length=NUM_TOKENS,
            tokenizer=tokenizer(),
        )
        model.save_pretrained(folder, save_compressed=True)
    _write_answers(folder)
    return {
        "versions": versions("llmcompressor", "compressed-tensors"),
        "command": f"llmcompressor.oneshot(recipe=GPTQModifier(**{RECIPE}))",
    }


def _write_answers(folder: Path) -> None:
    model = _decompressed(folder)
    sampled = {name: weight.clone() for name, weight in sampled_weights(model).items()}
    with torch.no_grad():
        logits = model.float().eval()(token_ids()).logits
    how = f"{versions('compressed-tensors')}: decompresses; a run in float32 puts weights on the grid again"
    write_oracle(folder, token_ids(), logits, sampled, how)


def _decompressed(folder: Path) -> LlamaForCausalLM:
    """In bfloat16. This version's from_pretrained() fails where there is a weight_g_idx."""
    model = tiny_llama()
    for name, weight in load_file(folder / "model.safetensors").items():
        if name in dict(model.named_parameters()):
            model.get_parameter(name).data.copy_(weight)
    ModelCompressor.from_pretrained(folder).decompress(model_path=str(folder), model=model)
    return model


if __name__ == "__main__":
    run({"ct-w4a16-actorder": make}, "llmcompressor")
