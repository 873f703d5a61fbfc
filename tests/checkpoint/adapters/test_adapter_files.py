"""What peft writes is read as peft means it; what would be served wrongly is refused, by file and key or tensor."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.adapters.directory import Adapter, adapter_digest, open_adapter, read_adapter
from checkpoint.errors import CheckpointError
from tests.peft_adapters import ALL_MODULES, load_adapted, make_adapter
from tests.workers.tiny_llama import make_checkpoint

A_NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_NAME = A_NAME.replace("lora_A", "lora_B")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def of_peft(base: Path, directory: Path) -> dict[str, tuple[int, float]]:
    """Rank and scale of each module, as peft loads the adapter."""
    found = {}
    for name, module in load_adapted(base, directory).named_modules():
        if hasattr(module, "lora_A"):
            name = name.removeprefix("base_model.model.")
            found[name] = (module.r["default"], module.scaling["default"])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj"},
        {"target_modules": ["mlp.down_proj"], "use_rslora": True},
        {"exclude_modules": ["k_proj"], "layers_to_transform": [1]},
        {"layers_to_transform": 2, "layers_pattern": ["h", "layers"]},
        {
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 2, "^model.layers.2.*down_proj": 7},
            "alpha_pattern": {"q_proj": 5, "mlp.gate_proj": 1},
            "use_rslora": True,
        },
    ],
)
def test_modules_ranks_and_scales_are_those_of_peft(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    directory = make_adapter(base, tmp_path / "adapter", **options)
    adapter = read_adapter(directory)
    assert {m.name: (m.rank, pytest.approx(m.scale)) for m in adapter.modules} == of_peft(base, directory)


def test_tensors_lie_where_they_are_said_to(adapter: Path) -> None:
    found, content = open_adapter(adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(found.modules) == 3 * len(ALL_MODULES)
    for tensor in [t for module in found.modules for t in (module.a, module.b)]:
        there = torch.frombuffer(bytearray(content[tensor.begin : tensor.end]), dtype=torch.float32)
        assert torch.equal(there.view(tensor.shape), stored[tensor.name])
    assert found.num_bytes == sum(t.nbytes for t in stored.values())


def test_every_byte_counts_in_the_digest(adapter: Path) -> None:
    first = read_adapter(adapter)
    assert len(first.digest) == 32
    assert adapter_digest(adapter) == first.digest
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    changed = read_adapter(adapter).digest
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert len({first.digest, changed, read_adapter(adapter).digest}) == 3


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def set_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change_file(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return change_file


def cut_short(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(directory: Path) -> None:
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def with_value(name: str, value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][-1, -1] = value

    return set_tensors(change)


def as_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = tensors.pop(A_NAME)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "peft_type": (set_config(peft_type="IA3"), "adapter_config.json: peft_type='IA3' is not supported"),
    "dora": (set_config(use_dora=True), "adapter_config.json: use_dora=true is not supported: DoRA"),
    "bias": (set_config(bias="lora_only"), 'adapter_config.json: bias="lora_only" is not supported'),
    "saved": (set_config(modules_to_save=["lm_head"]), "adapter_config.json: modules_to_save="),
    "pissa": (set_config(init_lora_weights="pissa"), 'adapter_config.json: init_lora_weights="pissa"'),
    "parameters": (set_config(target_parameters=["experts.up"]), "adapter_config.json: target_parameters="),
    "unknown": (set_config(new_trick=1), "adapter_config.json: new_trick: unknown key"),
    "r": (set_config(r=0), "adapter_config.json: r: 0 is not a rank"),
    "r_missing": (set_config(r=None), "adapter_config.json: r: None is not a rank"),
    "alpha": (set_config(lora_alpha="8"), "adapter_config.json: lora_alpha: '8' is not a number"),
    "pattern": (set_config(rank_pattern={"q_proj": -1}), "adapter_config.json: rank_pattern.q_proj: -1 is not a rank"),
    "regex": (set_config(target_modules="(q_proj"), r"adapter_config.json: target_modules: '\(q_proj' is not a"),
    "targets": (set_config(target_modules=None), "adapter_config.json: target_modules: None is neither"),
    "flag": (set_config(use_rslora="yes"), "adapter_config.json: use_rslora: 'yes' is neither"),
    "no_json": (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json: not readable as JSON"),
    "no_config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: missing"),
    "no_tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing"),
    "no_directory": (lambda d: shutil.rmtree(d), "no such directory"),
    "pickle": (pickled, "adapter_model.bin: a pickle"),
    "short": (cut_short, "adapter_model.safetensors: .*data_offsets reach beyond the file"),
    "noise": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"abc"), "not readable as safetensors"),
    "pair": (set_tensors(lambda t: t.pop(B_NAME)), f"adapter_model.safetensors: {B_NAME}: missing"),
    "rank_a": (set_tensors(lambda t: t.update({A_NAME: t[A_NAME][:3].clone()})), r"lora_A.weight is \[3, 32\]; by"),
    "rank_b": (set_config(rank_pattern={"q_proj": 2}), r"lora_A.weight is \[4, 32\]; by adapter_config.json its rank"),
    "dtype": (set_tensors(lambda t: t.update({A_NAME: t[A_NAME].double()})), f"{A_NAME} is F64; it must be F32"),
    "vector": (set_tensors(lambda t: t.update({A_NAME: t[A_NAME][0].clone()})), f"{A_NAME} is no matrix"),
    "embedding": (set_tensors(as_embedding), "lora_embedding_A: matrices of an embedding; not supported"),
    "stranger": (set_tensors(lambda t: t.update(x=torch.zeros(1, 1))), "adapter_model.safetensors: x: no matrix"),
    "untargeted": (set_config(target_modules=["k_proj"]), "is not among target_modules"),
    "layers": (set_config(layers_to_transform=[0, 2]), r"model.layers.1.\S+ is not among target_modules and layers"),
    "nan": (with_value(A_NAME, math.nan, torch.float32), f"safetensors: {A_NAME} holds values that are not finite"),
    "inf": (with_value(B_NAME, math.inf, torch.float32), f"safetensors: {B_NAME} holds values that are not finite"),
    "nan16": (with_value(B_NAME, math.nan, torch.float16), f"safetensors: {B_NAME} holds values that are not finite"),
    "-inf16": (with_value(A_NAME, -math.inf, torch.bfloat16), f"safetensors: {A_NAME} holds values that are not"),
    "empty": (set_tensors(lambda t: t.clear()), "adapter_model.safetensors: no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_what_cannot_be_served_is_refused_by_name(adapter: Path, damage: str) -> None:
    change, message = BAD[damage]
    change(adapter)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_numbers_are_finite(adapter: Path, dtype: torch.dtype) -> None:
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).min):
        with_value(A_NAME, value, dtype)(adapter)
        read_adapter(adapter)


def test_a_name_that_is_too_long_is_refused(adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        read_adapter(adapter / ("a" * 5000))


def test_an_adapter_is_a_value(adapter: Path) -> None:
    one, other = read_adapter(adapter), read_adapter(adapter)
    assert isinstance(one, Adapter)
    assert one == other
    with pytest.raises(AttributeError):
        one.digest = b""  # type: ignore[misc]
