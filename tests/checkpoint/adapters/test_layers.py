"""layers_to_transform and layers_pattern choose the modules that peft chooses by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from checkpoint.adapters.config import read_config
from checkpoint.errors import CheckpointError

PATH = Path("/adapters/a/adapter_config.json")
NAMES = [
    *(f"model.layers.{i}.{part}_proj" for i in (0, 1, 2, 10, 12) for part in ("self_attn.q", "self_attn.k", "mlp.up")),
    *(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (0, 1) for j in (0, 1, 2)),
    *(f"model.h.{i}.q_proj" for i in (0, 1)),
    *("model.q_proj", "q_proj", "lm_head", "layers.1.q_proj", "1.q_proj", "model.layers.1x.q_proj"),
]
CASES: list[dict[str, Any]] = [
    {"layers_to_transform": [0, 2]},
    {"layers_to_transform": 1},
    {"layers_to_transform": []},
    {"layers_to_transform": [], "layers_pattern": ["layers"]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 10], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [0, 1], "layers_pattern": ["experts"]},
    {"layers_to_transform": [0, 1], "layers_pattern": r"experts|h"},
    {"layers_to_transform": [0], "layers_pattern": r"model\.\w+"},
    {"layers_to_transform": [1], "layers_pattern": []},
    {"layers_to_transform": [1], "layers_pattern": ""},
    {"layers_to_transform": [77]},
    {"layers_to_transform": [1], "target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    {"layers_to_transform": [0, 1], "exclude_modules": ["k_proj"]},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_targets_are_those_of_peft(case: dict[str, Any]) -> None:
    given = {"target_modules": ["q_proj", "k_proj", "up_proj"], "r": 4, "lora_alpha": 8} | case
    config, of_peft = read_config({"peft_type": "LORA", **given}, PATH), LoraConfig(**given)
    of_peft.target_modules = set(given["target_modules"])
    for name in NAMES:
        found = check_target_module_exists(of_peft, name)
        assert config.is_target(name) == (found is True), name


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layers_to_transform": "all"}, "layers_to_transform: ['all'] is neither a layer's number nor a list"),
        ({"layers_to_transform": [1.0]}, "layers_to_transform: [1.0] is neither"),
        ({"layers_to_transform": [True]}, "layers_to_transform: [True] is neither"),
        ({"layers_pattern": "layers"}, "layers_pattern: is only possible with layers_to_transform"),
        ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern: 3 is neither a pattern nor a list of them"),
        ({"layers_to_transform": 1, "layers_pattern": [3]}, "layers_pattern: [3] is neither"),
        ({"layers_to_transform": 1, "layers_pattern": "("}, "layers_pattern: '(' is not a regular expression"),
        ({"layers_to_transform": 1, "layers_pattern": "(a+)+"}, "layers_pattern: '(a+)+' has a repeat"),
        ({"layers_to_transform": 1, "target_modules": "all-linear"}, "layers_to_transform: is only possible where"),
        ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "layers_to_transform: is only possible where"),
        ({"layers_pattern": "layers", "target_modules": ".*q_proj"}, "layers_pattern: is only possible where"),
    ],
)
def test_what_peft_cannot_load_is_refused_by_name(change: dict[str, Any], error: str) -> None:
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8} | change
    with pytest.raises(CheckpointError) as refused:
        read_config(raw, PATH)
    assert str(refused.value).startswith(f"{PATH}: {error}")
