"""Small adapters as PEFT would write them, and the model that they are for; without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from router.adapters.targets import AdapterTarget, targets_of

HIDDEN, NUM_LAYERS = 16, 3
SIZES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (8, HIDDEN), "mlp.down_proj": (HIDDEN, 48)}
MODULES = {f"model.layers.{layer}.{name}": size for layer in range(NUM_LAYERS) for name, size in SIZES.items()}
TARGETS: tuple[AdapterTarget, ...] = targets_of(MODULES)


def write_adapter(
    directory: Path, seed: int = 0, rank: int = 4, modules: dict[str, tuple[int, int]] | None = None
) -> Path:
    """An adapter of these modules ([outputs, inputs] by name); of all of the model's by default."""
    numbers = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (outputs, inputs) in (MODULES if modules is None else modules).items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = numbers.standard_normal((rank, inputs), dtype=np.float32)
        tensors[f"{prefix}.lora_B.weight"] = numbers.standard_normal((outputs, rank), dtype=np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
