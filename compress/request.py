"""From what a person asks for, in words, to a recipe and token blocks. Raises CompressError naming the option."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.files import read_json
from compress.calibration.blocks import TokenBlocks, read_blocks, split_blocks
from compress.calibration.samples import own_samples
from compress.errors import CompressError
from compress.gguf.mixtures import MIXTURE_NAMES, mixture_named
from compress.job import PlainModel
from compress.methods.gptq import ActOrder, GptqOptions
from compress.methods.pruning import Pattern
from compress.recipe import Pruning, Recipe
from compress.schemes import PLAIN, Scheme, scheme_labelled, scheme_named
from compress.stored import format_for

_DEFAULT_SCHEMES = {
    "rtn": "w4a16",
    "gptq": "w4a16",
    "awq": "w4a16-asym",
    "smoothquant": "w8a8",
    "llm-int8": "llm-int8",
    "magnitude": "plain",
    "wanda": "plain",
    "sparsegpt": "plain",
    "low-rank": "low-rank:80",
    "kv": "plain",
    "wkv": "plain",
    "imatrix": "Q4_K_M",
}
_ROUNDED_BY_GPTQ = ("gptq", "sparsegpt", "llm-int8")
METHOD_NAMES = tuple(_DEFAULT_SCHEMES)
OWN_SAMPLES = "self"


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line says."""

    method: str  # "": gptq; for a GGUF rtn, or imatrix where the scheme is lost without
    scheme: str = ""  # "": the method's usual one
    group_size: int = 64
    act_order: ActOrder = "static"
    searches_range: bool = False
    sparsity: str = "2:4"
    kept: tuple[str, ...] = ()
    has_kv_scales: bool = False
    has_kv_channels: bool = False
    file_format: str = ""  # "": the one that has the scheme


def parse_bytes(text: str) -> int:
    """From "6200000", "6.2MB" or "40GB". Raises CompressError."""
    factors = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
    number, factor = (text[:-2], factors[text[-2:]]) if text[-2:] in factors else (text, 1.0)
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**60:
        raise CompressError(f"--budget {text!r}: must be bytes, such as 6200000, 6.2MB or 40GB")
    return int(value)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Which tokens to calibrate and to measure on."""

    calibration: str  # a file, "self", or "": none
    held_out: str  # a file, or "": every fourth block of calibration
    block_tokens: int = 512
    num_blocks: int = 128
    num_held_out: int = 40
    seed: int = 0


def recipe_for(request: Request) -> Recipe:
    """The recipe."""
    for pattern in request.kept:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CompressError(f"--keep {pattern!r}: not a regular expression ({error})") from None
    if request.file_format == "gguf" or request.scheme in MIXTURE_NAMES or request.method == "imatrix":
        return _gguf_recipe(request)
    method = request.method or "gptq"
    if method not in _DEFAULT_SCHEMES:
        raise CompressError(f"--method {method!r} is not known (known: {', '.join(METHOD_NAMES)})")
    name = request.scheme or _DEFAULT_SCHEMES[method]
    size = request.group_size
    scheme = scheme_labelled(name) if ":" in name else scheme_named(name, size, request.searches_range)
    prunes = method in ("magnitude", "wanda", "sparsegpt")
    has_kv_scales = request.has_kv_scales or method == "kv"
    has_kv_channels = request.has_kv_channels or method == "wkv"
    if scheme == PLAIN and not (prunes or has_kv_scales or has_kv_channels):
        raise CompressError(f"--method {method} with --scheme plain changes nothing")
    return Recipe(
        scheme=scheme,
        rounding="gptq" if method in _ROUNDED_BY_GPTQ and scheme != PLAIN else "nearest",
        gptq=GptqOptions(request.act_order),
        smoothing=method if method in ("awq", "smoothquant") else "none",  # type: ignore[arg-type]
        pruning=Pruning(method, Pattern.parse(request.sparsity)) if prunes else None,  # type: ignore[arg-type]
        kept=request.kept,
        has_kv_scales=has_kv_scales,
        has_kv_channels=has_kv_channels,
        file_format=format_for(scheme, request.file_format),
    )


def _gguf_recipe(request: Request) -> Recipe:
    """The types of single matrices are chosen when the model is known (compress.gguf.mixtures.with_block_types)."""
    name = request.scheme or _DEFAULT_SCHEMES["imatrix"]
    mixture = mixture_named(name)
    if request.file_format not in ("gguf", ""):
        raise CompressError(f"--format {request.file_format} stores no {request.scheme}: only gguf does")
    if request.method not in ("", "rtn", "imatrix"):
        raise CompressError(f"--method {request.method!r}: a GGUF is made by rtn or imatrix")
    if request.has_kv_scales or request.has_kv_channels:
        raise CompressError(f"--kv-{'scales' if request.has_kv_scales else 'channels'}: a GGUF has none")
    if request.method == "rtn" and request.scheme == "IQ2_XXS":
        raise CompressError("--method rtn: IQ2_XXS needs importances; choose imatrix")
    return Recipe(
        scheme=Scheme(name, None, block_type=mixture.base),
        kept=request.kept,
        has_importances=request.method == "imatrix" or (not request.method and mixture.is_by_importance),
        file_format="gguf",
    )


def blocks_for(
    model: PlainModel, request: TokenRequest, on_token: Callable[[int], None] = lambda done: None
) -> TokenBlocks:
    """The blocks; either part may be empty. on_token: called with how much of each own sample is done."""
    directory, vocab = model.directory, model.config.vocab_size
    if request.block_tokens > model.config.max_position_embeddings:
        most = model.config.max_position_embeddings
        raise CompressError(f"--block-tokens {request.block_tokens}: the model has {most} positions")
    found = torch.zeros(0, request.block_tokens, dtype=torch.int64)
    if request.calibration == OWN_SAMPLES:
        count = request.num_blocks
        found = own_samples(model.walk, _first_token(model), count, request.block_tokens, request.seed, on_token)
    elif request.calibration:
        path = Path(request.calibration)
        found = read_blocks(path, directory, vocab, request.block_tokens, request.num_blocks)
    if request.held_out:
        path = Path(request.held_out)
        held_out = read_blocks(path, directory, vocab, request.block_tokens, request.num_held_out)
        return TokenBlocks(found, held_out)
    return split_blocks(found, request.calibration) if len(found) else TokenBlocks(found, found)


def _first_token(model: PlainModel) -> int:
    """What the model's own texts begin with."""
    said = read_json(model.directory / "config.json").get("bos_token_id")
    return said if type(said) is int else next(iter(model.config.eos_token_ids), 0)
