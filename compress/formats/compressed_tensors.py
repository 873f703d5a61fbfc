"""The compressed-tensors format: what stands in place of a matrix, and the quantization_config that says so.

Packing: integers below 8 bits in int32 words, the lowest bits first, along the inputs; zero points along the outputs;
4-bit floats two to a byte, the lower half first. Knows nothing of models or methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.grids.floating import BLOCK, E2M1, Fp8Grid, Mxfp4Grid, Nvfp4Grid
from compress.grids.integer import IntGrid
from compress.rounded import RoundedMatrix
from compress.schemes import Scheme

_MX_BIAS = 127
_WORD_BITS = 32


# ---- words


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, columns] -> int32 [rows, columns / per word], the first column in the lowest bits."""
    per_word = _WORD_BITS // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (padded << (torch.arange(per_word, device=codes.device) * bits)).sum(-1)
    signed: Tensor = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return signed


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The way back: int64 [rows, columns]."""
    per_word = _WORD_BITS // bits
    shifts = torch.arange(per_word, device=words.device) * bits
    codes: Tensor = ((words.long()[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :columns]
    return codes


def pack_halves(codes: Tensor) -> Tensor:
    """4-bit codes [rows, columns] -> uint8 [rows, columns / 2], the first in the lower half."""
    pairs: Tensor = codes.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_halves(packed: Tensor) -> Tensor:
    """The way back: int64."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()


def e2m1_codes(values: Tensor) -> Tensor:
    """int64: the sign's bit above the index of the magnitude."""
    boundaries = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)], device=values.device)
    return torch.bucketize(values.abs().contiguous(), boundaries) + 8 * torch.signbit(values).long()


def e2m1_values(codes: Tensor) -> Tensor:
    """fp32."""
    return torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)[codes]


# ---- matrices


def encode(matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None = None) -> dict[str, Tensor]:
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
        raise CompressError(f"compressed-tensors stores no {type(grid).__name__.removesuffix('Grid')}")
    if input_scale is not None:
        parts["input_scale"] = input_scale.to(dtype).reshape(1)
    return {name: tensor.contiguous() for name, tensor in parts.items()}


def _encode_integers(matrix: RoundedMatrix, grid: IntGrid, codes: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    scales = {"weight_scale": matrix.scales.values.to(dtype)}
    if not grid.group_size:
        return {"weight": codes.to(torch.int8), **scales} if grid.bits == 8 else _packed(grid, codes, scales)
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


def decode(parts: Mapping[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    """What the tensors of a matrix mean: fp32 [outputs, inputs]."""
    grid = scheme.grid
    if grid is None:
        return parts["weight"].float()
    scales = parts["weight_scale"].float()
    group = torch.arange(inputs, device=scales.device) // (grid.group_size or inputs)
    if isinstance(grid, Fp8Grid):
        tall = scales.repeat_interleave(BLOCK, 0) if grid.scale_per == "block" else scales.expand(outputs, 1)
        return parts["weight"].float() * tall[:outputs, group]
    if isinstance(grid, Mxfp4Grid):
        return e2m1_values(unpack_halves(parts["weight_packed"])) * (scales - _MX_BIAS).exp2()[:, group]
    if isinstance(grid, Nvfp4Grid):
        return e2m1_values(unpack_halves(parts["weight_packed"])) * (scales / parts["weight_global_scale"])[:, group]
    assert isinstance(grid, IntGrid)
    if "weight" in parts:
        return parts["weight"].float() * scales
    if "weight_g_idx" in parts:
        group = parts["weight_g_idx"].long()
    codes = unpack_words(parts["weight_packed"], grid.bits, inputs) + grid.least
    if "weight_zero_point" in parts:
        zeros = unpack_words(parts["weight_zero_point"].T, grid.bits, outputs).T + grid.least
        codes = codes - zeros[:, group]
    return codes.float() * scales[:, group]


# ---- config.json


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


def quantization_config(
    groups: Mapping[Scheme, list[str]], ignored: list[str], act_order: str | None, has_kv_scales: bool
) -> dict[str, Any]:
    """groups: names of matrices by their scheme; with one scheme it is said of all linear layers but the ignored."""
    formats = {file_format(scheme) for scheme in groups}
    config_groups = {}
    for index, (scheme, names) in enumerate(groups.items()):
        targets = ["Linear"] if len(groups) == 1 else names
        config_groups[f"group_{index}"] = {
            "targets": targets,
            "weights": _weights(scheme, act_order),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": file_format(scheme),
        }
    whole = {0: "dense", 1: next(iter(formats), "dense")}.get(len(formats), "mixed-precision")
    kv = {**_number("float", 8), "strategy": "tensor", "dynamic": False} if has_kv_scales else None
    return {
        "quant_method": "compressed-tensors",
        "format": whole,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignored,
        "kv_cache_scheme": kv,
    }


def _number(kind: str, bits: int, is_symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": is_symmetric}


def _weights(scheme: Scheme, act_order: str | None) -> dict[str, Any]:
    grid = scheme.grid
    if isinstance(grid, IntGrid):
        strategy = {"strategy": "group", "group_size": grid.group_size} if grid.group_size else {"strategy": "channel"}
        return {
            **_number("int", grid.bits, grid.is_symmetric),
            **strategy,
            "dynamic": False,
            "actorder": act_order if grid.group_size else None,
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
