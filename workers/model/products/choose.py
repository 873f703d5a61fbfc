"""Which product a rank's weights get. Weights with the same rows are joined into one where their kinds allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantise import Scheme
from workers.errors import ModelError
from workers.model.arithmetic import Arithmetic
from workers.model.products.dense import DenseExperts, dense_linear
from workers.model.products.fp8 import fp8_linear
from workers.model.products.fp8_experts import Fp8Experts
from workers.model.products.grouped import grouped_linear, is_dequantized, kind_of
from workers.model.products.grouped_experts import GroupedExperts
from workers.model.products.int8 import int8_linear
from workers.model.products.low_rank import low_rank_linear
from workers.model.products.sparse24 import has_sparse_product, sparse24_linear
from workers.model.quant.weights import (
    DenseWeight,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    LowRankWeight,
    QuantWeight,
    Sparse24Weight,
    joined,
)
from workers.model.weight_format import Experts, Linear, Quantised


def linear_of(shares: Sequence[QuantWeight], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None) -> Linear:
    """The product with a rank's shares of some matrices, for rows of `dtype`. bias: [sum of their outputs]."""
    sizes = [share.num_outputs for share in shares]
    whole = joined(shares)
    if whole is None:  # several types of a GGUF, say
        shares = [_as_multiplied(share, dtype, arithmetic) for share in shares]
        whole = joined(shares)
    if whole is not None:
        return _linear(whole, sizes, dtype, arithmetic, bias)
    biases: Sequence[Tensor | None] = [None] * len(shares) if bias is None else bias.split(sizes)
    each = [
        _linear(share, [size], dtype, arithmetic, part) for share, size, part in zip(shares, sizes, biases, strict=True)
    ]
    return SideBySide(each, sizes)


def _as_multiplied(weight: QuantWeight, dtype: torch.dtype, arithmetic: Arithmetic) -> QuantWeight:
    """As dense numbers, where those are what is multiplied."""
    if isinstance(weight, GroupedWeight) and is_dequantized(weight, dtype, arithmetic):
        return DenseWeight(weight.dense(dtype), stored_as=kind_of(weight))
    if isinstance(weight, Sparse24Weight) and not has_sparse_product(dtype, arithmetic):
        return DenseWeight(weight.dense(dtype), stored_as="2:4")
    return weight


def _linear(
    weight: QuantWeight, sizes: list[int], dtype: torch.dtype, arithmetic: Arithmetic, bias: Tensor | None
) -> Linear:
    match weight:
        case DenseWeight():
            return dense_linear(weight, sizes, dtype, arithmetic, bias)
        case GroupedWeight():
            return grouped_linear(weight, sizes, dtype, arithmetic, bias)
        case Int8Weight():
            return int8_linear(weight, sizes, dtype, arithmetic, bias)
        case Fp8Weight():
            return fp8_linear(weight, sizes, dtype, arithmetic, bias)
        case Sparse24Weight():
            return sparse24_linear(weight, sizes, dtype, arithmetic, bias)
        case LowRankWeight():
            return low_rank_linear(weight, sizes, dtype, arithmetic, bias)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Products with the same rows that are made one after the other: their weights are of several kinds."""

    parts: list[Linear]
    output_sizes: list[int]
    input_scheme: Scheme | None = None

    @property
    def kind(self) -> str:
        """As in Linear."""
        return " and ".join(dict.fromkeys(part.kind for part in self.parts))

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Linear."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def experts_of(
    gate_ups: Sequence[Sequence[QuantWeight]],
    downs: Sequence[QuantWeight],
    dtype: torch.dtype,
    arithmetic: Arithmetic,
) -> Experts:
    """The products of a rank's shares of all experts: of each the gate and the matrix up, and the matrix down.

    Raises ModelError for what these cannot do.
    """
    if arithmetic.batch_invariant:
        raise ModelError("batch_invariant: a mixture of experts groups its rows by the batch")
    if arithmetic.groups.device.type == "cuda":
        found = Fp8Experts.of(gate_ups, downs) or GroupedExperts.of(gate_ups, downs, dtype)
        if found is not None:
            return found
    gate_up = [torch.cat([part.dense(dtype) for part in expert]) for expert in gate_ups]
    return DenseExperts(torch.stack(gate_up), torch.stack([down.dense(dtype) for down in downs]))
