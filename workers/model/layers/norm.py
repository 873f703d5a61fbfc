"""The root-mean-square norm (arXiv:1910.07467), together with the residual sum before it and the rounding after it.

Knows nothing of what the normed rows are for.
"""

from __future__ import annotations

from torch import Tensor

import kernels
from kernels.quantise import Scheme
from workers.model.layers.source import LayerSource
from workers.model.weight_format import Quantised


def _read(source: LayerSource, name: str, width: int) -> Tensor:
    weight, offset = source.tensor(name, (width,)), source.model.norm_offset
    return weight + offset if offset else weight


class RmsNorm:
    """x / rms(x) * (weight + norm_offset) over the hidden size."""

    def __init__(self, source: LayerSource, name: str) -> None:
        self.weight = _read(source, name, source.model.hidden_size)
        self._eps = source.model.rms_norm_eps

    def add(
        self, hidden: Tensor, residual: Tensor | None, scheme: Scheme | None = None
    ) -> tuple[Tensor | Quantised, Tensor]:
        """hidden [tokens, hidden_size] and the residual stream before it, if there is one; returns their normed sum, in
        8 bits if the next product asks for it, and the residual stream after it."""
        if scheme is not None:
            return self._add_quantised(hidden, residual, scheme)
        if residual is None:
            return kernels.rms_norm(hidden, self.weight, self._eps), hidden
        return kernels.add_rms_norm(hidden, residual, self.weight, self._eps)

    def _add_quantised(self, hidden: Tensor, residual: Tensor | None, scheme: Scheme) -> tuple[Quantised, Tensor]:
        if residual is None:
            values, scales = kernels.rms_norm_quantised(hidden, self.weight, self._eps, scheme)
            return Quantised(values, scales, scheme), hidden
        values, scales, total = kernels.add_rms_norm_quantised(hidden, residual, self.weight, self._eps, scheme)
        return Quantised(values, scales, scheme), total


class HeadNorm:
    """The same over each head of queries or keys."""

    def __init__(self, source: LayerSource, name: str, head_dim: int) -> None:
        self._weight = _read(source, name, head_dim)
        self._eps = source.model.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> the same shape."""
        return kernels.rms_norm(x.reshape(-1, x.shape[-1]), self._weight, self._eps).view(x.shape)
