"""Everything that is chosen about a compression, as one frozen description. Knows nothing of how it is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from compress.methods.gptq import GptqOptions
from compress.methods.pruning import Pattern, PruningMethod
from compress.schemes import PLAIN, Scheme
from workers.model.weight_format import Matrices

Rounding = Literal["nearest", "gptq"]
Smoothing = Literal["none", "awq", "smoothquant"]


@dataclass(frozen=True, slots=True)
class Pruning:
    """Which weights become zero."""

    method: PruningMethod
    pattern: Pattern


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to each layer, in this order: smoothing, pruning, rounding."""

    scheme: Scheme = PLAIN
    rounding: Rounding = "nearest"
    gptq: GptqOptions = field(default_factory=GptqOptions)
    smoothing: Smoothing = "none"
    pruning: Pruning | None = None
    kept: tuple[str, ...] = ()  # patterns of names of matrices that stay as they are
    has_kv_scales: bool = False  # static scales for an e4m3 KV cache
    has_kv_channels: bool = False  # learned scales and shifts for a packed one
    file_format: str = "compressed-tensors"
    schemes: tuple[tuple[str, Scheme], ...] = ()
    """Of single matrices, by name, in place of `scheme`: what mixed precision chose, or a GGUF's mixture. A product's
    matrices have the same but in a GGUF."""
    has_importances: bool = False  # in a GGUF errors weigh by the inputs that calibration saw

    @property
    def needs_hessian(self) -> bool:
        """Whether inputs are multiplied with each other while calibration runs."""
        is_sparsegpt = self.pruning is not None and self.pruning.method == "sparsegpt"
        is_low_rank = any(scheme.is_low_rank for scheme in self._all_schemes)
        return self.rounding == "gptq" or self.smoothing == "awq" or is_sparsegpt or is_low_rank

    @property
    def needs_calibration(self) -> bool:
        """Whether any input is looked at."""
        sees_inputs = any(scheme.needs_calibration for scheme in self._all_schemes)
        is_wanda = self.pruning is not None and self.pruning.method == "wanda"
        sees_inputs = sees_inputs or self.has_kv_scales or self.has_kv_channels or self.has_importances
        return self.needs_hessian or self.smoothing != "none" or is_wanda or sees_inputs

    @property
    def _all_schemes(self) -> set[Scheme]:
        return {self.scheme, *(scheme for _, scheme in self.schemes)}

    def scheme_of(self, matrices: Matrices, name: str = "") -> Scheme:
        """What these are stored by. name: of one of them; else it is the first."""
        if any(re.search(pattern, each) for pattern in self.kept for each in matrices.names):
            return PLAIN
        return self._by_name().get(name or matrices.names[0], self.scheme)

    def scheme_of_table(self, name: str) -> Scheme:
        """What the embedding or the head is stored by."""
        if any(re.search(pattern, name) for pattern in self.kept):
            return PLAIN
        return self._by_name().get(name, PLAIN)

    def _by_name(self) -> Mapping[str, Scheme]:
        return dict(self.schemes)

    def check(self, matrices: Matrices) -> None:
        """Raise CompressError, naming a matrix, unless these can be compressed so."""
        grid = self.scheme_of(matrices).grid
        for name, outputs in matrices.tensors():
            if grid is not None:
                grid.check(name, outputs, matrices.inputs)
            if self.pruning is not None:
                self.pruning.pattern.check(name, matrices.inputs)
