"""The sampler, row by row: how each token of a test is to be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.parallel import ParallelGroups
from workers.sampling.params import SamplingParams, SamplingRows
from workers.sampling.sampler import sample


class Choice(NamedTuple):
    """One row of logits."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int


def choose(logits: Tensor, choices: Sequence[Choice], groups: ParallelGroups, vocab_size: int) -> Tensor:
    """As workers.sampling.sampler.sample."""
    rows = SamplingRows.greedy(len(choices))
    for i, c in enumerate(choices):
        rows.put(i, SamplingParams(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, seed=c.seed))
    positions = np.array([c.position for c in choices], np.int64)
    return sample(logits, rows, positions, groups, vocab_size)


def mask_top_k_top_p(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[vocab]: logits outside the top_k, then outside the smallest set of probability >= top_p, become -inf."""
    if 0 < top_k < len(logits):
        kth = torch.topk(logits, top_k).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = torch.sort(logits, descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        kept = torch.where(before >= top_p, float("-inf"), ordered)
        logits = torch.empty_like(logits).scatter_(0, order, kept)
    return logits
