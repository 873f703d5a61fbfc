"""A LoRA adapter (arXiv:2106.09685): two thin matrices beside each matrix that it changes, and its directory in PEFT's
layout. Knows nothing of how the base is stored or what is learned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Which matrices an adapter changes, and how much."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """What the thin matrices' product is multiplied with."""
        return self.alpha / self.rank


class LoraPair(nn.Module):
    """y = scale * B A x; B starts at zero, and with it y."""

    def __init__(self, outputs: int, inputs: int, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # PEFT's: Kaiming's uniform numbers with a = sqrt(5)
        self.lora_A = nn.Parameter((torch.rand(options.rank, inputs, generator=generator) * 2 - 1) * bound)
        self.lora_B = nn.Parameter(torch.zeros(outputs, options.rank))
        self.scale = options.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    def added(self) -> Tensor:
        """[outputs, inputs]: what merging adds to the matrix."""
        return self.scale * self.lora_B @ self.lora_A


def config_json(options: LoraOptions, base: str) -> dict[str, object]:
    """adapter_config.json, as PEFT writes it. base: name or directory of the model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "target_modules": list(options.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def write(pairs: Mapping[str, LoraPair], options: LoraOptions, base: str, directory: Path) -> None:
    """Config and tensors (bf16) into a directory that is there. pairs: by the name of the module in the base."""
    tensors = {}
    for name, pair in pairs.items():
        for which, matrix in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
            tensors[f"{_PREFIX}{name}.{which}.weight"] = matrix.detach().to(torch.bfloat16).contiguous()
    path = directory / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets the owner read only
    (directory / "adapter_config.json").write_text(json.dumps(config_json(options, base), indent=2) + "\n")
