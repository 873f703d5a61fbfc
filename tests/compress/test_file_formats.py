"""File formats: what is written is read back by the engine's readers as the numbers that the methods meant, and whole
models are served with the loss that was reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.formats.compressed_tensors import e2m1_codes
from compress.formats.words import pack_halves, pack_words
from compress.grids.floating import E2M1, round_e2m1
from compress.grids.grid import nearest
from compress.job import compress_model, open_model
from compress.methods.gptq import GptqOptions, gptq
from compress.methods.nearest import round_to_nearest
from compress.recipe import Recipe
from compress.request import Request, recipe_for
from compress.schemes import SCHEME_NAMES, scheme_named
from compress.stored import StoredModel
from tests.compress.models import make_blocks, make_model
from tests.quant.served import last_logits
from workers.model.quant.words import nibbles, unpack
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint
from workers.model.weight_format import Matrices

NAME = "model.layers.0.mlp.down_proj"
MINE = {"nf4": "bitsandbytes", "llm-int8": "bitsandbytes"}
STORED = [
    (name, MINE.get(name, "compressed-tensors"), 32) for name in SCHEME_NAMES if name not in ("plain", "low-rank")
]
STORED += [(name, form, group) for form in ("gptq", "awq") for name in ("w4a16", "w4a16-asym") for group in (32, 0)]
STORED += [("w8a16", "gptq", 64), ("w4a16", "compressed-tensors", 0), ("w4a16-asym", "compressed-tensors", 0)]


def draw(outputs: int, inputs: int) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs + inputs)) * 0.05
    weight[:8] += 0.2  # whose zero points lie at an end
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "file_format", "group_size"), STORED)
def test_what_is_stored_is_what_was_meant(name: str, file_format: str, group_size: int, dtype: torch.dtype) -> None:
    scheme, weight = scheme_named(name, group_size), draw(136, 192)
    stored = StoredModel(Recipe(scheme, file_format=file_format), [Matrices((NAME,), (136,), 192)])
    assert scheme.grid is not None
    rounded = round_to_nearest(weight, scheme.grid, weight.abs().max(), stored.scale_dtype(dtype))
    input_scale = torch.tensor(0.1) if scheme.needs_calibration else None
    parts = stored.encode(rounded, dtype, input_scale)
    found = stored.dense({f"{NAME}.{part}": tensor for part, tensor in parts.items()}, NAME, 136, 192)
    torch.testing.assert_close(found, rounded.values, rtol=2e-6, atol=1e-8)
    assert (found - weight).norm() / weight.norm() < (0.17 if scheme.grid.bits == 4 else 0.04)


@pytest.mark.parametrize("file_format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16"])
def test_permuted_groups_are_stored_with_their_columns(name: str, file_format: str) -> None:
    scheme, weight = scheme_named(name, 32), draw(64, 128)
    recipe = Recipe(scheme, "gptq", GptqOptions("permuted"), file_format=file_format)
    stored = StoredModel(recipe, [Matrices((NAME,), (64,), 128)])
    inputs = torch.randn(400, 128) * torch.rand(128)
    assert scheme.grid is not None
    hessian, dtype = inputs.T @ inputs / 400, stored.scale_dtype(torch.bfloat16)
    rounded = gptq(weight, hessian, scheme.grid, weight.abs().max(), dtype, recipe.gptq)
    parts = stored.encode(rounded, torch.bfloat16, None)
    g_idx = parts["g_idx" if file_format == "gptq" else "weight_g_idx"]
    assert g_idx.bincount().tolist() == [32] * 4
    found = stored.dense({f"{NAME}.{part}": tensor for part, tensor in parts.items()}, NAME, 64, 128)
    torch.testing.assert_close(found, rounded.values, rtol=2e-6, atol=1e-8)


def test_words_hold_the_first_column_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]])
    words = pack_words(codes, 4)
    assert words.tolist() == [[0xF7654321 - (1 << 32), 9]]
    assert torch.equal(unpack(words, 4)[:, :9].long(), codes)
    assert pack_words(torch.tensor([[1, 2, 3, 255]]), 8).tolist() == [[0xFF030201 - (1 << 32)]]


@pytest.mark.parametrize("is_high", [False, True])
def test_bytes_hold_two_columns(is_high: bool) -> None:
    codes = torch.tensor([[1, 2, 3, 15]])
    packed = pack_halves(codes, is_high)
    assert packed.tolist() == ([[0x12, 0x3F]] if is_high else [[0x21, 0xF3]])
    assert torch.equal(nibbles(packed, is_high).long(), codes)


def test_4_bit_floats_round_to_the_nearest_and_ties_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.75, -5.0])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1, -4]
    assert e2m1_codes(torch.tensor([*E2M1, *(-value for value in E2M1)])).tolist() == list(range(16))


@pytest.mark.parametrize("name", ["mxfp4", "w4a16", "w4a16-asym"])
def test_searched_scales_have_less_error(name: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(9)) ** 3
    errors = []
    for searches in (True, False):
        grid = scheme_named(name, 64, searches).grid
        assert grid is not None
        if name == "mxfp4" and not searches:
            grid = type(grid)(searches_exponent=False)  # type: ignore[call-arg]
        scales = grid.fit(weight, weight.abs().max(), torch.float32)
        errors.append(float((nearest(grid, weight, scales) - weight).abs().pow(2.4).sum()))
    assert errors[0] < errors[1]


SERVED = [
    ("rtn", "w4a16", ""), ("rtn", "w4a16-asym", ""), ("gptq", "w4a16", ""), ("gptq", "w4a16", "gptq"),
    ("gptq", "w4a16-asym", "gptq"), ("awq", "w4a16-asym", "awq"), ("smoothquant", "w8a8", ""), ("rtn", "w4a8", ""),
    ("rtn", "fp8", ""), ("rtn", "fp8-static", ""), ("rtn", "mxfp4", ""), ("rtn", "nvfp4", ""), ("rtn", "nf4", ""),
    ("llm-int8", "", ""), ("kv", "", ""), ("sparsegpt", "w4a16", ""), ("low-rank", "low-rank:70", ""),
]  # fmt: skip


@pytest.mark.parametrize(("method", "scheme", "file_format"), SERVED)
def test_it_is_served_with_the_loss_that_was_reported(
    tmp_path: Path, method: str, scheme: str, file_format: str
) -> None:
    """The whole way: checked as at a start, then one pass of the engine with its own products."""
    path, out, blocks = make_model("llama64", tmp_path), tmp_path / "out", make_blocks(20, 4)
    recipe = recipe_for(Request(method, scheme, 64, file_format=file_format, kept=(r"layers\.1\.mlp\.down_proj",)))
    report = compress_model(open_model(path), recipe, blocks, out, lambda done: None)
    check_checkpoint(out, load_config(out))
    nats = []
    for ids in blocks.held_out:
        logits = last_logits(out, torch.float32, ids, len(ids))[:-1]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[1:]))
    assert report.loss is not None
    is_rounded_here = not scheme.startswith("fp8")  # no processor multiplies e4m3: inputs stay as they are on one
    expected = report.loss.plain_nats + (0.0 if method == "kv" else report.loss.added_nats)  # its cache has 32 bits
    assert float(torch.stack(nats).mean()) == pytest.approx(expected, abs=2e-3 if is_rounded_here else 2e-2)


def test_several_schemes_are_told_apart_by_name(tmp_path: Path) -> None:
    path = make_model("llama64", tmp_path)
    recipe = recipe_for(Request("gptq"))
    mixed = {"down_proj": scheme_named("w8a8"), "o_proj": scheme_named("fp8")}
    schemes = []
    for index in range(3):
        schemes += [(f"model.layers.{index}.mlp.down_proj", mixed["down_proj"])]
        schemes += [(f"model.layers.{index}.self_attn.o_proj", mixed["o_proj"])]
    recipe = Recipe(recipe.scheme, "gptq", schemes=tuple(schemes))
    report = compress_model(open_model(path), recipe, make_blocks(20, 2), tmp_path / "out", lambda done: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        "pack-quantized", "int-quantized", "float-quantized",
    }  # fmt: skip
    check_checkpoint(tmp_path / "out", load_config(tmp_path / "out"))
    assert set(report.schemes.values()) == {"w4a16:64", "w8a8", "fp8"}
