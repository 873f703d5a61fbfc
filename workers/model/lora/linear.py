"""A product to which the adapters of a step's rows are added. Knows nothing of how its weights are stored.

Tensor-parallel: where the outputs are split, a rank has all of `down` and its rows of `up`; where the inputs are, its
columns of `down` and all of `up`, and what is added is part of the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import kernels
from kernels.quantise import GROUP, Scheme
from workers.model.lora.slots import LoraSlots, LowRank, Place
from workers.model.weight_format import Linear, Matrices, Quantised
from workers.parallel import Shard


class LoraLinear:
    """As Linear; rows of the step that have a slot get what its adapter adds."""

    def __init__(self, base: Linear, slots: LoraSlots, matrices: Matrices, shard: Shard) -> None:
        self._base, self._slots = base, slots
        product = slots.add(self)
        pieces = matrices.pieces(shard)
        for index, piece in enumerate(pieces):
            rows, columns = piece.part if len(piece.part) > 1 else (piece.part[0], slice(0, matrices.inputs))
            slots.add_place(piece.name, Place(product, index, piece.num_rows, matrices.inputs, rows, columns))
        self._sizes = [piece.part[0].stop - piece.part[0].start for piece in pieces]
        assert self._sizes == base.output_sizes
        count, rank, width = slots.sizes.num_slots, slots.sizes.max_rank, columns.stop - columns.start
        self._down = torch.zeros(count, len(pieces) * rank, width, dtype=slots.dtype, device=slots.device)
        self._up = torch.zeros(count, rank, sum(self._sizes), dtype=slots.dtype, device=slots.device)

    @property
    def input_scheme(self) -> Scheme | None:
        """As in Linear."""
        return self._base.input_scheme

    @property
    def output_sizes(self) -> list[int]:
        """As in Linear."""
        return self._base.output_sizes

    @property
    def kind(self) -> str:
        """As in Linear."""
        return self._base.kind

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        y = self._base(x)
        rows = self._slots.rows
        if rows is None:
            return y
        return kernels.add_lora(y, _plain(x, y.dtype), self._down, self._up, rows, self._sizes)

    def put(self, slot: int, parts: Mapping[int, LowRank]) -> None:
        """As in Adapted."""
        down, up, rank = self._down[slot], self._up[slot], self._slots.sizes.max_rank
        down.zero_()
        up.zero_()
        for index, columns in enumerate(up.split(self._sizes, dim=1)):
            if (part := parts.get(index)) is not None:
                used = len(part.down)
                down[index * rank : index * rank + used].copy_(part.down, non_blocking=True)
                columns[:used].copy_(part.up, non_blocking=True)


def _plain(x: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    """The rows that a product gets, without their 8 bits."""
    if isinstance(x, Tensor):
        return x
    scales = x.scales
    if x.scheme == "fp8 groups":
        scales = scales.repeat_interleave(GROUP, dim=1)[:, : x.values.shape[1]]
    return (x.values.float() * scales).to(dtype)
