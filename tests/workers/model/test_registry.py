"""Which families and formats there are, and what is said of a plugin that brings none."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.processes import python_environment
from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig
from workers.errors import ModelError
from workers.model.arithmetic import Arithmetic
from workers.model.decoder import PreNormDecoder
from workers.model.loader import Checkpoint
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.registry import load_config, load_registry
from workers.model.stage import build_stage
from workers.model.weight_format import Matrices, Split
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import kv_fingerprint

CPU = torch.device("cpu")
WRONG_FAMILIES = r"model\.plugins: a_plugin: FAMILIES must be a tuple of Family, and has a value of type "


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (None, r"model\.plugins: a_plugin cannot be imported \(No module named 'a_plugin'\)"),
        ("1 / 0", r"model\.plugins: a_plugin cannot be imported \(division by zero\)"),
        ("import sys; sys.exit(3)", r"model\.plugins: a_plugin cannot be imported \(it exits\)"),
        ("FAMILIES = 5", WRONG_FAMILIES + "int"),
        ("FAMILIES = {'LlamaForCausalLM': None}", WRONG_FAMILIES + "dict"),
        ("FAMILIES = {5: {}}", WRONG_FAMILIES + "dict"),
        ("FAMILIES = {'FooFor': object()}", WRONG_FAMILIES + "dict"),
        ("FAMILIES = (object(),)", WRONG_FAMILIES + "object"),
        (
            "QUANT_METHODS = [1]",
            r"model\.plugins: a_plugin: QUANT_METHODS must be a tuple of QuantMethod, and has a value of type int",
        ),
        (
            "from workers.model.family import Family\nFAMILIES = (Family('A', 'a', {}, None),)",
            r"model\.plugins: a_plugin: a Family of FAMILIES has a field of another type",
        ),
        ("", r"model\.plugins: a_plugin has neither FAMILIES nor QUANT_METHODS of its own, so it adds nothing"),
        (
            "from workers.model.families.llama import FAMILIES",
            r"model\.plugins: a_plugin has neither FAMILIES nor QUANT_METHODS of its own, so it adds nothing",
        ),
        (
            "from dataclasses import replace\nfrom workers.model.families import llama\n"
            "FAMILIES = (replace(llama.FAMILIES[0], model_type='other'),)",
            r"model\.plugins: architecture LlamaForCausalLM is in both workers\.model\.families\.llama and a_plugin",
        ),
    ],
)
def test_a_plugin_that_brings_nothing_is_one_line(
    source: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_plugin", raising=False)
    if source is not None:
        (tmp_path / "a_plugin.py").write_text(source)
    with pytest.raises(ModelError, match=f"^{complaint}$"):
        load_registry(["a_plugin"])


@pytest.mark.parametrize(
    ("read", "complaint"),
    [
        ("1 / 0", r"model\.plugins: reading .*config\.json as A: division by zero"),
        ("exit(3)", r"model\.plugins: reading .*config\.json as A: 3"),
        ("7", r"model\.plugins: A: read gives a ModelConfig, not int"),
    ],
)
def test_a_family_that_cannot_read_is_one_line(
    read: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_plugin", raising=False)
    family = f"Family('A', 'a', {{'architectures': understood('x')}}, lambda fields: {read})"
    imports = "from checkpoint.keys import understood\nfrom workers.model.family import Family"
    (tmp_path / "a_plugin.py").write_text(f"{imports}\nFAMILIES = ({family},)")
    (tmp_path / "config.json").write_text('{"architectures": ["A"]}')
    with pytest.raises(ModelError, match=f"^{complaint}$"):
        load_config(tmp_path, plugins=["a_plugin"])


def test_plugins_add_to_what_is_built_in() -> None:
    plugins = ["tests.plugins.windowed_llama", "tests.plugins.int8_rows"]
    for named in (plugins, plugins * 2):  # naming one twice changes nothing
        registry = load_registry(named)
        assert set(registry.families) == {*load_registry().families, "WindowedLlamaForCausalLM"}
        assert set(registry.quant_methods) == {*load_registry().quant_methods, "int8_rows"}


def test_a_model_is_read_and_checked_without_torch(tmp_path: Path) -> None:
    directory = make_checkpoint("qwen3_experts", tmp_path)
    code = f"""
import sys
from pathlib import Path
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint, check_split
from workers.model.identity import weights_identity
model = load_config({str(directory)!r}, (), ("tests.plugins.windowed_llama", "tests.plugins.int8_rows"))
check_split(model, 2, 1)
check_checkpoint(Path({str(directory)!r}), model)
weights_identity(Path({str(directory)!r}), model, "torch")
print(sorted(sys.modules.keys() & {{"torch", "triton", "kernels"}}))
"""
    environment = {**python_environment(), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_field_of_a_family_names_other_kv_blocks(tmp_path: Path) -> None:
    model = load_config(make_checkpoint("gqa", tmp_path))
    assert isinstance(model.decoder, PreNormDecoder)
    layer = model.decoder.layers[0]
    others = [
        replace(layer, attention=replace(layer.attention, **change))
        for change in ({"window": 9}, {"has_sinks": True}, {"soft_cap": 2.0}, {"has_qk_norm": True}, {"scale": 0.5})
    ]
    decoders = [PreNormDecoder((changed, *model.decoder.layers[1:])) for changed in (layer, *others)]
    models = [replace(model, decoder=decoder) for decoder in decoders]
    names = {kv_fingerprint(EngineConfig("dir"), changed, torch.float32, "weights") for changed in models}
    assert len(names) == 1 + len(others)


class Tensors:
    """Weights in memory."""

    dtype = torch.float32

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def read(
        self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), as_stored: bool = False
    ) -> torch.Tensor:
        assert self._tensors[name].shape == shape
        return self._tensors[name][part]


@pytest.mark.parametrize("split", Split)
def test_one_tensor_may_hold_several_matrices(split: Split) -> None:
    """As Phi 3's qkv_proj: the ranks' shares are those of the matrices apart."""
    q, k = torch.randn(8, 6), torch.randn(4, 6)
    apart, stacked = Matrices(("q", "k"), (8, 4), 6, split), Matrices(("qk",), (8, 4), 6, split)
    assert (apart.tensors(), stacked.tensors()) == ([("q", 8), ("k", 4)], [("qk", 12)])
    weights = Tensors(**{"q.weight": q, "k.weight": k, "qk.weight": torch.cat((q, k))})
    for tp_rank in range(2):
        arithmetic = Arithmetic(ParallelGroups(Shard(tp=2, tp_rank=tp_rank), CPU))
        one, other = (PLAIN_FORMAT.linear(m, weights, arithmetic, None) for m in (apart, stacked))
        x = torch.randn(5, 3 if split is Split.INPUTS else 6)
        assert torch.equal(one(x), other(x))
        assert one.output_sizes == other.output_sizes == ([4, 2] if split is Split.OUTPUTS else [8, 4])


def test_layers_that_turn_alike_share_a_table(tmp_path: Path) -> None:
    directory = make_checkpoint("gqa", tmp_path)
    stage = build_stage(load_config(directory), Checkpoint(directory, torch.float32, CPU), ParallelGroups(Shard(), CPU))
    assert len({layer.self_attention._cos_sin.data_ptr() for layer in stage.layers}) == 1
