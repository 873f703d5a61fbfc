"""Adapters of experts: logits are those of the merged model, and of peft, which fuses the experts' adapters itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.peft_adapters import load_adapted, load_base, make_adapter, ref_of
from tests.workers.adapters.test_matches_peft import GREEDY, assert_close, config_of, last_logits
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import make_checkpoint, prompts

EXPERTS, LAYERS, HIDDEN, WIDTH, RANK, ALPHA = 6, 3, 32, 24, 4, 8
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2)], ids=lambda p: f"tp{p[0]}-pp{p[1]}")
def group(request: pytest.FixtureRequest):
    with EngineGroup(*request.param) as group:
        yield group


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return make_checkpoint("qwen3_experts", folder)


@pytest.fixture(scope="module")
def adapter(base: Path, folder: Path) -> Path:
    """Attention, and every matrix of every expert, as a checkpoint with one module for each expert has them."""
    directory = make_adapter(base, folder / "experts", target_modules=["q_proj", "o_proj"], r=RANK, lora_alpha=ALPHA)
    path, generator = directory / "adapter_model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, (outputs, inputs) in SHAPES.items():
                prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.3
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.3
    save_file(tensors, path)
    config = directory / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"target_modules": ["q_proj", "o_proj", *SHAPES]}))
    return directory


def merged(base: Path, adapter: Path) -> torch.nn.Module:
    """The base with each product's share added to its weights."""
    model, tensors = load_base(base), load_file(adapter / "adapter_model.safetensors")
    prefix, scale = "base_model.model.", ALPHA / RANK
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(prefix).removesuffix(".lora_A.weight")
        added = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        with torch.no_grad():
            if ".experts." not in module:
                model.get_submodule(module).weight += added
                continue
            parent, _, rest = module.partition(".experts.")
            expert, kind = rest.split(".")
            experts = model.get_submodule(parent + ".experts")
            if kind == "down_proj":
                experts.down_proj[int(expert)] += added
            else:
                gate, up = experts.gate_up_proj[int(expert)].chunk(2)
                (gate if kind == "gate_proj" else up).add_(added)
    return model


def test_logits_are_those_of_the_merged_model_and_of_peft(group: EngineGroup, base: Path, adapter: Path) -> None:
    asked = [*prompts(), prompts()[0]]
    found = group.run(config_of(base, group), asked, GREEDY, [ref_of(adapter)] * 3 + [None])
    assert found.completions[0] != found.completions[3], "the adapter changes what is chosen"
    models = {"merged": [merged(base, adapter)] * 3, "peft": [load_adapted(base, adapter)] * 3}
    for kind, adapted in models.items():
        for i, model in enumerate([*adapted, load_base(base)]):
            expected = last_logits(model, asked[i], found.completions[i])
            assert found.completions[i] == expected.argmax(dim=1).tolist(), kind
            if found.logits:
                assert_close(found.logits[i][:, : expected.shape[1]], expected)


def test_a_router_takes_no_adapter(single: EngineGroup, base: Path, folder: Path) -> None:
    directory = make_adapter(base, folder / "router", target_modules=["q_proj"])
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for kind, shape in (("A", (4, HIDDEN)), ("B", (EXPERTS, 4))):
        tensors[f"base_model.model.model.layers.0.mlp.gate.lora_{kind}.weight"] = torch.zeros(*shape)
    save_file(tensors, path)
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "gate"]}))
    end = single.run(config_of(base, single), prompts()[:1], GREEDY, [ref_of(directory)]).ends[0]
    assert "model.layers.0.mlp.gate: this model has no such matrix that takes adapters" in end.error
