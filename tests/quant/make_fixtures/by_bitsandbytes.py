"""bitsandbytes checkpoints by transformers: NF4 with and without double quantization, and LLM.int8.

A model that has run without gradients on a processor with AVX512-BF16 has its 4-bit weights in another order, and
saves them so. Here a model is saved before it runs, and the answers come from one that is loaded anew and runs with
gradients. Run by the driver in an environment of requirements_transformers.txt.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from fixture_files import SAMPLED_MODULES, Maker, run, versions, write_oracle
from tiny_model import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
WATCHED = "model.layers.0.mlp.down_proj"
"""Of LLM.int8 the oracle has one product too: rounding makes the logits of two implementations differ by percents."""
CONFIGS: dict[str, dict[str, object]] = {
    "bnb-nf4": NF4,
    "bnb-nf4-double": {**NF4, "bnb_4bit_use_double_quant": True},
    "bnb-int8": {"load_in_8bit": True},
}


def make(name: str, folder: Path) -> dict[str, object]:
    config = CONFIGS[name]
    dtype = torch.float16 if name == "bnb-int8" else torch.bfloat16
    with tempfile.TemporaryDirectory() as base:
        tiny_llama(dtype).save_pretrained(base)
        quantization_config = BitsAndBytesConfig(**config)
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantization_config, dtype=dtype, device_map="cpu"
        )
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    sampled = {
        module: dequantize_bnb_weight(linear.weight, linear.state if name == "bnb-int8" else None).clone()
        for module, linear in ((module, loaded.get_submodule(module)) for module in SAMPLED_MODULES)
        if not (name == "bnb-int8" and module.endswith("q_proj"))  # its weights are float32, and the file stays small
    }
    torch.nn.Module.float(loaded)  # transformers' own float() refuses, for what it does to the quantized weights
    seen: dict[str, torch.Tensor] = {}
    if name == "bnb-int8":
        loaded.get_submodule(WATCHED).register_forward_hook(functools.partial(_keep, seen))
    logits = loaded(token_ids()).logits
    how = "loads the checkpoint and runs it in float32"
    if name == "bnb-int8":
        how += ", of which LLM.int8 rounds the inputs of products to float16; the whole prompt is one batch"
    write_oracle(folder, token_ids(), logits, sampled, f"{versions('bitsandbytes')}: {how}", seen)
    return {
        "versions": versions("bitsandbytes"),
        "command": f"from_pretrained(quantization_config=BitsAndBytesConfig(**{config})), save_pretrained()",
    }


def _keep(seen: dict[str, torch.Tensor], _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    seen[f"input.{WATCHED}"], seen[f"output.{WATCHED}"] = inputs[0], output


MAKERS: dict[str, Maker] = {name: functools.partial(make, name) for name in CONFIGS}

if __name__ == "__main__":
    run(MAKERS, "bitsandbytes")
