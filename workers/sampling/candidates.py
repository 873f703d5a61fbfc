"""The best tokens at a position with the noise of the choice there, of which the sampler takes the first.

A drafter that offers several tokens offers the K best of log q plus the noise that the model's own choice will be made
with: the first is what the drafter would have proposed alone, and the others are those that it was close to. That is
Gumbel top-k (Kool et al., arXiv 1903.06059), as RSD draws drafts (arXiv 2402.14160), but with the model's noise. Knows
nothing of trees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.philox import gumbel, uniform_words_at
from workers.sampling.cpu_choice import Positions, left_tokens
from workers.sampling.params import NO_TOKEN, SamplingRows
from workers.sampling.sampler import masked_typical


def best_candidates(logits: Tensor, sampling: SamplingRows, positions: Positions, num_candidates: int) -> Tensor:
    """int64 [rows, num_candidates], the best first, and the smaller id first where two are as good.

    logits: [rows, vocab], on a CPU. positions: of the tokens in their completions. Rows that sample among fewer tokens
    than are wanted, or that have fewer finite logits, end in NO_TOKEN. The first of each row is what the sampler
    chooses from the same logits (workers.sampling.sampler).
    """
    scores = masked_typical(logits.float(), sampling).double()
    rows = np.flatnonzero(sampling.temperature > 0)
    if rows.size:
        at = torch.from_numpy(rows)
        part = sampling.of(rows)
        scaled = scores[at] / torch.from_numpy(part.temperature)[:, None]
        is_left = left_tokens(scaled, part)
        seeds = torch.from_numpy(part.seed.view(np.int64))[:, None]
        ids = torch.arange(scaled.shape[1]).expand_as(scaled)
        noise = gumbel(uniform_words_at(seeds, torch.from_numpy(positions[rows])[:, None], ids))
        scores[at] = (scaled + noise).masked_fill(~is_left, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True)
    count = min(num_candidates, scores.shape[1])
    found = best.indices[:, :count].masked_fill(~best.values[:, :count].isfinite(), NO_TOKEN)
    return torch.nn.functional.pad(found, (0, num_candidates - count), value=NO_TOKEN)
