"""One compression from a model directory to another, with its report. What `switchyard quantize` calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.tensors import StoredTensor, stored_tensors, weights_digest
from compress.calibration.blocks import TokenBlocks
from compress.calibration.walk import ModelWalk
from compress.errors import CompressError
from compress.gguf.file import GgufContents, gguf_contents, write_file
from compress.gguf.mixtures import with_block_types
from compress.layerwise import LayerwiseRun, Outcome
from compress.partial import PartialCheckpoint
from compress.recipe import Recipe
from compress.report import Report, Sizes, as_json, as_markdown, as_picture
from compress.stored import StoredModel
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint, tensor_layout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PlainModel:
    """A checkpoint that is to be compressed."""

    directory: Path
    config: ModelConfig
    stored: dict[str, StoredTensor]
    walk: ModelWalk


def open_model(directory: Path, device: str = "cpu", dtype: str = "float32") -> PlainModel:
    """Raises CompressError naming the file, field or tensor."""
    try:
        model = load_config(directory)
        check_checkpoint(directory, model)
        on = _device(device)
        walk = ModelWalk(model, Checkpoint(directory, _DTYPES[dtype], on), on)
        return PlainModel(directory, model, stored_tensors(directory), walk)
    except (ModelError, CheckpointError) as error:
        raise CompressError(str(error)) from None


def _device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise CompressError(f"--device {name!r}: {str(error).splitlines()[0]}") from None


def compress_model(
    model: PlainModel,
    recipe: Recipe,
    blocks: TokenBlocks,
    out: Path,
    on_layer: Callable[[int], None],
    predicted_kl_nats: float | None = None,
) -> Report:
    """Write `out`, a directory, or a file where the format is GGUF. Raises CompressError.

    predicted_kl_nats: what mixed precision expects; it is only reported.
    """
    began_s = time.monotonic()
    if recipe.file_format == "gguf":
        if out.suffix != ".gguf":
            raise CompressError(f"{out}: the name of a GGUF ends in .gguf")
        recipe = with_block_types(recipe, model.config)
    if recipe.needs_calibration and not len(blocks.calibration):
        raise CompressError(f"{recipe.scheme.name} by {recipe.rounding}: needs calibration tokens; give --calibration")
    StoredModel(recipe, tensor_layout(model.config).matrices)  # refuses what cannot be stored
    contents = _gguf_contents(model, recipe) if recipe.file_format == "gguf" else None
    with PartialCheckpoint(out, model.config.num_hidden_layers + 1, _options(model, recipe, blocks)) as partial:
        outcome = _run(model, recipe, blocks, partial, on_layer)
        sizes = Sizes(_plain_bytes(model), partial.num_bytes, _matrix_bits(model, recipe))
        report = Report(
            model.directory.name, recipe, outcome.errors, outcome.schemes, outcome.loss, sizes, predicted_kl_nats
        )
        if contents is not None:
            num_bytes = partial.finish_as_file(lambda path, sources: write_file(path, contents, sources))
            sizes = dataclasses.replace(sizes, compressed_bytes=num_bytes)
            took_s = time.monotonic() - began_s
            return dataclasses.replace(report, sizes=sizes, warning=contents.warning, took_s=took_s)
        files: dict[str, str | bytes] = {"report.json": as_json(report), "report.md": as_markdown(report)}
        picture = as_picture(report)
        if picture is not None:
            files["report.png"] = picture
        partial.finish(model.directory, _config(model, recipe), files)
    return dataclasses.replace(report, took_s=time.monotonic() - began_s)


def _gguf_contents(model: PlainModel, recipe: Recipe) -> GgufContents:
    try:
        return gguf_contents(model.directory, model.config, recipe)
    except CheckpointError as error:
        raise CompressError(str(error)) from None


def _run(
    model: PlainModel, recipe: Recipe, blocks: TokenBlocks, partial: PartialCheckpoint, on_layer: Callable[[int], None]
) -> Outcome:
    try:
        return LayerwiseRun(model.walk, recipe, blocks, partial).run(model.stored, on_layer)
    except ModelError as error:
        raise CompressError(str(error)) from None


def _options(model: PlainModel, recipe: Recipe, blocks: TokenBlocks) -> dict[str, Any]:
    """What a run that goes on must have the same."""
    try:
        weights = weights_digest(model.directory)
    except CheckpointError as error:
        raise CompressError(str(error)) from None
    dtype = str(model.walk.weights.dtype)
    return {"weights": weights, "recipe": repr(recipe), "tokens": blocks.digest, "dtype": dtype}


def _config(model: PlainModel, recipe: Recipe) -> dict[str, Any]:
    """config.json of the compressed model."""
    config = read_json(model.directory / "config.json", is_required=True)
    stored = StoredModel(recipe, tensor_layout(model.config).matrices)
    if stored.quantization_config is not None:
        config["quantization_config"] = stored.quantization_config
    return config


def _plain_bytes(model: PlainModel) -> int:
    return sum(path.stat().st_size for path in {tensor.path for tensor in model.stored.values()})


def _matrix_bits(model: PlainModel, recipe: Recipe) -> float:
    """Bits per weight of the matrices in layers, scales included."""
    bits = weights = 0
    for matrices in tensor_layout(model.config).matrices:
        for name, outputs in matrices.tensors():
            bits += recipe.scheme_of(matrices, name).bits_of(outputs, matrices.inputs)
            weights += outputs * matrices.inputs
    return bits / weights
