"""The rows of a product as its 8-bit kernel takes them: rounded, unless the layer before did it, and padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantise import FP8, Scheme, narrow, quantise
from workers.model.quant.weights import InputChange, StaticScale
from workers.model.weight_format import Quantised


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """How rows are made ready."""

    scheme: Scheme
    inputs_change: InputChange
    num_added_inputs: int = 0  # zeros behind each row: the kernel takes multiples of a size
    input_scale: StaticScale | None = None  # in place of a scale per row

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear: what the layer before may round by."""
        is_plain = self.input_scale is None and not self.inputs_change and not self.num_added_inputs
        return self.scheme if is_plain else None

    def __call__(self, x: Tensor | Quantised) -> tuple[Tensor, Tensor]:
        """[rows, inputs] -> the same in 8 bits, padded, and fp32 scales [rows, scales per row]."""
        values, scales = (x.values, x.scales) if isinstance(x, Quantised) else self._rounded(self.inputs_change(x))
        if self.num_added_inputs:  # as bytes: 8-bit floats cannot be padded
            values = F.pad(values.view(torch.uint8), (0, self.num_added_inputs)).view(values.dtype)
        return values, scales

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.input_scale is None:
            return quantise(x.float(), self.scheme)
        scaled = x.float() / self.input_scale.scale
        values = scaled.round().clamp(-128, 127).to(torch.int8) if self.scheme == "int8" else narrow(scaled, FP8)
        return values, torch.full((len(x), 1), self.input_scale.scale, device=x.device)
