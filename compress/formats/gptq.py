"""The format of AutoGPTQ and GPTQModel: words along the inputs, scales by group and output, and each input's group."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.file_format import Contents
from compress.formats.words import pack_words
from compress.grids.integer import IntGrid
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme


def check(scheme: Scheme) -> None:
    """As in FileFormat."""
    if not isinstance(scheme.grid, IntGrid) or scheme.activations is not None:
        raise CompressError(f"--format gptq stores no {scheme.name}: only integer weights with 16-bit inputs")


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """As in FileFormat."""
    return torch.float16


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
    """As in FileFormat. Version 1 stores zero points less one, which has no 0: with zero points it is version 2."""
    grid = matrix.grid
    assert isinstance(grid, IntGrid)
    zeros = matrix.scales.zeros
    stored = torch.full_like(matrix.scales.values, -1.0) if zeros is None else zeros
    return {
        "qweight": pack_words(matrix.codes().round() - grid.least, grid.bits).T,
        "qzeros": pack_words((stored - grid.least).T, grid.bits),
        "scales": matrix.scales.values.T.to(torch.float16),
        "g_idx": matrix.group_of_column.int(),
    }


def quantization_config(contents: Contents) -> dict[str, Any]:
    """As in FileFormat."""
    if len(contents.groups) != 1 or contents.has_kv_scales:
        raise CompressError("--format gptq stores one scheme, and no KV scales")
    grid = contents.only_scheme.grid
    assert isinstance(grid, IntGrid)
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "desc_act": contents.act_order == "permuted",
        "sym": grid.is_symmetric,
        "checkpoint_format": "gptq" if grid.is_symmetric else "gptq_v2",
        "lm_head": False,
        "dynamic": {f"-:{re.escape(name)}$": {} for name in contents.plain},
    }
