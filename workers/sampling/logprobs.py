"""Logprobs of chosen and of most likely tokens: the log-softmax of the model's logits, before anything changes them.

A row of numbers per row of logits that asks: the chosen token's logprob, then ids, then logprobs of the most likely
ones. All rows have as many as the one that asks for most. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.parallel import ParallelGroups
from workers.sampling.params import SamplingRows, TokenLogprobs


def shape_of(sampling: SamplingRows) -> tuple[int, int]:
    """Rows and columns of the numbers."""
    num_rows = int(sampling.has_logprobs.sum())
    return num_rows, 1 + 2 * int(sampling.num_top_logprobs.max(initial=0))


def of_rows(
    logits: Tensor, token_ids: Tensor, sampling: SamplingRows, groups: ParallelGroups, vocab_size: int
) -> Tensor:
    """fp64, shape_of(sampling). logits: [rows, vocab / tp], this rank's share, as the model left them.

    token_ids: int64 [rows], those chosen. On all ranks of the stage at once.
    """
    num_top = (shape_of(sampling)[1] - 1) // 2
    at = torch.from_numpy(np.flatnonzero(sampling.has_logprobs)).to(logits.device)
    whole = groups.all_gather(logits[at].float()).transpose(0, 1).flatten(1)[:, :vocab_size].double()
    logs = torch.log_softmax(whole, dim=-1)
    chosen = logs.gather(1, token_ids[at].clamp(min=0)[:, None])
    top = logs.topk(min(num_top, vocab_size), dim=-1)
    return torch.cat((chosen, top.indices.double(), top.values), dim=1)


def read(numbers: Sequence[Sequence[float]], sampling: SamplingRows) -> list[TokenLogprobs | None]:
    """One per row of logits; each row gets as many of the most likely tokens as it asked for."""
    rows = iter(numbers)
    found: list[TokenLogprobs | None] = []
    for has_logprobs, num_top in zip(sampling.has_logprobs.tolist(), sampling.num_top_logprobs.tolist(), strict=True):
        if not has_logprobs:
            found.append(None)
            continue
        first, *rest = next(rows)
        half = len(rest) // 2
        found.append(TokenLogprobs(first, [int(i) for i in rest[:half][:num_top]], rest[half:][:num_top]))
    return found
