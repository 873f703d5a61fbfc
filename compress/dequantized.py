"""The plain checkpoint of a compressed one: each matrix as the numbers that its codes mean, a layer at a time.

Compressions begin with plain weights; this makes them of a GGUF, or of any other format that the engine reads. Knows
nothing of what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.tensors import weights_digest
from compress.errors import CompressError
from compress.partial import PartialCheckpoint
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.loader import Checkpoint
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.quant.storage import Cut, StoredFormat
from workers.model.registry import load_config
from workers.model.tensor_layout import EMBEDDING, HEAD, TensorLayout, check_checkpoint, tensor_layout

_CPU = torch.device("cpu")


def dequantize_model(directory: Path, out: Path, dtype: torch.dtype, on_layer: Callable[[int], None]) -> int:
    """Write `out`, in floating-point numbers of dtype; a run that was cut off goes on. Returns the weights' bytes.

    on_layer: called with the number of layers that are done. Raises CompressError.
    """
    try:
        model = load_config(directory)
        check_checkpoint(directory, model)
        options = {"weights": weights_digest(directory), "dtype": str(dtype)}
        with PartialCheckpoint(out, model.num_hidden_layers + 1, options) as partial:
            _write(model, Checkpoint(directory, dtype, _CPU), partial, on_layer)
            config = read_json(directory / "config.json", is_required=True)
            config.pop("quantization_config", None)
            num_bytes = partial.num_bytes
            partial.finish(directory, config, {})
            return num_bytes
    except (ModelError, CheckpointError) as error:
        raise CompressError(str(error)) from None


def _write(
    model: ModelConfig, weights: Checkpoint, partial: PartialCheckpoint, on_layer: Callable[[int], None]
) -> None:
    plain = replace(model, weight_format=PLAIN_FORMAT)
    of_layers: set[str] = set()
    for index in range(model.num_hidden_layers):
        layout = TensorLayout(PLAIN_FORMAT)
        model.decoder.add_tensors(layout, model.hidden_size, index)
        of_layers |= layout.wanted.keys()
        if not partial.has(index + 1):
            partial.write(index + 1, _numbers(model, weights, layout), {})
        on_layer(index + 1)
    ends = tensor_layout(plain)
    ends.wanted = {name: wanted for name, wanted in ends.wanted.items() if name not in of_layers}
    ends.matrices = []
    if not partial.has(0):
        partial.write(0, _numbers(model, weights, ends), {})


def _numbers(model: ModelConfig, weights: Checkpoint, layout: TensorLayout) -> Mapping[str, Tensor]:
    """Of a layout of plain tensors."""
    stored = model.weight_format
    if not isinstance(stored, StoredFormat):
        raise CompressError("quantization_config: a plugin's format, whose numbers are not known here")
    matrices = {name for group in layout.matrices for name in group.names} | {EMBEDDING, HEAD}
    found = {}
    for name, wanted in layout.wanted.items():
        matrix = name.removesuffix(".weight")
        if matrix in matrices and name.endswith(".weight"):
            outputs, columns = wanted.shape
            cut = Cut(matrix, outputs, columns, slice(0, outputs), slice(0, columns))
            found[name] = stored.rule.storage_of(matrix).read(weights, cut).dense(weights.dtype)
        elif not wanted.is_optional or weights.shape_of(name) is not None:
            shape = weights.shape_of(name) if wanted.is_optional else wanted.shape
            assert shape is not None
            found[name] = weights.read(name, shape)
    return found
