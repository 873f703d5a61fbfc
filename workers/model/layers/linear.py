"""A product whose inputs are split over tensor-parallel ranks (Shoeybi et al., "Megatron-LM", arXiv:1909.08053).

Each rank multiplies its share and the partial results are added up. Knows nothing of how weights are stored: the
products themselves are those of a weight format.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.quantise import Scheme
from workers.model.arithmetic import Arithmetic
from workers.model.weight_format import Linear, Quantised


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """As Linear; the result is whole on every rank."""

    share: Linear
    arithmetic: Arithmetic
    bias: Tensor | None  # added once, after the sum

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return self.share.input_scheme

    @property
    def output_sizes(self) -> list[int]:
        """As in Linear."""
        return self.share.output_sizes

    @property
    def kind(self) -> str:
        """As in Linear."""
        return self.share.kind

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        y = self.arithmetic.all_reduce(self.share(x))
        return y if self.bias is None else y + self.bias
