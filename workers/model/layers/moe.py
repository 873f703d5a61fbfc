"""A mixture of experts in place of an MLP, each rank with its share of every expert's width. Knows
nothing of how the experts' weights are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.layers.source import LayerSource
from workers.model.parts import ExpertsConfig
from workers.model.weight_format import Quantised


class MixtureOfExperts:
    """Each token's best experts by a router, their outputs weighted and added.

    The router is whole on every rank, and in fp32 from its logits on, as in Qwen3MoeSparseMoeBlock.
    """

    input_scheme = None  # the router takes its rows unquantised

    def __init__(self, source: LayerSource, prefix: str, config: ExpertsConfig) -> None:
        hidden = source.model.hidden_size
        self._arithmetic = source.arithmetic
        self._top_k, self._sums_to_one = config.num_experts_per_tok, config.norm_topk_prob
        self._router = source.arithmetic.product(source.tensor(prefix + "gate.weight", (config.num_experts, hidden)))
        self.experts = source.experts(config.matrices(prefix, hidden))

    def __call__(self, x: Tensor | Quantised) -> Tensor:
        """As in Mlp."""
        assert isinstance(x, Tensor)
        chances = torch.softmax(self._router(x).float(), dim=-1)
        weights, experts = chances.topk(self._top_k, dim=-1)
        if self._sums_to_one:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self._arithmetic.all_reduce(self.experts(x, experts.int(), weights))
