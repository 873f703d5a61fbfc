"""ModelOpt's export of FP8, FP8 with an FP8 cache, and INT8 with SmoothQuant.

No tool loads these on a CPU, so the answers come from ModelOpt's quantizers: they get the scales of the checkpoint,
and the weights that its tensor types dequantize. The model that was exported is not asked: its scales differ from the
checkpoint's in the last bit, so ties round otherwise. Run by the driver in an environment of requirements_modelopt.txt.
"""

from __future__ import annotations

import functools
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from fixture_files import Maker, run, sampled_weights, versions, write_oracle
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor
from safetensors.torch import load_file
from tiny_model import tiny_llama, token_ids
from transformers import LlamaForCausalLM

GREATEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
Tensors = dict[str, torch.Tensor]
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "modelopt-fp8": ("FP8_DEFAULT_CFG", {}),
    "modelopt-fp8-kv": ("FP8_DEFAULT_CFG and FP8_KV_CFG", {"intermediate_size": 64}),
    "modelopt-int8-sq": ("INT8_SMOOTHQUANT_CFG", {}),
}
NUM_ROWS, NUM_TOKENS = 16, 64  # of the calibration


def make(name: str, folder: Path) -> dict[str, object]:
    words, shape = CONFIGS[name]
    model = tiny_llama(**shape)
    model.config.architectures = ["LlamaForCausalLM"]  # the export reads it
    mtq.quantize(model, _config(words), lambda module: module(token_ids(1, NUM_ROWS, NUM_TOKENS)))
    with torch.no_grad():
        before = model(token_ids()).logits.float()
    export_hf_checkpoint(model, export_dir=folder)
    rebuilt = _rebuilt(words, tiny_llama(torch.float32, **shape), load_file(folder / "model.safetensors"))
    with torch.no_grad():
        logits = rebuilt(token_ids()).logits
    print(name, "logits before the export are", float((before - logits).norm() / logits.norm()), "away")
    how = "ModelOpt's quantizers with the checkpoint's scales and dequantized weights, in float32"
    sampled = {module: weight.bfloat16() for module, weight in sampled_weights(rebuilt).items()}
    write_oracle(folder, token_ids(), logits, sampled, f"{versions('nvidia-modelopt')}: {how}")
    return {
        "versions": versions("nvidia-modelopt"),
        "command": f"modelopt.torch.quantization.quantize() with {words}, export_hf_checkpoint()",
    }


def _config(words: str) -> dict[str, object]:
    first, *kv = (getattr(mtq, word) for word in words.split(" and "))
    return mtq.update_quant_cfg_with_kv_cache_quant(first, kv[0]["quant_cfg"]) if kv else first


def _rebuilt(words: str, model: LlamaForCausalLM, tensors: Tensors) -> LlamaForCausalLM:
    mtq.quantize(model, {**_config(words), "algorithm": "max"}, lambda module: module(token_ids()))
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        module = model.get_submodule(name)
        module.weight.data = _dequantized(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"])
        module.weight_quantizer.disable()
        greatest = GREATEST[tensors[f"{name}.weight"].dtype]
        module.input_quantizer.amax = tensors[f"{name}.input_scale"] * greatest
        if f"{name}.pre_quant_scale" in tensors:
            module.input_quantizer.pre_quant_scale = tensors[f"{name}.pre_quant_scale"].float()
    for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
        attention, _, scale = name.rsplit(".", 2)
        quantizer = model.get_submodule(f"{attention}.{scale[0]}_bmm_quantizer")
        quantizer.amax = tensors[name] * GREATEST[torch.float8_e4m3fn]
    return model.eval()


def _dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]; int8 has a scale for each output."""
    kind = FP8QTensor if codes.dtype == torch.float8_e4m3fn else INT8QTensor
    rows = scale.view(-1, 1) if scale.dim() else scale
    return kind(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=rows)


MAKERS: dict[str, Maker] = {name: functools.partial(make, name) for name in CONFIGS}

if __name__ == "__main__":
    run(MAKERS, "modelopt")
