"""Factors of matrices in a file of our own: no other tool has a format for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.file_format import Contents
from compress.methods.low_rank import rank_of
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme


def check(scheme: Scheme) -> None:
    """As in FileFormat."""
    if not scheme.is_low_rank:
        raise CompressError(f"--format low-rank stores no {scheme.name}")


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """As in FileFormat."""
    return dtype


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
    """As in FileFormat."""
    raise AssertionError("factors are written as they are")


def quantization_config(contents: Contents) -> dict[str, Any]:
    """As in FileFormat."""
    if contents.has_kv_scales:
        raise CompressError("--format low-rank stores no KV scales")
    ranks = {
        name: rank_of(*contents.shapes[name], scheme.kept_share)
        for scheme, names in contents.groups.items()
        for name in names
    }
    return {"quant_method": "low_rank", "ranks": ranks}
