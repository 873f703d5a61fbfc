"""Rows that come in 8 bits are scaled back for what an adapter adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.lora import LoraRows
from kernels.quantise import Scheme, quantise
from workers.model.lora.linear import LoraLinear
from workers.model.lora.slots import LoraSizes, LoraSlots, LowRank
from workers.model.weight_format import Matrices, Quantised
from workers.parallel import Shard


class _Zeros:
    """A product whose weights are 0: what comes out is what an adapter adds."""

    output_sizes = [24, 16]  # noqa: RUF012 - as in Linear
    input_scheme = None
    kind = "zeros"

    def __call__(self, x: torch.Tensor | Quantised) -> torch.Tensor:
        return torch.zeros(len(x.values if isinstance(x, Quantised) else x), 40)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8 groups"])
def test_what_is_added_is_that_of_the_rounded_rows(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = LoraSlots(LoraSizes(2, 4), torch.float32, torch.device("cpu"), range(1), 1)
    linear = LoraLinear(_Zeros(), slots, Matrices(("q", "k"), (24, 16), 200), Shard())
    parts = {
        index: LowRank(torch.randn(3, 200, generator=generator), torch.randn(3, size, generator=generator))
        for index, size in enumerate((24, 16))
    }
    linear.put(1, parts)
    x = torch.randn(5, 200, generator=generator)
    values, scales = quantise(x, scheme)
    slots.rows = LoraRows.of(np.array([1, -1, 1, 0, 1], np.int32))
    found = linear(Quantised(values, scales, scheme))
    exact = torch.cat([x @ part.down.T @ part.up for part in parts.values()], dim=1)
    assert torch.equal(found[[1, 3]], torch.zeros(2, 40)), "no slot, and an empty one"
    error = (found - exact)[[0, 2, 4]].norm() / exact[[0, 2, 4]].norm()
    assert 0 < error < 0.05
    slots.rows = None
    assert torch.equal(linear(x), torch.zeros(5, 40))
