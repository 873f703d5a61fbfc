"""A quantized checkpoint that is wrong somewhere: one line that names the tensor or the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quant.served import CPU, FIXTURES
from workers.errors import ModelError
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.model.stage import build_stage
from workers.model.tensor_layout import check_checkpoint
from workers.parallel import ParallelGroups, Shard

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def start(directory: Path) -> None:
    """What a rank does before it serves."""
    model = load_config(directory)
    check_checkpoint(directory, model)
    build_stage(model, Checkpoint(directory, torch.float32, CPU), ParallelGroups(Shard(), CPU))


def with_config(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(quantization: dict[str, Any]) -> None:
        place = quantization
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


GROUP = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("ct-w4a16-g32", with_config("format", value="marlin-24"), None),  # the group has its own
        (
            "ct-w4a16-g32",
            with_config("config_groups", "group_0", "format", value="marlin-24"),
            r"group_0\.weights: 4 bits of type int in format 'marlin-24' are not served",
        ),
        ("ct-w4a16-g32", with_config(*GROUP, "num_bits", value=5), "5 bits of type int in format 'pack-quantized'"),
        ("ct-w4a16-g32", with_config(*GROUP, "group_size", value=48), "groups of 48 do not divide its 128 inputs"),
        ("ct-w4a16-g32", with_config(*GROUP, "group_size", value=12), "group_size=12 is not served"),
        ("ct-w4a16-g32", with_config(*GROUP, "group_size", value=64), r"weight_scale is \[128, 4\], config\.json says"),
        ("ct-w4a16-g32", with_config(*GROUP, "new_option", value=1), r"weights\.new_option: unknown key"),
        ("ct-w4a16-g32", with_config("transform_config", value={"a": 1}), "transform_config is not served"),
        ("ct-w4a16-g32", with_config("ignore", value=["re:("]), "is not a regular expression"),
        ("ct-w4a16-g32", with_config("config_groups", value=[]), r"config_groups must be an object, not \[\]"),
        ("ct-w8a8", with_config("config_groups", "group_0", "input_activations", "num_bits", value=4), "num_bits=4"),
        ("ct-fp8-block", with_config(*GROUP, "block_structure", value=[64, 64]), r"block_structure=\[64, 64\]"),
        ("gptq-v1", with_config("bits", value=5), "bits=5 is not served"),
        ("gptq-v1", with_config("bits", value="4"), "bits='4' is not served"),
        ("gptq-v1", with_config("group_size", value=0), "group_size=0 is not served"),
        ("gptq-v1", with_config("checkpoint_format", value="marlin"), "checkpoint_format='marlin' is not served"),
        ("gptq-dynamic", with_config("dynamic", value={"+:(": {"bits": 8}}), "is not a regular expression"),
        ("awq-gemm", with_config("version", value="gemv"), "version='gemv' is not served"),
        ("awq-gemm", with_config("bits", value=3), "bits=3 is not served"),
        ("fp8-deepseek", with_config("weight_block_size", value=[64, 128]), r"weight_block_size=\[64, 128\]"),
        ("fp8-deepseek", with_config("fmt", value="e5m2"), "fmt='e5m2' is not served"),
        ("modelopt-fp8", with_config("quant_algo", value="NVFP4_AWQ"), "quant_algo='NVFP4_AWQ' is not served"),
        ("bnb-nf4", with_config("bnb_4bit_quant_type", value="nf3"), "bnb_4bit_quant_type='nf3' is not served"),
        ("bnb-nf4", with_config("load_in_4bit", value=False), "neither load_in_4bit nor load_in_8bit"),
        ("bnb-int8", with_config("llm_int8_threshold", value=-1), "llm_int8_threshold must be a number, not -1"),
    ],
)
def test_what_is_said_of_the_weights(
    name: str, change: Callable[[dict[str, Any]], None], complaint: str | None, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
    if complaint is None:
        start(directory)
        return
    with pytest.raises(ModelError, match=complaint) as refused:
        start(directory)
    assert "\n" not in str(refused.value)
    assert str(directory) in str(refused.value) or "model.layers." in str(refused.value)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("ct-w4a16-g32", drop(Q + ".weight_packed"), f"no tensor {Q}.weight_packed"),
        ("ct-w4a16-g32", drop(Q + ".weight_scale"), f"no tensor {Q}.weight_scale"),
        ("ct-w4a16-g32", replaced(Q + ".weight_packed", lambda t: t[:-1]), f"{Q}.weight_packed is .127, 16."),
        ("ct-w4a16-g32", replaced(Q + ".weight_packed", lambda t: t.float()), f"{Q}.weight_packed is F32"),
        ("ct-w4a16-g32", replaced(Q + ".weight_shape", lambda t: t + 1), f"{Q}.weight_shape is .129, 129."),
        ("ct-w4a16-g32", replaced(Q + ".weight_scale", lambda t: t * float("nan")), f"{Q}.weight_scale holds values"),
        ("ct-w4a16-asym", drop(DOWN + ".weight_zero_point"), f"no tensor {DOWN}.weight_zero_point"),
        ("ct-w4a16-actorder", replaced(Q + ".weight_g_idx", lambda t: t + 2), f"{Q}: an input is of group 5"),
        ("ct-w4a8", replaced(Q + ".weight", lambda t: t * 0 + 100), f"{Q}.weight holds integers of more than 4 bits"),
        (
            "ct-fp8-static",
            replaced(Q + ".input_scale", lambda t: -t),
            f"{Q}.input_scale is -.*, and a scale is above",
        ),
        ("ct-fp8-static", drop(Q + ".input_scale"), f"no tensor {Q}.input_scale"),
        ("ct-fp8-block", replaced(Q + ".weight_scale", lambda t: t.repeat(2, 1)), f"{Q}.weight_scale is .2, 1."),
        ("ct-mxfp4", replaced(Q + ".weight_scale", lambda t: t * 0 + 255), "a scale of 4-bit floats is not a number"),
        ("gptq-actorder", drop(Q + ".g_idx"), f"no tensor {Q}.g_idx"),
        ("gptq-actorder", replaced(Q + ".g_idx", lambda t: t - 1), f"{Q}: an input is of group"),
        ("gptq-v1", replaced(Q + ".qzeros", lambda t: t[:, :-1]), f"{Q}.qzeros is .4, 15."),
        ("awq-gemm", replaced(Q + ".scales", lambda t: t[:-1]), f"{Q}.scales is .3, 128."),
        ("bnb-nf4", replaced(Q + ".weight.absmax", lambda t: t[:-1]), f"{Q}.weight.absmax is .255."),
        (
            "bnb-nf4",
            replaced(Q + ".weight.quant_state.bitsandbytes__nf4", lambda t: t[:-3]),
            "quant_state.bitsandbytes__nf4 is not a JSON text",
        ),
        ("fp8-deepseek", drop(Q + ".weight_scale_inv"), f"no tensor {Q}.weight_scale_inv"),
    ],
)
def test_what_the_tensors_are(name: str, change: Callable[[Tensors], None], complaint: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=complaint) as refused:
        start(directory)
    assert "\n" not in str(refused.value)


def test_older_files_call_it_compression_config(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "ct-w4a16-g32", tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    expected = load_config(directory).weight_format
    config["compression_config"] = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    assert load_config(directory).weight_format == expected


def test_an_older_modelopt_has_a_file_of_its_own(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "modelopt-fp8", tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    expected = load_config(directory).weight_format
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    assert load_config(directory).weight_format == expected
    start(directory)
