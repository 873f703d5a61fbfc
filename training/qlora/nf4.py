"""Matrices in NF4 with double quantization, in the tensors of bitsandbytes and read back by the engine's own reader.

A base that is trained on is thus the base that a server has, should it be stored so. Knows nothing of models.
"""

from __future__ import annotations

import json
from functools import cache

import torch
from torch import Tensor

from compress.formats.words import pack_halves
from compress.grids.floating import NF4, Nf4Grid, nf4_codes
from compress.stored import HeldTensors
from workers.model.quant.bitsandbytes import FourBitStorage
from workers.model.quant.storage import Cut
from workers.model.quant.weights import QuantWeight

_NESTED_BLOCK = 256  # scales with one scale
_STORAGE = FourBitStorage("nf4", is_double=True)


@cache
def dynamic_map() -> Tensor:
    """fp32 [256], rising: seven decades with ever more numbers in each, both signs, 0 and 1 (arXiv:1511.04561)."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2
        numbers += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(numbers))


def nested(scales: Tensor) -> tuple[Tensor, Tensor, float]:
    """fp32 [blocks] -> uint8 codes, fp32 scales of each 256, and what is added to all."""
    offset = float(scales.mean())
    padded = torch.nn.functional.pad(scales - offset, (0, -len(scales) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    largest = padded.abs().amax(1).clamp(min=1e-12)
    levels = dynamic_map()
    codes = torch.bucketize(padded / largest[:, None], (levels[1:] + levels[:-1]) / 2)
    return codes.flatten()[: len(scales)].to(torch.uint8), largest, offset


def encoded(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Tensors by their whole names. weight: fp32 [outputs, inputs]. Raises CompressError where inputs do not fit."""
    outputs, inputs = weight.shape
    grid = Nf4Grid()
    grid.check(name, outputs, inputs)
    absmax = grid.fit(weight, weight, torch.float32).values
    codes, scales, offset = nested(absmax.flatten())
    # Codes are chosen by the exact scale, as bitsandbytes does; only then is the scale rounded.
    halves = nf4_codes((weight.unflatten(1, (-1, grid.group_size)) / absmax.unsqueeze(-1)).flatten(1))
    state = {
        "quant_type": "nf4",
        "blocksize": grid.group_size,
        "dtype": "bfloat16",
        "shape": [outputs, inputs],
        "nested_blocksize": _NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return {
        f"{name}.weight": pack_halves(halves, high_first=True).reshape(-1, 1),
        f"{name}.weight.absmax": codes,
        f"{name}.weight.quant_map": torch.tensor(NF4),
        f"{name}.weight.nested_absmax": scales,
        f"{name}.weight.nested_quant_map": dynamic_map(),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def quantized(name: str, weight: Tensor) -> QuantWeight:
    """As a server that reads `encoded` holds the matrix."""
    outputs, inputs = weight.shape
    cut = Cut(name, outputs, inputs, slice(0, outputs), slice(0, inputs))
    return _STORAGE.read(HeldTensors(encoded(name, weight)), cut)
