"""The table of rotary embeddings (arXiv:2104.09864) in the Hugging Face layout: halves lie one behind the other.

Knows nothing of layers: who turns alike shares a table (workers.model.layers.source).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.parts import RopeConfig, RopeScaling


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """fp32 [num_positions, head_dim]: cosines in the first half of a row, sines in the second."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_scaling is not None:
        inv_freq = _scale_llama3(inv_freq, rope.rope_scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _scale_llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (arXiv:2407.21783)."""
    old = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    ramp = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    mixed = (1 - ramp) * inv_freq / scaling.factor + ramp * inv_freq
    mixed = torch.where(wavelength > old / low, inv_freq / scaling.factor, mixed)
    return torch.where(wavelength < old / high, inv_freq, mixed)
