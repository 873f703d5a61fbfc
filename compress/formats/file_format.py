"""What a file format does: write matrices, and the quantization_config that says how they are stored.

The way back is the engine's own reader of that config (workers.model.quant), so no format is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.rounded import RoundedMatrix
from compress.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint has."""

    groups: Mapping[Scheme, list[str]]  # names of matrices by their scheme
    plain: list[str]  # names of those that stay as they are
    act_order: str  # of GPTQ: none, static, permuted; "none" too where nothing was rounded by it
    has_kv_scales: bool
    shapes: Mapping[str, tuple[int, int]]  # [outputs, inputs] of each matrix

    @property
    def only_scheme(self) -> Scheme:
        """Of a format that can say one."""
        return next(iter(self.groups))


class FileFormat(Protocol):
    """A module of this package is one."""

    def check(self, scheme: Scheme) -> None:
        """Raise CompressError for a scheme that cannot be written."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, for a checkpoint of this dtype."""

    def encode(self, matrix: RoundedMatrix, dtype: torch.dtype, input_scale: Tensor | None) -> dict[str, Tensor]:
        """Tensors by the part of their names behind the matrix's. dtype: the checkpoint's."""

    def quantization_config(self, contents: Contents) -> dict[str, Any]:
        """Of config.json. Raises CompressError for contents that it cannot say."""
