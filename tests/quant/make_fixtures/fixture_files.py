"""Writes what goes beside a quantized checkpoint: the oracle's answers, and a note of what made it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

NOTE = "made.json"
"""The driver moves it into the manifest."""
SAMPLED_MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
)
SAMPLED_OF_EXPERTS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.3.gate_proj",
    "model.layers.1.mlp.experts.0.down_proj",
)
NUM_LOGIT_ROWS = 4
_LEFT_OUT = ("generation_config.json", "recipe.yaml", "README.md", ".gitattributes")

Maker = Callable[[Path], dict[str, object]]
"""Makes one fixture in an empty folder, and returns its note: what the manifest says of it."""


def sampled_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By module name; transformers keeps the experts of a layer in two tensors, and a sample is cut out of one."""
    if model.config.model_type != "qwen3_moe":
        return {name: model.get_submodule(name).weight for name in SAMPLED_MODULES}
    return {name: _weight_of_expert(model, name) if "experts" in name else model.get_submodule(name).weight
            for name in SAMPLED_OF_EXPERTS}  # fmt: skip


def _weight_of_expert(model: PreTrainedModel, name: str) -> torch.Tensor:
    experts, number, projection = name.rsplit(".", 2)
    if projection == "down_proj":
        return model.get_submodule(experts).down_proj[int(number)]
    gate, up = model.get_submodule(experts).gate_up_proj[int(number)].chunk(2)
    return {"gate_proj": gate, "up_proj": up}[projection]


def write_oracle(
    folder: Path,
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    dequantized: Mapping[str, torch.Tensor],
    logits_by: str,
    more: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`logits` [1, n, vocab]; of them the last rows are kept."""
    tensors = {name: tensor.detach().clone() for name, tensor in (more or {}).items()}
    tensors |= {f"dequantized.{name}": weight.detach().cpu().clone() for name, weight in dequantized.items()}
    tensors["token_ids"] = token_ids.clone()
    tensors["logits"] = logits[:, -NUM_LOGIT_ROWS:].detach().float().contiguous()
    save_file(tensors, folder / "oracle.safetensors", metadata={"logits_by": logits_by})


def versions(*packages: str) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in (*packages, "transformers", "torch"))


def run(makers: Mapping[str, Maker], tool: str) -> None:
    """The command line of a script: `--out FOLDER NAME...`; a note lies in each fixture's folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    for name in options.names or makers:
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        note = {"tool": tool, **makers[name](folder)}
        for left_out in _LEFT_OUT:
            (folder / left_out).unlink(missing_ok=True)
        (folder / NOTE).write_text(json.dumps(note))
        print("made", name, flush=True)
