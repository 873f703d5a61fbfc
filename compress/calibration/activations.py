"""How inputs are rounded before a product, as a server of the compressed model will: for measuring its loss.

Knows nothing of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.grids.floating import FP8_MOST, round_e4m3
from compress.grids.grid import grouped

_SMALLEST = 1e-12
_INT8_MOST = 127.0


@dataclass(frozen=True, slots=True)
class ActivationRounding:
    """8-bit numbers times a scale."""

    kind: Literal["int8", "fp8"]
    scale_per: Literal["token", "tensor", "group"]  # group: 128 columns of a token; tensor: a scale from calibration
    exact_from: float = 0.0
    """Numbers of this size or more stay as they are; 0: none. LLM.int8 (arXiv:2208.07339) leaves the whole column, of
    whatever tokens are beside each other; the engine leaves the number, so that a row does not depend on others."""

    def round(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """fp32 or 16-bit rows. scale: fp32 [], of all tokens, where scale_per is tensor."""
        wide = x.float()
        if not self.exact_from:
            return self._round(wide, scale).to(x.dtype)
        is_exact = wide.abs() >= self.exact_from
        return torch.where(is_exact, wide, self._round(wide.masked_fill(is_exact, 0.0), scale)).to(x.dtype)

    def _round(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.scale_per == "group":
            groups = grouped(x, 128)
            return self._snap(groups, self.scale_of(groups)).flatten(1)[:, : x.shape[1]]
        if self.scale_per == "tensor":
            assert scale is not None
            return self._snap(x, scale)
        return self._snap(x, self.scale_of(x))

    def scale_of(self, x: Tensor) -> Tensor:
        """By the largest magnitude of each row."""
        return (x.abs().amax(-1, keepdim=True) / self._most).clamp(min=_SMALLEST)

    @property
    def _most(self) -> float:
        return FP8_MOST if self.kind == "fp8" else _INT8_MOST

    def _snap(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.kind == "fp8":
            return round_e4m3(x / scale) * scale
        return (x / scale).round().clamp(-self._most, self._most) * scale
