"""compressed-tensors checkpoints by llmcompressor; transformers loads and runs them for the oracle.

Run by the driver (`python -m tests.quant.make_fixtures`) in an environment of requirements_llmcompressor.txt.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from fixture_files import Maker, run, sampled_weights, versions, write_oracle
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_model import tiny_experts, tiny_llama, token_ids, tokenizer
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

Arguments = dict[str, object]
NUM_ROWS, NUM_TOKENS = 16, 64  # of the calibration


def weights(num_bits: int, strategy: str, **more: object) -> Arguments:
    return {"num_bits": num_bits, "type": "int", "strategy": strategy, "symmetric": True, **more}


def group(targets: list[str], **parts: Arguments) -> Arguments:
    return {"targets": targets, **parts}


def one_group(**parts: Arguments) -> Arguments:
    return {"config_groups": {"group_0": group(["Linear"], **parts)}}


def scheme(name: str) -> Arguments:
    return {"scheme": name, "targets": "Linear"}


def w4(**more: object) -> Arguments:
    return weights(4, "group", group_size=32, **more)


INT8_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
INT8_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
MIXED = {
    "ignore": ["lm_head", "re:.*layers[.]1[.]self_attn[.]o_proj"],
    "config_groups": {
        "group_0": group(["re:.*self_attn.*"], weights=weights(8, "channel"), input_activations=INT8_TOKENS),
        "group_1": group(["re:.*mlp[.](gate|up|down)_proj"], weights=w4()),
    },
}
RECIPES: dict[str, Arguments] = {
    "ct-w4a16-g32": one_group(weights=w4()),
    "ct-w4a16-asym": one_group(weights=w4(symmetric=False)),
    "ct-w4a16-channel": one_group(weights=weights(4, "channel")),
    "ct-w4a16-k96": one_group(weights=w4()),
    "ct-w8a16": one_group(weights=weights(8, "group", group_size=32)),
    "ct-w8a8": scheme("W8A8"),
    "ct-w8a8-static": one_group(weights=weights(8, "channel"), input_activations=INT8_TENSOR),
    "ct-w4a8": one_group(weights=w4(), input_activations=INT8_TOKENS),
    "ct-fp8-dynamic": scheme("FP8_DYNAMIC"),
    "ct-fp8-static": scheme("FP8"),
    "ct-fp8-block": scheme("FP8_BLOCK"),
    "ct-mxfp4": scheme("MXFP4A16"),
    "ct-nvfp4": scheme("NVFP4A16"),
    "ct-nvfp4-a4": scheme("NVFP4"),
    "ct-fp8-kv": {"kv_cache_scheme": FP8_TENSOR},
    "ct-mixed": MIXED,
    "ct-moe-w4a16": {"ignore": ["lm_head", "re:.*mlp[.]gate$"], **one_group(weights=w4())},
}
SHAPES: dict[str, Arguments] = {
    "ct-w4a16-k96": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 160},
    "ct-fp8-kv": {"intermediate_size": 64},  # its weights stay 16 bits wide
}
IN_BF16 = ("ct-mxfp4", "ct-nvfp4", "ct-nvfp4-a4", "ct-moe-w4a16")
"""Their weights, or their experts' ones, are dequantized to bfloat16 whatever the model's type is."""


def make(name: str, folder: Path) -> dict[str, object]:
    recipe = {"ignore": ["lm_head"], **RECIPES[name]}
    _quantize(name, recipe, folder)
    in_bf16 = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    sampled = {} if name == "ct-fp8-kv" else {key: value.clone() for key, value in sampled_weights(in_bf16).items()}
    if name in IN_BF16:
        in_f32, how = in_bf16.float(), "dequantizes the checkpoint to bfloat16 and runs it in float32"
    else:
        in_f32 = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        how = "loads the checkpoint in float32 and runs it"
    tokens = token_ids()
    with torch.no_grad():
        logits = in_f32.eval()(tokens).logits
    write_oracle(folder, tokens, logits, sampled, f"{versions('compressed-tensors')}: {how}")
    return {
        "versions": versions("llmcompressor", "compressed-tensors"),
        "command": f"llmcompressor.oneshot(recipe=QuantizationModifier(**{recipe}))",
    }


def _quantize(name: str, recipe: Arguments, folder: Path) -> None:
    tokens = token_ids(1, NUM_ROWS, NUM_TOKENS)
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    make_model = tiny_experts if "moe" in name else tiny_llama
    with tempfile.TemporaryDirectory() as base:  # oneshot() wants a model that was loaded from a folder
        make_model(**SHAPES.get(name, {})).save_pretrained(base)
        tokenizer().save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        oneshot(
            model=model,
            dataset=rows,
            recipe=[QuantizationModifier(**recipe)],
            num_calibration_samples=NUM_ROWS,
            max_seq_length=NUM_TOKENS,
            tokenizer=tokenizer(),
        )
        model.save_pretrained(folder, save_compressed=True)


MAKERS: dict[str, Maker] = {name: functools.partial(make, name) for name in RECIPES}

if __name__ == "__main__":
    run(MAKERS, "llmcompressor")
