"""Llama 3's scaling of the rotary frequencies, which a GGUF has as divisors, one for each frequency (arXiv:2407.21783).

config.json has the parameters that they were computed from: these are found again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _OLD_CONTEXT = 1.0, 4.0, 8192  # of all models of Meta's
_LARGEST_FACTOR = 2.0**20
_TOLERANCE = 1e-4  # relative; they were computed in fp32


def llama3_scaling(divisors: Sequence[float], rope_theta: float) -> dict[str, object] | None:
    """rope_scaling of config.json; {} where nothing is scaled; None where the divisors are of another kind."""
    if all(divisor == 1.0 for divisor in divisors):
        return {}
    if rope_theta < 1 or not all(0.5 < divisor < _LARGEST_FACTOR for divisor in divisors):
        return None
    factor = float(round(max(divisors)))  # of the lowest frequency
    for index, divisor in enumerate(divisors):
        wanted = _divisor(2 * math.pi * rope_theta ** (index / len(divisors)), factor)
        if not abs(divisor - wanted) <= _TOLERANCE * wanted:
            return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _OLD_CONTEXT,
    }


def rope_divisors(scaling: Mapping[str, object], rope_theta: float, head_dim: int) -> list[float] | None:
    """Of a llama3 scaling, one for each frequency; None where llama3_scaling would not find its parameters again."""
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or not 1 <= factor < _LARGEST_FACTOR:
        return None
    count = head_dim // 2
    divisors = [_divisor(2 * math.pi * rope_theta ** (index / count), factor) for index in range(count)]
    again = llama3_scaling(divisors, rope_theta)
    return divisors if again and all(again[key] == scaling.get(key) for key in again if key != "rope_type") else None


def _divisor(wavelength: float, factor: float) -> float:
    if wavelength < _OLD_CONTEXT / _HIGH_FREQ_FACTOR:
        return 1.0
    if wavelength > _OLD_CONTEXT / _LOW_FREQ_FACTOR:
        return factor
    ramp = (_OLD_CONTEXT / wavelength - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    return 1 / ((1 - ramp) / factor + ramp)
