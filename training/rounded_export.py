"""Writes a model that was trained with rounded weights as a directory that is served: W4A16 in compressed-tensors'
format, or BitNet's. The numbers are those that were trained with, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.recipe import Recipe
from compress.schemes import PLAIN, scheme_named
from compress.stored import StoredModel
from training.llama import Llama
from training.rounded import GROUP_SIZE, RoundedLinear, TernaryLinear
from workers.model.weight_format import Matrices

_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_BITNET = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",  # the scale multiplies
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}


def export(model: Llama, tokenizer_from: Path, out: Path) -> None:
    """Under the final name when it is whole. tokenizer_from: a model directory."""
    named = model.named_modules()
    linears = {f"model.{name}": module for name, module in named if isinstance(module, RoundedLinear)}
    is_ternary = any(isinstance(module, TernaryLinear) for module in linears.values())
    shapes = {name: module.weight.shape for name, module in linears.items()}
    matrices = [Matrices((name,), (shape[0],), shape[1]) for name, shape in shapes.items()]
    encoder = StoredModel(Recipe(PLAIN if is_ternary else scheme_named("w4a16", GROUP_SIZE)), matrices)
    quantization: dict[str, Any] | None = _BITNET if is_ternary else encoder.quantization_config
    tensors: dict[str, Tensor] = {}
    for name, module in linears.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in module.stored(encoder).items()}
    for name, parameter in model.named_parameters():
        if not any(f"model.{name}".startswith(linear + ".") for linear in linears):
            tensors[f"model.{name}"] = parameter.detach().to(torch.bfloat16)
    config = {**model.shape.config_json(), "quantization_config": quantization}
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in _COPIED:
        if (tokenizer_from / file).exists():
            shutil.copyfile(tokenizer_from / file, unfinished / file)
    save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished / "model.safetensors", {"format": "pt"})
    (unfinished / "model.safetensors").chmod(0o644)  # safetensors lets the owner read only
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    unfinished.rename(out)
