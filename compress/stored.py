"""How a recipe's matrices are stored: written by a file format, and read back by the engine's own reader.

What calibration and the loss go on with is what a server will read. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats import awq, bitsandbytes, compressed_tensors, gguf, gptq, low_rank
from compress.formats.file_format import Contents, FileFormat
from compress.recipe import Recipe
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.quant.storage import Cut, StoredFormat
from workers.model.registry import load_registry
from workers.model.tensor_layout import HEAD
from workers.model.weight_format import Matrices

FILE_FORMATS: Mapping[str, FileFormat] = MappingProxyType(
    {
        "compressed-tensors": compressed_tensors,
        "gptq": gptq,
        "awq": awq,
        "bitsandbytes": bitsandbytes,
        "low-rank": low_rank,
        "gguf": gguf,
    }
)


class StoredModel:
    """Some matrices, or all of a model."""

    def __init__(self, recipe: Recipe, matrices: Sequence[Matrices]) -> None:
        """Raises CompressError for a scheme that the recipe's file format does not have."""
        if recipe.file_format not in FILE_FORMATS:
            raise CompressError(f"--format {recipe.file_format!r} is not known (known: {', '.join(FILE_FORMATS)})")
        self._format = FILE_FORMATS[recipe.file_format]
        contents = _contents(recipe, matrices)
        for scheme in contents.groups:
            self._format.check(scheme)
        self.quantization_config: dict[str, Any] | None = None
        self._reader = PLAIN_FORMAT
        if contents.groups or contents.has_kv_scales:
            self.quantization_config = self._format.quantization_config(contents)
            raw = {"quantization_config": self.quantization_config}
            found = load_registry().weight_format(raw, Path("config.json"))
            assert isinstance(found, StoredFormat)
            self._reader = found

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, for a checkpoint of this dtype."""
        return self._format.scale_dtype(dtype)

    def encode(self, matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
        """Tensors by the part of their names behind the matrix's."""
        parts = self._format.encode(matrix, dtype, input_scale)
        return {name: tensor.contiguous() for name, tensor in parts.items()}

    def dense(self, tensors: Mapping[str, Tensor], name: str, outputs: int, inputs: int) -> Tensor:
        """What a matrix means: fp32 [outputs, inputs]. tensors: by their whole names."""
        cut = Cut(name, outputs, inputs, slice(0, outputs), slice(0, inputs))
        return self._reader.rule.storage_of(name).read(HeldTensors(tensors), cut).dense(torch.float32)


class HeldTensors:
    """Weights that are in memory; see workers.model.loader."""

    dtype = torch.float32

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), as_stored: bool = False) -> Tensor:
        """As in Weights."""
        tensor = self._tensors[name]
        assert tensor.shape == shape, (name, tensor.shape, shape)
        return tensor[part] if as_stored else tensor[part].to(self.dtype)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """As in Weights."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tuple(tensor.shape)


def _contents(recipe: Recipe, matrices: Sequence[Matrices]) -> Contents:
    groups: dict[Scheme, list[str]] = {}
    plain = [HEAD]
    for group in matrices:
        for name in group.names:
            scheme = recipe.scheme_of(group, name)
            if scheme.is_plain:
                plain.append(name)
            else:
                groups.setdefault(scheme, []).append(name)
    act_order = recipe.gptq.act_order if recipe.rounding == "gptq" else "none"
    shapes = {name: (outputs, group.inputs) for group in matrices for name, outputs in group.tensors()}
    return Contents(groups, plain, act_order, recipe.has_kv_scales, shapes)


def format_for(scheme: Scheme, asked: str) -> str:
    """The file format that was asked for, or the one that has the scheme."""
    own = {"nf4": "bitsandbytes", "llm-int8": "bitsandbytes", "low-rank": "low-rank"}
    return asked or ("gguf" if scheme.block_type else own.get(scheme.name, "compressed-tensors"))
