"""Adapters over quantised weights: logits are those of peft over the same weights, dequantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.peft_adapters import load_adapted, load_base, make_adapter, ref_of
from tests.quant.served import FIXTURES, dequantized
from tests.workers.adapters.test_matches_peft import GREEDY, config_of, last_logits
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import prompts

# Largest error as a share of the largest logit. Where activations are rounded to 8 bits too, peft does not.
BASES = {
    "ct-w4a16-g32": 1e-4,
    "gptq-v2": 1e-4,
    "awq-gemm": 1e-4,
    "bnb-nf4-double": 1e-4,
    "ct-fp8-dynamic": 0.1,
    "ct-w8a8": 0.1,
}


def matrices(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of all in a layer."""
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {f"self_attn.{name}_proj": shape for name, shape in attention.items()} | {
        f"mlp.{name}_proj": shape for name, shape in mlp.items()
    }


def dense_copy(fixture: Path, directory: Path) -> Path:
    """The fixture with dense weights, as this project reads them."""
    directory.mkdir()
    config = json.loads((fixture / "config.json").read_text())
    tensors = load_file(fixture / "model.safetensors")
    dense = {
        name: tensor.float()
        for name, tensor in tensors.items()
        if "norm" in name or name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in matrices(config).items():
            matrix = f"model.layers.{layer}.{name}"
            dense[f"{matrix}.weight"] = dequantized(fixture, matrix, shape).contiguous()
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(dense, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", BASES)
def test_logits_are_those_of_peft_over_dequantised_weights(single: EngineGroup, tmp_path: Path, name: str) -> None:
    base = dense_copy(FIXTURES / name, tmp_path / "dense")
    adapter = make_adapter(base, tmp_path / "adapter", std=0.1)
    asked = [*prompts()[:2], prompts()[0]]
    found = single.run(config_of(FIXTURES / name, single), asked, GREEDY, [ref_of(adapter)] * 2 + [None])
    for i, model in enumerate([load_adapted(base, adapter)] * 2 + [load_base(base)]):
        expected = last_logits(model, asked[i], found.completions[i])
        error = (found.logits[i] - expected).abs().max() / expected.abs().max()
        assert error <= BASES[name], f"request {i}"
    base_logits = last_logits(load_base(base), asked[0], found.completions[0])
    assert (found.logits[0] - base_logits).abs().max() > 0.3 * base_logits.abs().max(), "the adapter changes logits"


@pytest.mark.parametrize("name", ["ct-w4a16-g32", "ct-w8a8"])
def test_the_fast_products_take_adapters_too(single: EngineGroup, tmp_path: Path, name: str) -> None:
    """In bfloat16, where a CPU has packed products; two in one step, and one without."""
    base = dense_copy(FIXTURES / name, tmp_path / "dense")
    refs = [ref_of(make_adapter(base, tmp_path / f"a{i}", seed=i, std=0.1)) for i in range(2)]
    config = config_of(FIXTURES / name, single, dtype="bfloat16")
    found = single.run(config, [prompts()[0]] * 3, GREEDY, [*refs, None])
    models = [load_adapted(base, Path(ref.path)) for ref in refs] + [load_base(base)]
    for i, model in enumerate(models):
        expected = last_logits(model, prompts()[0], found.completions[i])
        assert (found.logits[i] - expected).norm() <= 0.1 * expected.norm(), f"request {i}"
        others = [m for m in models if m is not model]
        for other in others:
            wrong = last_logits(other, prompts()[0], found.completions[i])
            assert (found.logits[i] - wrong).norm() > 2 * (found.logits[i] - expected).norm()
