"""GGUF: blocks of bytes, of a type for each matrix. Here only what calibration and the loss read a layer back by; the
file is written by compress.gguf."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from checkpoint.gguf.config import QUANT_METHOD, TYPES
from compress.errors import CompressError
from compress.formats.file_format import Contents
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme

_EXPERT = re.compile(r"\.experts\.\d+\.")


def check(scheme: Scheme) -> None:
    """As in FileFormat."""
    if not scheme.block_type:
        raise CompressError(f"--format gguf stores no {scheme.name}")


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """As in FileFormat."""
    return torch.float16


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
    """As in FileFormat, but blocks are made by compress.gguf.blocks, and no grid is stored."""
    raise AssertionError("check refuses what has a grid")


def quantization_config(contents: Contents) -> dict[str, Any]:
    """As in FileFormat: as checkpoint.gguf.directory writes it."""
    types = {_EXPERT.sub(".experts.*.", name): s.block_type for s, names in contents.groups.items() for name in names}
    return {"quant_method": QUANT_METHOD, TYPES: types}
