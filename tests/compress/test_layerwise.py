"""Whole compressions of small models: what the files mean, that a cut-off run goes on, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.calibration.blocks import TokenBlocks
from compress.errors import CompressError
from compress.job import compress_model, open_model
from compress.recipe import Recipe
from compress.report import Report
from compress.request import METHOD_NAMES, Request, TokenRequest, blocks_for, recipe_for
from compress.schemes import scheme_labelled
from compress.stored import StoredModel
from tests.compress.models import VOCAB, make_blocks, make_model
from workers.model.tensor_layout import tensor_layout

KINDS = ["llama", "qwen3", "mha", "qwen3_experts"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda kind: folder / kind if (folder / kind).exists() else make_model(kind, folder)


def compress(path: Path, out: Path, request: Request, blocks: TokenBlocks | None = None) -> Report:
    recipe = recipe_for(request)
    return compress_model(open_model(path), recipe, blocks or make_blocks(), out, lambda done: None)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def dense(path: Path, folder: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The compressed checkpoint as plain numbers."""
    tensors, all_matrices = tensors_of(folder), tensor_layout(open_model(path).config).matrices
    stored, dense = StoredModel(recipe, all_matrices), {}
    for matrices in all_matrices:
        for name, outputs in matrices.tensors():
            dense[name + ".weight"] = stored.dense(tensors, name, outputs, matrices.inputs)
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name + ".")}
    return {**tensors, **dense}


def nats_by_transformers(path: Path, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Fused experts are transformers' own business: it reads a checkpoint with these tensors."""
    from safetensors.torch import save_file

    plain = path.with_name(path.name + "-dense")
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text((path / "config.json").read_text())
    save_file(
        {name: t.float().contiguous() for name, t in tensors.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "sparsegpt"])
def test_the_reported_loss_is_that_of_the_files(
    models: Callable[[str], Path], tmp_path: Path, kind: str, method: str
) -> None:
    request, blocks = Request(method, group_size=32), make_blocks()
    report = compress(models(kind), tmp_path / "out", request)
    assert report.loss is not None
    found = nats_by_transformers(
        models(kind), dense(models(kind), tmp_path / "out", recipe_for(request)), blocks.held_out
    )
    assert found == pytest.approx(report.loss.plain_nats + report.loss.added_nats, abs=2e-4)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["loss"]["added_nats"] == report.loss.added_nats
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_smoothing_alone_changes_no_answer(
    models: Callable[[str], Path], tmp_path: Path, kind: str, method: str
) -> None:
    """In 8 bits with groups, so that what smoothing moves is all that could go wrong."""
    scheme = "w8a16" if method == "awq" else "w8a8"
    report = compress(models(kind), tmp_path / "out", Request(method, scheme, group_size=32))
    assert report.loss is not None
    assert abs(report.loss.added_nats) < 0.01
    assert report.loss.kl_nats < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_below_rounding_on_each_matrix_of_the_first_layer_and_in_sum(
    models: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Only first layers see the same inputs. Errors are those of outputs for both: fp8-static asks for inputs."""
    blocks = make_blocks(32)
    rtn, made = (
        compress(models(kind), tmp_path / method, Request(method, "w4a16", 32, has_kv_scales=True), blocks).errors
        for method in ("rtn", "gptq")
    )
    first = [name for name in made if ".layers.0." in name]
    assert all(made[name] < rtn[name] for name in first)
    assert sum(made.values()) < 0.8 * sum(rtn.values())


def test_kv_scales_cover_what_calibration_saw(models: Callable[[str], Path], tmp_path: Path) -> None:
    report = compress(models("llama"), tmp_path / "out", Request("kv"))
    tensors = tensors_of(tmp_path / "out")
    for index in range(3):
        assert 0 < float(tensors[f"model.layers.{index}.self_attn.k_scale"]) < 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    assert report.loss is not None
    assert report.loss.kl_nats > 0


def test_what_is_kept_stays_as_it_is(models: Callable[[str], Path], tmp_path: Path) -> None:
    compress(models("llama"), tmp_path / "out", Request("rtn", group_size=32, kept=("down_proj", r"layers\.0\.")))
    before, after = load_file(models("llama") / "model.safetensors"), tensors_of(tmp_path / "out")
    same = [name for name in before if "down_proj" in name or "layers.0." in name or "norm" in name or "embed" in name]
    assert len(same) > 10
    assert all(torch.equal(before[name], after[name]) for name in same)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.2.mlp.down_proj" in ignored
    assert "model.layers.0.self_attn.q_proj" in ignored
    assert "model.layers.1.self_attn.q_proj" not in ignored


# ---- going on


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "request_", [Request("gptq", group_size=32), Request("awq", group_size=32, has_kv_scales=True)]
)
def test_a_run_that_was_cut_off_gives_the_same_bytes(
    models: Callable[[str], Path], tmp_path: Path, request_: Request
) -> None:
    compress(models("llama"), tmp_path / "whole", request_)

    def stop_after_two(done: int) -> None:
        if done == 2:
            raise Stop

    recipe = recipe_for(request_)
    with pytest.raises(Stop):
        compress_model(open_model(models("llama")), recipe, make_blocks(), tmp_path / "cut", stop_after_two)
    assert not (tmp_path / "cut").exists()
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut.partial").glob("*.safetensors")}
    assert len(made) == 3
    compress(models("llama"), tmp_path / "cut", request_)
    cut, whole = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert cut.keys() == whole.keys()
    assert [name for name in cut if cut[name] != whole[name]] == []
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in made.items())


def start(*arguments: object) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "deploy.cli", "quantize", *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def command(*arguments: object, prefix: str = "") -> subprocess.CompletedProcess[str]:
    line = " ".join([sys.executable, "-m", "deploy.cli", "quantize", *map(str, arguments)])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.run(["bash", "-c", prefix + line], capture_output=True, text=True, env=environment, timeout=200)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    blocks, path = make_blocks(), tmp_path / "ids.json"
    path.write_text(json.dumps(torch.cat([blocks.calibration, blocks.held_out]).tolist()))
    return path


def test_a_run_that_was_killed_gives_the_same_bytes(
    models: Callable[[str], Path], tmp_path: Path, token_file: Path
) -> None:
    blocks = blocks_for(open_model(models("llama")), TokenRequest(str(token_file), "", 40))
    compress(models("llama"), tmp_path / "whole", Request("gptq", group_size=32), blocks)
    partial = tmp_path / "cut.partial"
    arguments = ["--group-size", 32, "--block-tokens", 40, "--calibration", token_file]
    with start(models("llama"), "--out", tmp_path / "cut", *arguments) as process:
        while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 2:
            time.sleep(0.002)
        process.kill()
    assert partial.exists()
    compress(models("llama"), tmp_path / "cut", Request("gptq", group_size=32), blocks)
    cut, whole = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert cut.keys() == whole.keys()
    assert [name for name in cut if cut[name] != whole[name]] == []


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    models: Callable[[str], Path], tmp_path: Path, token_file: Path
) -> None:
    arguments = (models("llama"), "--out", tmp_path / "out", "--group-size", 32, "--block-tokens", 40)
    arguments = (*arguments, "--calibration", token_file)
    failed = command(*arguments, prefix="ulimit -f 15; ")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("switchyard: ")
    assert "the same command goes on" in last
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.unfinished"))
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "nats a token" in done.stdout
    assert command(*arguments).stderr.strip().endswith(f"{tmp_path / 'out'}: is there already")


def test_a_partial_folder_of_other_options_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise Stop

    recipe = recipe_for(Request("rtn", group_size=32))
    with pytest.raises(Stop):
        compress_model(open_model(models("llama")), recipe, make_blocks(), tmp_path / "out", stop)
    with pytest.raises(CompressError, match=r"out\.partial: was begun with other options"):
        compress(models("llama"), tmp_path / "out", Request("rtn", group_size=64))


# ---- bad input


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("nonsense"), "--method 'nonsense' is not known (known: rtn, "),
        (Request("rtn", "w5a5"), "scheme 'w5a5' is not known (known: w4a16, "),
        (Request("rtn", group_size=48), "group_size must be 32, 64, 128, 256, or 0 for whole rows, not 48"),
        (Request("rtn", group_size=128), "model.layers.0.self_attn.q_proj: groups of 128 do not divide its 64 inputs"),
        (
            Request("low-rank", "low-rank:120"),
            "scheme low-rank:120: behind the colon stands a share from 1 to 99 percent",
        ),
        (Request("rtn", "w4a16:x"), "scheme 'w4a16:x': behind the colon stands a group size"),
        (Request("rtn", kept=("(",)), "--keep '(': not a regular expression"),
        (Request("rtn", "plain"), "--method rtn with --scheme plain changes nothing"),
        (Request("wanda", sparsity="4:2"), "sparsity '4:2' is neither like 2:4 nor a share"),
        (Request("wanda", sparsity="3:5"), "a pattern of 3:5 does not divide its 64 inputs"),
        (Request("rtn", "nf4", file_format="awq"), "--format awq stores no nf4"),
        (Request("rtn", "w8a8", group_size=32, file_format="gptq"), "--format gptq stores no w8a8"),
        (Request("rtn", group_size=32, file_format="zip"), "--format 'zip' is not known (known: compressed-tensors, "),
        (Request("gptq", group_size=32, has_kv_scales=True, file_format="gptq"), "stores one scheme, and no KV scales"),
    ],
)
def test_what_cannot_be_done_is_named_in_one_line(
    models: Callable[[str], Path], tmp_path: Path, request_: Request, message: str
) -> None:
    with pytest.raises(CompressError) as caught:
        compress(models("llama"), tmp_path / "out", request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_is_named(models: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((models("llama") / "config.json").read_text())
    tensors = load_file(models("llama") / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CompressError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(broken)


@pytest.mark.parametrize("device", ["abacus", "cuda:77"])
def test_a_device_that_is_not_there_is_named(models: Callable[[str], Path], device: str) -> None:
    with pytest.raises(CompressError, match=f"--device '{device}': "):
        open_model(models("llama"), device)


def test_a_compressed_model_is_not_compressed_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    compress(models("llama"), tmp_path / "out", Request("rtn", group_size=32))
    with pytest.raises(CompressError, match="quantization_config"):
        open_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("[1, 2, 3]", "ids.json", "3 tokens are less than one block of 40"),
        ("[1, 2, 300000]", "ids.json", f"token ids outside of 0 .. {VOCAB - 1}"),
        ("[1.5]", "ids.json", "not a list of token ids"),
        ("{", "ids.json", "not a list of token ids"),
        ("some text", "some.txt", "tokenizer.json: missing; a text needs it"),
        (None, "none.txt", "none.txt: No such file"),
    ],
)
def test_a_bad_calibration_file_is_named(
    models: Callable[[str], Path], tmp_path: Path, content: str | None, name: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CompressError, match=message):
        blocks_for(open_model(models("llama")), TokenRequest(str(tmp_path / name), "", 40))


def test_calibration_by_own_samples_is_repeatable(models: Callable[[str], Path]) -> None:
    model, request = open_model(models("qwen3_experts")), TokenRequest("self", "", 24, num_blocks=5, seed=7)
    first, second = (blocks_for(model, request) for _ in range(2))
    assert torch.equal(first.calibration, second.calibration)
    assert len(first.calibration) == 4
    assert len(first.held_out) == 1
    assert first.calibration.unique().numel() > 20


def test_all_methods_have_a_default_scheme() -> None:
    for method in METHOD_NAMES:
        scheme = recipe_for(Request(method)).scheme
        assert scheme.block_type or scheme == scheme_labelled(scheme.label)


def test_a_plan_is_printed_without_weights(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "config.json").write_text((models("qwen3_experts") / "config.json").read_text())
    found = command(f"'{folder}'", "--plan", "--json", "--group-size", 32)
    rows = {row["scheme"]: row for row in json.loads(found.stdout)}
    assert rows["w4a16:32"]["bits_per_weight"] == 4.5
    assert rows["w4a16:32"]["step_bytes"] < rows["plain"]["step_bytes"]
    assert rows["w4a16:32"]["weight_bytes"] < rows["plain"]["weight_bytes"]
    assert rows["w4a16:32"]["tokens_per_s"] > rows["plain"]["tokens_per_s"]
    refused = command(f"'{folder}'", "--plan", "--gpu", "z80")
    assert refused.returncode == 2
    assert "--gpu 'z80' is not known (known: a10, " in refused.stderr
