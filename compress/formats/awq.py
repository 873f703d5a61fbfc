"""AutoAWQ's format `gemm`: words along the outputs in an order of their own, and zero points always."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.file_format import Contents
from compress.formats.words import pack_words
from compress.grids.integer import IntGrid
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word, the lowest bits first


def check(scheme: Scheme) -> None:
    """As in FileFormat."""
    if not isinstance(scheme.grid, IntGrid) or scheme.grid.bits != 4 or scheme.activations is not None:
        raise CompressError(f"--format awq stores no {scheme.name}: only 4-bit integer weights with 16-bit inputs")


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """As in FileFormat."""
    return torch.float16


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
    """As in FileFormat."""
    grid, zeros = matrix.grid, matrix.scales.zeros
    assert isinstance(grid, IntGrid)
    if matrix.has_mixed_groups or len(matrix.values) % len(_ORDER):
        raise CompressError("--format awq: needs outputs in eights, and no permuted act-order")
    zeros = torch.zeros_like(matrix.scales.values) if zeros is None else zeros
    return {
        "qweight": _pack((matrix.codes().round() - grid.least).T),
        "qzeros": _pack((zeros - grid.least).T),
        "scales": matrix.scales.values.T.to(torch.float16),
    }


def _pack(codes: Tensor) -> Tensor:
    """[rows, outputs] -> int32 [rows, outputs / 8]."""
    return pack_words(codes.unflatten(1, (-1, len(_ORDER)))[..., list(_ORDER)].flatten(1), 4)


def quantization_config(contents: Contents) -> dict[str, Any]:
    """As in FileFormat."""
    if len(contents.groups) != 1 or contents.has_kv_scales:
        raise CompressError("--format awq stores one scheme, and no KV scales")
    grid = contents.only_scheme.grid
    assert isinstance(grid, IntGrid)
    return {
        "quant_method": "awq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": contents.plain,
    }
