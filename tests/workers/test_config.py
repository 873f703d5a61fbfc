"""What a model directory must be, and what is said when it is not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.tensors import weights_digest
from kvstore.config import KVStoreConfig
from settings.loading import load, write
from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig, WorkerSpec, resolve_model
from workers.errors import ModelError
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.model.tensor_layout import check_split
from workers.parallel import ParallelGroups, Shard, stage_layers
from workers.runtime.runner import TorchModelRunner

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path) -> Path:
    return make_checkpoint("gqa", tmp_path)


def edit(directory: Path, **changes) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def load_runner(directory: Path) -> TorchModelRunner:
    config = EngineConfig(str(directory), num_blocks=4, device="cpu")
    return TorchModelRunner(config, load_config(directory), ParallelGroups(Shard(), CPU), CPU)


def test_async_scheduling_needs_one_rank_or_one_stage():
    assert EngineConfig("dir", tp=2, async_scheduling=True).async_scheduling
    assert EngineConfig("dir", pp=2, async_scheduling=True).async_scheduling
    with pytest.raises(ValueError, match="async_scheduling: needs tp=1 or pp=1"):
        EngineConfig("dir", tp=2, pp=2, async_scheduling=True)


def test_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        load_config(tmp_path)


def test_no_directory():
    with pytest.raises(ModelError, match="no such model directory"):
        resolve_model("./does/not/exist")


@pytest.mark.parametrize("path", ["/" + "m" * 5000, "~no-such-user/m"])
def test_a_path_that_cannot_be_one_names_the_key(path):
    with pytest.raises(ModelError, match=r"^model\.path: '.{1,100}': "):
        resolve_model(path)


def test_a_config_that_is_nested_too_deep(directory):
    (directory / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
        load_config(directory)


def test_unsupported_architecture_names_what_is_supported(directory):
    with pytest.raises(ModelError, match=r"architecture GPT2LMHeadModel is not supported.*LlamaForCausalLM"):
        load_config(edit(directory, architectures=["GPT2LMHeadModel"]))


@pytest.mark.parametrize("value", [None, "32", 0, -4, True, 1.5])
def test_bad_size_names_the_field(directory, value):
    with pytest.raises(ModelError, match="hidden_size must be a positive integer"):
        load_config(edit(directory, hidden_size=value))


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
def test_absurd_sizes_are_refused_before_anything_is_built(directory, name):
    with pytest.raises(ModelError, match=rf"config\.json: {name} must be at most \d+, not 1000000000000$"):
        load_config(edit(directory, **{name: 10**12}))


def test_a_number_that_is_no_float_names_the_field(directory):
    with pytest.raises(ModelError, match="rms_norm_eps must be a positive number"):
        load_config(edit(directory, rms_norm_eps=10**400))


def test_absurdly_many_tensors_are_refused(directory, monkeypatch):
    monkeypatch.setattr("workers.model.tensor_layout._MOST_TENSORS", 10)
    with pytest.raises(ModelError, match=r"config\.json: num_hidden_layers=\d: the first 1 have more than 10 tensors"):
        check_split(load_config(directory), 1, 1)


def test_unsupported_rope_scaling(directory):
    with pytest.raises(ModelError, match="rope scaling 'yarn' is not supported"):
        load_config(edit(directory, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}))


def test_config_that_is_not_json(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable as JSON"):
        load_config(directory)


def test_truncated_safetensors(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not readable as safetensors"):
        load_runner(directory)


def test_missing_weights(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        load_runner(directory)


def test_wrong_shape_names_the_tensor(directory):
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is \[97, 32\], config\.json says \[96, 32\]"):
        load_runner(edit(directory, vocab_size=96))


def test_sharded_checkpoint_reads_like_a_single_one(directory, tmp_path):
    sharded = make_checkpoint("gqa", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, many = (Checkpoint(d, torch.float32, CPU) for d in (directory, sharded))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(one.read(name, (97, 32)), many.read(name, (97, 32)))
    (next(iter(sharded.glob("*-of-*.safetensors")))).unlink()
    with pytest.raises(ModelError, match=r"safetensors: missing"):
        Checkpoint(sharded, torch.float32, CPU)


def test_digest_tells_checkpoints_apart(directory):
    before = weights_digest(directory)
    save_file({"x": torch.zeros(3)}, directory / "model.safetensors")
    assert weights_digest(directory) != before


@pytest.mark.parametrize(("tp", "field"), [(3, "num_attention_heads"), (4, "num_key_value_heads")])
def test_tp_must_divide_the_heads(directory, tp, field):
    with pytest.raises(ModelError, match=f"tp={tp} does not divide {field}"):
        check_split(load_config(directory), tp, 1)


def test_pp_must_not_exceed_the_layers(directory):
    with pytest.raises(ModelError, match="pp=4"):
        check_split(load_config(directory), 1, 4)


@pytest.mark.parametrize(("layers", "pp"), [(6, 1), (6, 4), (3, 2), (32, 5)])
def test_stages_cover_all_layers_once_and_evenly(layers, pp):
    stages = [stage_layers(layers, pp, s) for s in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_spec_survives_json(tmp_path):
    engine = EngineConfig("dir", tp=2, plugins=("a", "b"))
    spec = WorkerSpec("w", "pool", "decode", engine, kvstore=KVStoreConfig(tier="redis://x"), tier_secret="s")
    write(tmp_path / "spec.json", spec)
    assert (tmp_path / "spec.json").stat().st_mode & 0o777 == 0o600
    assert load(WorkerSpec, tmp_path / "spec.json") == spec


def test_engine_config_refuses_nonsense():
    with pytest.raises(ValueError, match=r"^tp: must be at least 1, not 0"):
        EngineConfig("dir", tp=0)
    with pytest.raises(ValueError, match=r"^dtype: must be one of"):
        EngineConfig("dir", dtype="int3")
