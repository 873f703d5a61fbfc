"""The gated MLP of a decoder layer, each rank with its share of the width. Knows nothing of how its
weights are stored."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

import kernels
from kernels.quantise import Scheme
from workers.model.layers.moe import MixtureOfExperts
from workers.model.layers.source import LayerSource
from workers.model.parts import ExpertsConfig, MlpConfig
from workers.model.weight_format import Quantised


class Mlp(Protocol):
    """What a decoder layer has behind its attention."""

    @property
    def input_scheme(self) -> Scheme | None:
        """What x should come quantised by; None: as it is."""

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """[tokens, hidden_size] -> the same shape, whole on every rank."""


class SwiGlu:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, source: LayerSource, prefix: str, config: MlpConfig) -> None:
        self.gate_up = source.linear(config.gate_up(prefix, source.model.hidden_size))
        self.down = source.linear(config.down(prefix, source.model.hidden_size))
        self.input_scheme = self.gate_up.input_scheme

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Mlp."""
        scheme = self.down.input_scheme
        if scheme is None:
            return self.down(kernels.swiglu(self.gate_up(x)))
        values, scales = kernels.swiglu_quantised(self.gate_up(x), scheme)
        return self.down(Quantised(values, scales, scheme))


def make_mlp(source: LayerSource, prefix: str, config: MlpConfig | ExpertsConfig) -> Mlp:
    """The one that the config describes."""
    if isinstance(config, ExpertsConfig):
        return MixtureOfExperts(source, prefix, config)
    return SwiGlu(source, prefix, config)
