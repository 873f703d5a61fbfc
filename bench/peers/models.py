"""The models of the peer table: random weights of two sizes, made once, and the demo model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn

from bench.rows import ROOT
from training import tokenizer
from training.llama import Llama, Shape

HALF = Shape(32000, 896, 4864, 24, 14, 2, 64, 4096)
TINY = Shape(4096, 256, 688, 6, 8, 4, 32, 4096)
_SEED = 0


@dataclass(frozen=True, slots=True)
class PeerModel:
    """A model, and what is measured on it."""

    name: str
    size: str  # for people
    workloads: tuple[str, ...]
    shape: Shape | None  # None: the demo model
    quantized: tuple[str, ...] = ()  # arguments of `switchyard quantize`, for us
    precision: str = ""  # of the weights, for peers: int8 or int4; "": 16 bits


MODELS = {
    model.name: model
    for model in (
        PeerModel("half", "0.39 B parameters", ("single", "batch", "prefix"), HALF),
        PeerModel("half-int8", "0.39 B parameters, 8 bits", ("single", "batch"), HALF, ("--scheme", "w8a8"), "int8"),
        PeerModel("half-int4", "0.39 B parameters, 4 bits", ("single", "batch"), HALF, ("--scheme", "w4a16"), "int4"),
        PeerModel("tiny", "5 M parameters", ("single", "batch", "prefix"), TINY),
        PeerModel("demo", "the demo model, 7 M parameters", ("batch",), None),
    )
}


def default_folder() -> Path:
    """Where models are kept from one benchmark to the next."""
    return platformdirs.user_cache_path("switchyard", appauthor=False) / "bench-peers"


def directory_of(model: PeerModel, folder: Path) -> Path:
    """Where the model is; in the folder, and made at the first call, unless it is the demo model."""
    if model.shape is None:
        return ROOT / "models" / "demo"
    directory = folder / model.name / "model"
    if directory.exists():
        return directory
    if model.quantized:
        _quantize(directory_of(full_model(model), folder), directory, model.quantized)
        return directory
    partial = directory.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_random_model(partial, model.shape)
    partial.rename(directory)
    return directory


_MIXTURES = {"int8": "Q8_0", "int4": "Q4_K_M"}


def write_gguf(model: PeerModel, folder: Path, work_dir: Path) -> None:
    """The model's weights in a GGUF of its precision, for llama.cpp; made at the first call. In 16 bits there is none:
    nothing here writes such a file."""
    if model.precision:
        mixture = _MIXTURES[model.precision]
        file = work_dir / f"{model.name}-{mixture}.gguf"
        if not file.exists():
            _quantize(directory_of(full_model(model), folder), file, ("--scheme", mixture))


def full_model(model: PeerModel) -> PeerModel:
    """The same in 16 bits, which peers quantize by themselves."""
    return MODELS[model.name.partition("-")[0]]


def _quantize(directory: Path, out: Path, arguments: Sequence[str]) -> None:
    """Rounded to the nearest: speed does not depend on what the numbers are."""
    command = [str(Path(sys.executable).with_name("switchyard")), "quantize", str(directory), "--out", str(out)]
    short = ["--method", "rtn", "--blocks", "2", "--block-tokens", "32", "--held-out-blocks", "1"]
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, *short, *arguments], check=True, stdin=subprocess.DEVNULL)


def write_random_model(directory: Path, shape: Shape) -> None:
    """A Llama of this shape in the Hugging Face layout: bf16, the same numbers each time, a token for each id."""
    tokenizer.save(_byte_tokenizer(shape.vocab_size), directory, shape.max_position_embeddings)
    (directory / "config.json").write_text(json.dumps(shape.config_json(), indent=2))
    save_file(_random_llama(shape).checkpoint(), directory / "model.safetensors", metadata={"format": "pt"})


def _random_llama(shape: Shape) -> Llama:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = Llama(shape)
        for parameter in model.parameters():
            if parameter.ndim == 2:  # training starts from layers that do nothing
                nn.init.normal_(parameter, std=0.02)
    return model


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """The end of text, a token for each byte, and names without meaning for the other ids."""
    names = [tokenizer.END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"unused-{i}" for i in range(len(names), vocab_size)]
    made = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizer.END_OF_TEXT])
    return made
