"""GPUs by name: what their makers' data sheets say of memory and of dense arithmetic. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks; a rate of 0: it has no such arithmetic, and the numbers are widened first."""

    memory_bytes: float
    memory_bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float
    int8_ops_per_s: float

    def flops_per_s(self, unit: str) -> float:
        """Of bf16, fp8 or int8 operands."""
        rates = {"bf16": self.bf16_flops_per_s, "fp8": self.fp8_flops_per_s, "int8": self.int8_ops_per_s}
        return rates[unit] or self.bf16_flops_per_s


GPUS: Mapping[str, Gpu] = {
    "a10": Gpu(24e9, 600e9, 125e12, 0.0, 250e12),
    "a100-80gb": Gpu(80e9, 2.04e12, 312e12, 0.0, 624e12),
    "l40s": Gpu(48e9, 864e9, 362e12, 733e12, 733e12),
    "rtx4090": Gpu(24e9, 1.01e12, 165e12, 330e12, 661e12),
    "h100-80gb": Gpu(80e9, 3.35e12, 989e12, 1979e12, 1979e12),
    "h200": Gpu(141e9, 4.8e12, 989e12, 1979e12, 1979e12),
    "b200": Gpu(180e9, 7.7e12, 2250e12, 4500e12, 4500e12),
}
