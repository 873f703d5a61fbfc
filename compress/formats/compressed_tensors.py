"""The format of the library compressed-tensors.

Integers below 8 bits lie in int32 words along the inputs, zero points along the outputs; 4-bit floats two to a byte.
Knows nothing of models or methods.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.file_format import Contents
from compress.formats.words import pack_halves, pack_words
from compress.grids.floating import BLOCK, E2M1, Fp8Grid, Mxfp4Grid, Nvfp4Grid
from compress.grids.integer import IntGrid
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme

_MX_BIAS = 127


def check(scheme: Scheme) -> None:
    """As in FileFormat."""
    file_format(scheme)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """As in FileFormat."""
    return dtype


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
    """Tensors by the part of their names behind the matrix's. dtype: of scales, where the format leaves it open."""
    grid, codes = matrix.grid, matrix.codes()
    if isinstance(grid, IntGrid):
        parts = _encode_integers(matrix, grid, codes.round(), dtype)
    elif isinstance(grid, Fp8Grid):
        stored = {
            "row": matrix.scales.values,
            "matrix": matrix.scales.values[0],
            "block": matrix.scales.values[::BLOCK],
        }
        parts = {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": stored[grid.scale_per].to(dtype)}
    elif isinstance(grid, Mxfp4Grid):
        exponents = (matrix.scales.values.log2().round() + _MX_BIAS).to(torch.uint8)
        parts = {"weight_packed": pack_halves(e2m1_codes(codes)), "weight_scale": exponents}
    elif isinstance(grid, Nvfp4Grid):
        divisor = matrix.scales.divisor
        assert divisor is not None
        scales = (matrix.scales.values * divisor).to(torch.float8_e4m3fn)
        parts = {
            "weight_packed": pack_halves(e2m1_codes(codes)),
            "weight_scale": scales,
            "weight_global_scale": divisor.float().reshape(1),
        }
    else:
        raise AssertionError(f"check refuses {grid}")
    if input_scale is not None:
        parts["input_scale"] = input_scale.to(dtype).reshape(1)
    return {name: tensor.contiguous() for name, tensor in parts.items()}


def _encode_integers(matrix: RoundedMatrix, grid: IntGrid, codes: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    scales = {"weight_scale": matrix.scales.values.to(dtype)}
    if not grid.group_size and grid.bits == 8:
        return {"weight": codes.to(torch.int8), **scales}
    parts = _packed(grid, codes, scales)
    if matrix.scales.zeros is not None:
        parts["weight_zero_point"] = pack_words((matrix.scales.zeros - grid.least).T, grid.bits).T
    if matrix.has_mixed_groups:
        parts["weight_g_idx"] = matrix.group_of_column.int()
    return parts


def _packed(grid: IntGrid, codes: Tensor, scales: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "weight_packed": pack_words(codes - grid.least, grid.bits),
        **scales,
        "weight_shape": torch.tensor(codes.shape),
    }


def e2m1_codes(values: Tensor) -> Tensor:
    """int64: the sign's bit above the index of the magnitude."""
    boundaries = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)], device=values.device)
    return torch.bucketize(values.abs().contiguous(), boundaries) + 8 * torch.signbit(values).long()


# ---- config.json


_ACT_ORDERS = {"none": None, "static": "static", "permuted": "group"}


def file_format(scheme: Scheme) -> str:
    """The name of a scheme's packing."""
    grid = scheme.grid
    if isinstance(grid, IntGrid):
        return "int-quantized" if grid.bits == 8 and not grid.group_size else "pack-quantized"
    names = {Fp8Grid: "float-quantized", Mxfp4Grid: "mxfp4-pack-quantized", Nvfp4Grid: "nvfp4-pack-quantized"}
    found = names.get(type(grid))
    if found is None:
        raise CompressError(f"compressed-tensors stores no {scheme.name}")
    return found


def quantization_config(contents: Contents) -> dict[str, Any]:
    """As in FileFormat. With one scheme it is said of all linear layers but the ignored."""
    formats = {file_format(scheme) for scheme in contents.groups}
    config_groups = {}
    for index, (scheme, names) in enumerate(contents.groups.items()):
        config_groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(contents.groups) == 1 else names,
            "weights": _weights(scheme, contents.act_order),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": file_format(scheme),
        }
    whole = {0: "dense", 1: next(iter(formats), "dense")}.get(len(formats), "mixed-precision")
    kv = {**_number("float", 8), "strategy": "tensor", "dynamic": False} if contents.has_kv_scales else None
    return {
        "quant_method": "compressed-tensors",
        "format": whole,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": contents.plain,
        "kv_cache_scheme": kv,
    }


def _number(kind: str, bits: int, is_symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": is_symmetric}


def _weights(scheme: Scheme, act_order: str) -> dict[str, Any]:
    grid = scheme.grid
    if isinstance(grid, IntGrid):
        strategy = {"strategy": "group", "group_size": grid.group_size} if grid.group_size else {"strategy": "channel"}
        return {
            **_number("int", grid.bits, grid.is_symmetric),
            **strategy,
            "dynamic": False,
            "actorder": _ACT_ORDERS[act_order] if grid.group_size else None,
        }
    assert grid is not None
    fixed: dict[str, Any] = {}
    if isinstance(grid, Fp8Grid):
        fixed = {"strategy": {"row": "channel", "matrix": "tensor", "block": "block"}[grid.scale_per]}
        if grid.scale_per == "block":
            fixed["block_structure"] = [BLOCK, BLOCK]
    elif isinstance(grid, Mxfp4Grid):
        fixed = {"strategy": "group", "group_size": grid.group_size, "scale_dtype": "torch.uint8"}
    elif isinstance(grid, Nvfp4Grid):
        fixed = {"strategy": "tensor_group", "group_size": grid.group_size, "scale_dtype": "torch.float8_e4m3fn"}
    return {**_number("float", grid.bits), **fixed, "dynamic": False}


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    rounding = scheme.activations
    if rounding is None:
        return None
    number = _number("int" if rounding.kind == "int8" else "float", 8)
    if rounding.scale_per == "group":
        return {**number, "strategy": "group", "group_size": BLOCK, "dynamic": True}
    return {**number, "strategy": rounding.scale_per, "dynamic": rounding.scale_per != "tensor"}
