"""Whole GGUF files: read by `gguf`, served with the loss that was reported, the types that llama.cpp would choose, and
nothing half-written under the final name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from checkpoint.gguf.directory import open_gguf
from checkpoint.gguf.names import file_name, layout_name
from compress.calibration.blocks import TokenBlocks
from compress.errors import CompressError, DiskError
from compress.gguf.mixtures import MIXTURE_NAMES, with_block_types
from compress.job import compress_model, open_model
from compress.report import Report
from compress.request import Request, recipe_for
from tests.quant.served import last_logits
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint

ROOT = Path(__file__).resolve().parents[3]
VOCAB = 4096  # of the demo model, whose tokenizer these have
SIZES: dict[str, object] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "eos_token_id": 0, "bos_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "narrow": (LlamaConfig, {"hidden_size": 96, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3_experts": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(kind: str, folder: Path) -> Path:
    """A checkpoint in bf16 with the demo model's tokenizer; made once."""
    path = folder / kind
    if not path.exists():
        make, options = KINDS[kind]
        torch.manual_seed(len(kind))
        AutoModelForCausalLM.from_config(make(**{**SIZES, **options})).to(torch.bfloat16).save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(ROOT / "models" / "demo" / name, path / name)
    return path


def blocks() -> TokenBlocks:
    ids = torch.randint(VOCAB, (6, 40), generator=torch.Generator().manual_seed(3))
    return TokenBlocks(ids[:4], ids[4:])


def write(path: Path, out: Path, scheme: str, method: str = "", **options: object) -> Report:
    recipe = recipe_for(Request(method, scheme, file_format="gguf", **options))  # type: ignore[arg-type]
    return compress_model(open_model(path), recipe, blocks(), out, lambda done: None)


def test_names_of_tensors_go_both_ways() -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.11.mlp.gate.weight"]
    names += ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.down_proj.weight"]
    names += ["model.layers.7.mlp.experts.12.up_proj.weight", "model.layers.7.self_attn.k_norm.weight"]
    for architecture in ("llama", "qwen3moe"):
        for name in names:
            found = file_name(name, architecture)
            assert found is not None
            back = layout_name(found.name, architecture)
            assert back.of_expert(str(found.expert)) == name
            assert back.has_interleaved_heads == found.has_interleaved_heads
    assert file_name("model.layers.0.self_attn.rotary_emb.inv_freq", "llama") is None


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_K_M", "IQ3_XXS"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_served_with_the_loss_that_was_reported(kind: str, scheme: str, folder: Path, tmp_path: Path) -> None:
    """The whole way: the file becomes a model directory, is checked as at a start, and one pass is computed."""
    report = write(model_of(kind, folder), tmp_path / "out.gguf", scheme)
    directory = open_gguf(tmp_path / "out.gguf")
    check_checkpoint(directory, load_config(directory))
    nats = []
    for ids in blocks().held_out:
        logits = last_logits(directory, torch.float32, ids, len(ids))[:-1]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[1:]))
    assert report.loss is not None
    expected = report.loss.plain_nats + report.loss.added_nats
    assert float(torch.stack(nats).mean()) == pytest.approx(expected, abs=2e-3)
    assert report.sizes.compressed_bytes == (tmp_path / "out.gguf").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf"}


@pytest.mark.parametrize("kind", KINDS)
def test_others_read_the_file(kind: str, folder: Path, tmp_path: Path) -> None:
    """Every tensor of `gguf`'s reader is the checkpoint's, under llama.cpp's names and in its order of rows."""
    path = model_of(kind, folder)
    write(path, tmp_path / "out.gguf", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    architecture = said["general.architecture"]
    assert architecture == {"narrow": "llama", "qwen3_experts": "qwen3moe"}.get(kind, kind)
    assert said["general.file_type"] == 7
    assert said[f"{architecture}.block_count"] == 2
    assert said["tokenizer.chat_template"] == (path / "chat_template.jinja").read_text()
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 2)
    wanted = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
    if json.loads((path / "config.json").read_text())["tie_word_embeddings"]:
        del wanted["lm_head.weight"]
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in wanted.items():
        stem, _, last = name.rpartition(".")
        parts = {name: (stem, tensor)}
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            parts = {f"{stem}.{each}": (f"{stem}.{each}", t) for each, t in (("gate_proj", gate), ("up_proj", up))}
            last = "weight"
        elif name.endswith("experts.down_proj"):
            parts, last = {name: (name, tensor)}, "weight"
        for stem, tensor in parts.values():
            own = found.pop(f"{names.get_name(stem)}.{last}")
            values = np.array(gguf.quants.dequantize(own.data, own.tensor_type)).reshape(tensor.shape)
            if architecture == "llama" and ("q_proj" in stem or "k_proj" in stem):
                head_dim = 32 if kind == "narrow" else 64
                values = values.reshape(-1, head_dim // 2, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
            np.testing.assert_allclose(values, tensor.numpy(), atol=float(tensor.abs().max()) / 200)
    assert set(found) == ({"rope_freqs.weight"} if kind == "llama" else set())


WITH_16_LAYERS = {
    "Q4_0": {"Q4_0": 112}, "Q8_0": {"Q8_0": 112},
    "Q4_K_M": {"Q4_K": 96, "Q6_K": 16}, "Q5_K_M": {"Q5_K": 96, "Q6_K": 16},
    "IQ2_XXS": {"IQ2_XXS": 94, "Q4_K": 16, "IQ3_XXS": 2}, "IQ3_XXS": {"IQ3_XXS": 80, "Q4_K": 32},
}  # fmt: skip


@pytest.mark.parametrize("scheme", MIXTURE_NAMES)
def test_mixtures(scheme: str, tmp_path: Path) -> None:
    """Of a model with 16 layers and four heads to a key: layers 0, 1, 4, 7, 10, 13, 14 and 15 have more bits."""
    options = {"num_hidden_layers": 16, "num_attention_heads": 8, "hidden_size": 512}
    LlamaConfig(**{**SIZES, **options}, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    recipe = with_block_types(recipe_for(Request("", scheme)), load_config(tmp_path))
    types = {name: each.block_type for name, each in recipe.schemes}
    ends = {"Q4_0": ("Q4_0", "Q6_K"), "Q8_0": ("Q8_0", "Q8_0"), "Q4_K_M": ("Q4_K", "Q6_K"), "Q5_K_M": ("Q5_K", "Q6_K")}
    assert (types.pop("model.embed_tokens"), types.pop("lm_head")) == ends.get(scheme, ("Q4_K", "Q5_K"))
    assert Counter(types.values()) == WITH_16_LAYERS[scheme]
    if scheme.endswith("_M"):
        raised = [int(name.split(".")[2]) for name, kind in types.items() if kind == "Q6_K" and "v_proj" in name]
        assert raised == [0, 1, 4, 7, 10, 13, 14, 15]


def test_rows_that_256_does_not_divide_get_other_types(folder: Path, tmp_path: Path) -> None:
    write(model_of("narrow", folder), tmp_path / "out.gguf", "Q4_K_M")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.1.attn_v.weight"]) == ("Q5_0", "Q8_0")
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.1.ffn_down.weight"]) == ("Q4_K", "Q6_K")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_importances_come_from_calibration(folder: Path, tmp_path: Path) -> None:
    path = model_of("qwen3", folder)
    losses = []
    for method in ("rtn", "imatrix"):
        report = write(path, tmp_path / f"{method}.gguf", "Q4_K_M", method)
        losses.append(sum(report.errors.values()))
    assert losses[0] != losses[1]
    assert recipe_for(Request("", "IQ2_XXS")).needs_calibration
    assert not recipe_for(Request("", "Q4_K_M")).needs_calibration
    recipe, none = recipe_for(Request("imatrix")), torch.zeros(0, 4).long()
    with pytest.raises(CompressError, match="needs calibration tokens"):
        compress_model(open_model(path), recipe, TokenBlocks(none, none), tmp_path / "x.gguf", print)


def test_what_is_kept_stays_numbers(folder: Path, tmp_path: Path) -> None:
    kept = (r"layers\.1\.mlp", "lm_head")
    write(model_of("llama", folder), tmp_path / "out.gguf", "Q4_0", kept=kept)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {kinds[f"blk.1.ffn_{part}.weight"] for part in ("gate", "up", "down")} == {"BF16"}
    assert (kinds["output.weight"], kinds["blk.0.ffn_down.weight"]) == ("BF16", "Q4_0")
    check_checkpoint(directory := open_gguf(tmp_path / "out.gguf"), load_config(directory))


# ---- cut off, and bad input


class Stop(Exception):
    """In place of a signal."""


def test_a_run_that_was_cut_off_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = model_of("llama", folder), tmp_path / "out.gguf"
    write(path, tmp_path / "whole.gguf", "Q4_K_M")

    def stop(done: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        compress_model(open_model(path), recipe_for(Request("", "Q4_K_M")), blocks(), out, stop)
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.gguf.writer._pad", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DiskError, match="No space left; all layers are finished, and the same command goes on"):
            write(path, out, "Q4_K_M")
    assert not out.exists()
    assert not list((tmp_path / "out.gguf.partial").glob("*.unfinished"))
    write(path, out, "Q4_K_M")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("", "Q3_K_S", file_format="gguf"), "--format gguf has no scheme 'Q3_K_S' (known: Q4_0, Q8_0, "),
        (Request("", "w4a16", file_format="gguf"), "--format gguf has no scheme 'w4a16'"),
        (Request("", "Q4_0", file_format="awq"), "--format awq stores no Q4_0: only gguf does"),
        (Request("gptq", "Q4_0"), "--method 'gptq': a GGUF is made by rtn or imatrix"),
        (Request("rtn", "IQ2_XXS"), "--method rtn: IQ2_XXS needs importances; choose imatrix"),
        (Request("", "Q4_0", has_kv_scales=True), "--kv-scales: a GGUF has none"),
    ],
)
def test_what_cannot_be_asked_for_is_named_in_one_line(request_: Request, message: str) -> None:
    with pytest.raises(CompressError) as caught:
        recipe_for(request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=false: llama.cpp's qwen3moe"),
        ({"rope_parameters": {**LLAMA3, "factor": 7.5}}, "rope_scaling: other parameters than Meta's models have"),
    ],
)
def test_what_a_file_cannot_say_is_named(change: dict[str, object], message: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(model_of("qwen3_experts", folder), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CompressError) as caught:
        write(path, tmp_path / "out.gguf", "Q8_0")
    assert message in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} == {"model"}


def test_an_architecture_without_a_name_is_named(folder: Path) -> None:
    model = dataclasses.replace(load_config(model_of("narrow", folder)), architecture="OtherForCausalLM")
    with pytest.raises(CompressError, match=r"--format gguf: architecture OtherForCausalLM is not supported \(support"):
        with_block_types(recipe_for(Request("", "Q8_0")), model)


def test_the_command_says_one_line(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", "quantize", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    path = model_of("narrow", folder)
    for out, message in (("out", "out: the name of a GGUF ends in .gguf"), ("no.gguf", "tokenizer.json: missing")):
        if out == "no.gguf":
            shutil.copytree(path, tmp_path / "bare")
            (tmp_path / "bare" / "tokenizer.json").unlink()
        failed = run(path if out == "out" else tmp_path / "bare", "--out", tmp_path / out, "--scheme", "Q8_0",
                     "--block-tokens", 8, "--blocks", 2)  # fmt: skip
        assert failed.returncode == 2
        assert message in failed.stderr.strip().splitlines()[-1]
    arguments = (path, "--out", tmp_path / "x.gguf", "--format", "gguf", "--scheme", "Q8_0", "--block-tokens", 8)
    done = run(*arguments, "--blocks", 4)
    assert done.returncode == 0, done.stderr
    assert "x.gguf: " in done.stdout
    assert "nats a token" in done.stdout
    assert "warning: " in done.stderr
    assert {each.name for each in tmp_path.iterdir()} == {"x.gguf", "bare"}
