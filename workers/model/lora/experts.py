"""A mixture of experts to which the adapters of a step's rows are added, expert by expert.

What an adapter adds before the gate changes everything behind it. So rows whose adapter has matrices of experts are
computed by themselves, from the dense weights; all others take the usual way. Knows nothing of routers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.lora.slots import LoraSlots, LowRank, Place
from workers.model.products.dense import DenseExperts
from workers.model.weight_format import ExpertMatrices, Experts, Split
from workers.parallel import Shard

_PER_EXPERT = 3  # gate, up, down
_PACKED = "the experts' weights are multiplied in a packed form, which takes no adapters"


def adapted_experts(base: Experts, slots: LoraSlots, experts: ExpertMatrices, shard: Shard) -> Experts:
    """The experts with adapters where their weights allow it; else the same ones, and such adapters are refused."""
    if isinstance(base, DenseExperts):
        return LoraExperts(base, slots, experts, shard)
    for name in (*experts.gates, *experts.ups, *experts.downs):
        slots.refuse(name, _PACKED)
    return base


class _Space:
    """For all slots, taken at the start: within the steps there may be none left."""

    def __init__(self, base: DenseExperts, slots: LoraSlots) -> None:
        num_experts, hidden, width = base.down.shape
        rows = (slots.sizes.num_slots, num_experts, _PER_EXPERT, slots.sizes.max_rank)
        self._width = torch.zeros(*rows, width, dtype=slots.dtype, device=slots.device)
        self._hidden = torch.zeros(*rows, hidden, dtype=slots.dtype, device=slots.device)

    def put(self, slot: int, index: int, part: LowRank) -> LowRank:
        """A copy of a matrix's part in its place, of as many rows as it has."""
        expert, which = divmod(index, _PER_EXPERT)
        inner, outer = self._width[slot, expert, which], self._hidden[slot, expert, which]
        down, up = (inner, outer) if which == 2 else (outer, inner)  # the third is the one that reads the width
        rank = len(part.down)
        return LowRank(down[:rank].copy_(part.down, non_blocking=True), up[:rank].copy_(part.up, non_blocking=True))


class LoraExperts:
    """As Experts."""

    def __init__(self, base: DenseExperts, slots: LoraSlots, experts: ExpertMatrices, shard: Shard) -> None:
        self._base, self._slots = base, slots
        self._parts: dict[int, Mapping[int, LowRank]] = {}  # by slot; of those that have some: views of _space
        self._space = _Space(base, slots)
        product = slots.add(self)
        for number, matrices in enumerate(experts.as_matrices()):  # of each expert: gate and up, then down
            first = number // 2 * _PER_EXPERT + (2 if matrices.split is Split.INPUTS else 0)
            for index, piece in enumerate(matrices.pieces(shard), first):
                rows, columns = piece.part if len(piece.part) > 1 else (piece.part[0], slice(0, matrices.inputs))
                slots.add_place(piece.name, Place(product, index, piece.num_rows, matrices.inputs, rows, columns))

    def put(self, slot: int, parts: Mapping[int, LowRank]) -> None:
        """As in Adapted."""
        self._parts.pop(slot, None)
        if parts:
            self._parts[slot] = {index: self._space.put(slot, index, part) for index, part in parts.items()}

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As in Experts."""
        y = self._base(x, expert_ids, weights)
        rows = self._slots.rows
        if rows is not None:
            for slot, index in rows.segments:
                if (parts := self._parts.get(slot)) is not None:
                    y[index] = self._adapted(x[index], expert_ids[index], weights[index], parts)
        return y

    def _adapted(self, x: Tensor, expert_ids: Tensor, weights: Tensor, parts: Mapping[int, LowRank]) -> Tensor:
        total = torch.zeros(len(x), x.shape[1], dtype=torch.float32, device=x.device)
        for expert in expert_ids.unique().tolist():
            token, k = (expert_ids == expert).nonzero().unbind(1)
            rows, first = x[token], expert * _PER_EXPERT
            gate, up = F.linear(rows, self._base.gate_up[expert]).chunk(2, dim=-1)
            gate, up = _added(gate, rows, parts.get(first)), _added(up, rows, parts.get(first + 1))
            hidden = F.silu(gate) * up
            out = _added(F.linear(hidden, self._base.down[expert]), hidden, parts.get(first + 2))
            total.index_add_(0, token, out.float() * weights[token, k, None])
        return total.to(x.dtype)


def _added(y: Tensor, x: Tensor, part: LowRank | None) -> Tensor:
    return y if part is None else y + F.linear(x, part.down) @ part.up
