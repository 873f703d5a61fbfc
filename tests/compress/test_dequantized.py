"""A plain checkpoint of a compressed one: the same model, number by number, and one that can be compressed again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.dequantized import dequantize_model
from compress.errors import CompressError
from compress.job import compress_model, open_model
from compress.request import Request, recipe_for
from tests.compress.models import make_blocks, make_model
from tests.workers.engine_group import EngineGroup
from tests.workers.runtime.test_batch_invariance import GREEDY
from workers.config import EngineConfig, resolve_model

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"  # has the tokenizer that a GGUF needs


def compressed(kind: str, request: Request, folder: Path, name: str) -> Path:
    """A model by a method, as a directory that is served."""
    model = open_model(DEMO if kind == "demo" else make_model(kind, folder))
    compress_model(model, recipe_for(request), make_blocks(), folder / name, lambda done: None)
    return resolve_model(str(folder / name))


@pytest.mark.parametrize(
    ("kind", "request_", "name"),
    [
        ("llama64", Request("rtn", "w4a16", 32), "out"),
        ("demo", Request("rtn", "Q4_0", file_format="gguf"), "out.gguf"),
        ("qwen3_experts", Request("rtn", "w8a16", 32), "out"),
        ("llama64", Request("low-rank", "low-rank:70"), "out"),
    ],
    ids=["w4a16", "gguf", "experts", "low-rank"],
)
def test_the_numbers_are_those_that_are_served(kind: str, request_: Request, name: str, tmp_path: Path) -> None:
    directory, done = compressed(kind, request_, tmp_path, name), list[int]()
    num_bytes = dequantize_model(directory, tmp_path / "plain", torch.float32, done.append)
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert num_bytes == sum(file.stat().st_size for file in files)
    assert done == list(range(1, done[-1] + 1))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float32}
    with EngineGroup(1, 1) as alone:
        found, wanted = (
            alone.run(EngineConfig(str(path), "float32", "cpu", num_blocks=64), [[5, 9, 40, 2]], GREEDY).logits[0][0]
            for path in (tmp_path / "plain", directory)
        )
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_what_was_made_plain_can_be_compressed_again(tmp_path: Path) -> None:
    directory = compressed("llama64", Request("rtn", "w4a16", 32), tmp_path, "first")
    with pytest.raises(CompressError, match=r"compressed already; --method dequantize makes a plain one$"):
        open_model(directory)
    dequantize_model(directory, tmp_path / "plain", torch.bfloat16, lambda done: None)
    recipe = recipe_for(Request("rtn", "w8a16", 32))
    report = compress_model(open_model(tmp_path / "plain"), recipe, make_blocks(), tmp_path / "out", lambda done: None)
    assert report.loss is not None
    assert 0 < report.loss.kl_nats < 1e-3


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    directory = make_model("llama64", tmp_path)
    with pytest.raises(CompressError, match=r"is there already$"):
        dequantize_model(directory, directory, torch.float32, lambda done: None)
