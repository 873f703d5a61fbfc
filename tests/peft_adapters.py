"""Adapters that peft makes for tiny models, with weights that are large enough to change what is chosen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from checkpoint.adapters.directory import read_adapter
from workers.engine.adapters.ref import AdapterRef

ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, directory: Path, seed: int = 0, std: float = 0.3, **options: Any) -> Path:
    """A random adapter of the model at `base`. std: of its numbers. options: of LoraConfig."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ALL_MODULES, "task_type": "CAUSAL_LM"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it cannot look up the base at the Hub
        model = get_peft_model(load_base(base), LoraConfig(**given))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=std)
        model.save_pretrained(directory)
    return directory


def load_base(base: Path) -> Any:
    """In fp32, as transformers has it."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def load_adapted(base: Path, adapter: Path, is_merged: bool = False) -> Any:
    """As peft serves it."""
    model = PeftModel.from_pretrained(load_base(base), adapter)
    return model.merge_and_unload() if is_merged else model.eval()


def ref_of(directory: Path, name: str = "") -> AdapterRef:
    """As a router names it to a worker."""
    return AdapterRef(name or directory.name, read_adapter(directory).digest, str(directory))
