"""Block types whose codes are looked up in a grid of points with four or eight coordinates: the others of ggml's IQ.

The grids cannot be derived: their author chose those points near which weights of real models lie. They stand in
iq_grids.npz, which make_iq_grids.py has taken from the package `gguf` (llama.cpp, MIT; see iq_grids.LICENSE).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.model.quant.gguf_blocks.fields import half, in_turn, signs, spread, words

_IQ1_DELTA = 0.125


@cache
def grid_points(name: str, device: torch.device) -> Tensor:
    """fp32 [points, coordinates]."""
    with np.load(Path(__file__).with_name("iq_grids.npz")) as grids:
        return torch.from_numpy(grids[name]).to(device=device, dtype=torch.float32)


@cache
def sign_bytes(device: torch.device) -> Tensor:
    """uint8 [128]: seven signs, and an eighth that makes the number of minus signs even."""
    index = torch.arange(128)
    parity = sum((index >> bit) & 1 for bit in range(7)) & 1
    return (index | (parity << 7)).to(device=device, dtype=torch.uint8)


def _points(name: str, codes: Tensor) -> Tensor:
    """int [n, m] -> fp32 [n, m * coordinates]."""
    return grid_points(name, codes.device)[codes].flatten(1)


def _scaled(scales: Tensor, values: Tensor) -> Tensor:
    """[n, groups] times [n, block_size]."""
    return (scales.unsqueeze(-1) * values.view(*scales.shape, -1)).flatten(1)


def _packed_signs(packed: Tensor) -> Tensor:
    """Of 32-bit words with four times seven signs: int64 [n, m] -> fp32 [n, m * 32]."""
    index = (packed.unsqueeze(-1) >> torch.tensor([0, 7, 14, 21], device=packed.device)) & 127
    return signs(sign_bytes(packed.device)[index].flatten(1))


def _high_bits(data: Tensor, bits: int, parts: int) -> Tensor:
    """The first parts of each byte, as the bits above eight: uint8 [n, m] -> int64 [n, m * parts]."""
    return (spread(data.unsqueeze(-1), bits)[:, :, :parts, 0].long() << 8).flatten(1)


def _iq2_xxs(blocks: Tensor) -> Tensor:
    packed = words(blocks[:, 2:], 4).view(-1, 8, 2)
    scales = half(blocks, 0) * (0.5 + (packed[..., 1] >> 28).float()) * 0.25
    codes = blocks[:, 2:].reshape(-1, 8, 8)[..., :4].flatten(1).long()
    return _scaled(scales, _points("iq2_xxs", codes)) * _packed_signs(packed[..., 1])


def _iq2_xs(blocks: Tensor) -> Tensor:
    packed = words(blocks[:, 2:66], 2)
    scales = half(blocks, 0) * (0.5 + in_turn(blocks[:, 66:], 4).float()) * 0.25
    turned = signs(sign_bytes(blocks.device)[packed >> 9])
    return _scaled(scales, _points("iq2_xs", packed & 511)) * turned


def _iq2_s(blocks: Tensor) -> Tensor:
    codes = blocks[:, 2:34].long() | _high_bits(blocks[:, 66:74], 2, 4)
    scales = half(blocks, 0) * (0.5 + in_turn(blocks[:, 74:], 4).float()) * 0.25
    return _scaled(scales, _points("iq2_s", codes)) * signs(blocks[:, 34:66])


def _iq3_xxs(blocks: Tensor) -> Tensor:
    packed = words(blocks[:, 66:], 4)
    scales = half(blocks, 0) * (0.5 + (packed >> 28).float()) * 0.5
    return _scaled(scales, _points("iq3_xxs", blocks[:, 2:66].long())) * _packed_signs(packed)


def _iq3_s(blocks: Tensor) -> Tensor:
    codes = blocks[:, 2:66].long() | _high_bits(blocks[:, 66:74], 1, 8)
    scales = half(blocks, 0) * (1 + 2 * in_turn(blocks[:, 106:], 4).float())
    return _scaled(scales, _points("iq3_s", codes)) * signs(blocks[:, 74:106])


def _iq1_s(blocks: Tensor) -> Tensor:
    high = words(blocks[:, 34:], 2)
    scales = half(blocks, 0) * (2 * ((high >> 12) & 7) + 1).float()
    delta = torch.where(high & 0x8000 == 0, _IQ1_DELTA, -_IQ1_DELTA)
    above = (high.unsqueeze(-1) >> torch.tensor([0, 3, 6, 9], device=blocks.device)) & 7
    points = _points("iq1_s", blocks[:, 2:34].long() | (above << 8).flatten(1))
    return _scaled(scales, (points.view(-1, 8, 32) + delta.unsqueeze(-1)).flatten(1))


def _iq1_m(blocks: Tensor) -> Tensor:
    """A block's scale stands in four parts, above the scales of its groups."""
    packed = words(blocks[:, 48:], 2)
    whole = ((packed >> 12) << torch.tensor([0, 4, 8, 12], device=blocks.device)).sum(-1, keepdim=True)
    scale = whole.to(torch.int16).view(torch.float16).float()
    groups = (packed.unsqueeze(-1) >> torch.tensor([0, 3, 6, 9], device=blocks.device)) & 7
    scales = scale * (2 * groups.flatten(1) + 1).float()
    high = in_turn(blocks[:, 32:48], 4)
    delta = torch.where(high & 8 == 0, _IQ1_DELTA, -_IQ1_DELTA)
    points = _points("iq1_s", blocks[:, :32].long() | ((high & 7).long() << 8))
    return _scaled(scales, (points.view(-1, 32, 8) + delta.unsqueeze(-1)).flatten(1))


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
"""By type: uint8 [n, block_bytes] -> fp32 [n, block_size]."""
