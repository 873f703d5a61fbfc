"""The format of bitsandbytes: NF4 without double quantization, and the rows of LLM.int8."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.file_format import Contents
from compress.formats.words import pack_halves
from compress.grids.floating import NF4, Nf4Grid, nf4_codes
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme

_INT8_MOST = 127.0


def check(scheme: Scheme) -> None:
    """As in FileFormat."""
    if scheme.name not in ("nf4", "llm-int8"):
        raise CompressError(f"--format bitsandbytes stores no {scheme.name}: only nf4 and llm-int8")


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """As in FileFormat."""
    return torch.float32


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
    """As in FileFormat."""
    if not isinstance(matrix.grid, Nf4Grid):
        return {"weight": matrix.codes().round().to(torch.int8), "SCB": matrix.scales.values[:, 0] * _INT8_MOST}
    outputs, inputs = matrix.values.shape
    state = {
        "quant_type": "nf4",
        "blocksize": matrix.grid.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [outputs, inputs],
    }
    return {
        "weight": pack_halves(nf4_codes(matrix.codes()), high_first=True).reshape(-1, 1),
        "weight.absmax": matrix.scales.values.flatten(),
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def quantization_config(contents: Contents) -> dict[str, Any]:
    """As in FileFormat."""
    if len(contents.groups) != 1 or contents.has_kv_scales:
        raise CompressError("--format bitsandbytes stores one scheme, and no KV scales")
    is_nf4 = contents.only_scheme.name == "nf4"
    rounding = contents.only_scheme.activations
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": is_nf4,
        "load_in_8bit": not is_nf4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_threshold": 6.0 if rounding is None else rounding.exact_from,
        "llm_int8_skip_modules": contents.plain,
    }
