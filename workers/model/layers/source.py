"""What the layers of one rank are made from: weights, arithmetic, and what several layers share.

Knows nothing of any particular layer, family or weight format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from workers.errors import ModelError
from workers.model.arithmetic import Arithmetic
from workers.model.config import ModelConfig
from workers.model.layers.linear import SummedLinear
from workers.model.layers.rope import rope_table
from workers.model.loader import Weights
from workers.model.lora.experts import adapted_experts
from workers.model.lora.linear import LoraLinear
from workers.model.lora.slots import LoraSlots
from workers.model.parts import RopeConfig
from workers.model.weight_format import ExpertMatrices, Experts, Linear, Matrices, Part, Split


class LayerSource:
    """One rank's checkpoint, as its layers ask for it."""

    def __init__(
        self, model: ModelConfig, weights: Weights, arithmetic: Arithmetic, lora: LoraSlots | None = None
    ) -> None:
        """lora: with it, products take adapters."""
        self.model = model
        self.arithmetic = arithmetic
        self._weights = weights
        self._lora = lora
        self._tables: dict[Hashable, Tensor] = {}
        self.num_linears_by_kind: Counter[str] = Counter()

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor:
        """A tensor in the dtype that is computed in, or a part of it; `shape` is the whole tensor's."""
        return self._weights.read(name, shape, part)

    def stored_scale(self, names: Sequence[str]) -> Tensor | None:
        """The first of these tensors that the checkpoint has, fp32 [1] or [one of each head]; None: it has none."""
        for name in names:
            shape = self._weights.shape_of(name)
            if shape is not None:
                scale = self._weights.read(name, shape, as_stored=True).float().cpu().reshape(-1)
                if not bool((scale > 0).all()):
                    raise ModelError(f"{name}: a scale must be positive")
                return scale
        return None

    def optional_numbers(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor | None:
        """fp32, whatever is computed in; None: the checkpoint has no such tensor."""
        if self._weights.shape_of(name) is None:
            return None
        return self._weights.read(name, shape, part, as_stored=True).float()

    def linear(self, matrices: Matrices) -> Linear:
        """The product with some matrices, of which the rank has its share. Where the inputs are split, the sum over the
        ranks is made."""
        bias = self._bias(matrices) if matrices.has_bias else None
        is_summed = matrices.split is Split.INPUTS and self.arithmetic.shard.tp > 1
        own_bias = None if is_summed else bias
        linear = self.model.weight_format.linear(matrices, self._weights, self.arithmetic, own_bias)
        self.num_linears_by_kind[linear.kind] += 1
        if self._lora is not None:
            linear = LoraLinear(linear, self._lora, matrices, self.arithmetic.shard)
        return SummedLinear(linear, self.arithmetic, bias) if is_summed else linear

    def vocab_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of the embedding or the head, [rows, hidden_size]."""
        shape = (self.model.vocab_size, self.model.hidden_size)
        return self.model.weight_format.table(name, shape, rows, self._weights)

    def _bias(self, matrices: Matrices) -> Tensor:
        pieces = matrices.pieces(self.arithmetic.shard)
        return torch.cat([self.tensor(piece.name + ".bias", (piece.num_rows,), piece.part[:1]) for piece in pieces])

    def experts(self, experts: ExpertMatrices) -> Experts:
        """The rank's share of all experts."""
        found = self.model.weight_format.experts(experts, self._weights, self.arithmetic)
        return found if self._lora is None else adapted_experts(found, self._lora, experts, self.arithmetic.shard)

    def rope_table(self, rope: RopeConfig, head_dim: int) -> Tensor:
        """As in workers.model.layers.rope; layers that turn alike share one."""
        positions, device = self.model.max_position_embeddings, self.arithmetic.groups.device
        return self.shared_table((rope, head_dim), lambda: rope_table(rope, head_dim, positions, device))

    def shared_table(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, which is called once for each key."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]
