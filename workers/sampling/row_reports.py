"""What a step reports of its rows beside the tokens: logprobs, or pooled hidden states.

Logprobs are the log-softmax of the model's logits, before anything changes them: the chosen token's, then ids, then
logprobs of the most likely ones. A pooled row is the sum of the normed hidden states of a request's wanted rows, and
belongs to the last of them. All reports of a step are rows of one array of numbers, as wide as the widest needs. Knows
nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.parallel import ParallelGroups
from workers.sampling.params import PooledHidden, RowReport, SamplingRows, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class Reported:
    """Which of a step's wanted rows report something."""

    sampling: SamplingRows
    pooled: npt.NDArray[np.int64]  # [requests, 2]: first and last of the rows that are summed
    hidden_size: int

    @property
    def is_empty(self) -> bool:
        """No row does."""
        return not (len(self.pooled) or self.sampling.has_logprobs.any())

    @property
    def num_logprobs(self) -> int:
        """Rows that report logprobs; those of pooled ones follow."""
        return int(self.sampling.has_logprobs.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """Of the numbers."""
        num_columns = 1 + 2 * int(self.sampling.num_top_logprobs.max(initial=0)) if self.num_logprobs else 0
        if len(self.pooled):
            num_columns = max(num_columns, self.hidden_size)
        return self.num_logprobs + len(self.pooled), num_columns


def numbers_of(
    logits: Tensor,
    hidden: Tensor | None,
    token_ids: Tensor,
    reported: Reported,
    groups: ParallelGroups,
    vocab_size: int,
) -> Tensor:
    """fp64, reported.shape. logits: [rows, vocab / tp], this rank's share, as the model left them.

    hidden: [rows, hidden_size], normed, where rows are pooled. token_ids: int64 [rows], those chosen. On all ranks of
    the stage at once.
    """
    out = torch.zeros(reported.shape, dtype=torch.float64, device=logits.device)
    if reported.num_logprobs:
        found = _logprobs(logits, token_ids, reported.sampling, groups, vocab_size)
        out[: len(found), : found.shape[1]] = found
    for index, (first, last) in enumerate(reported.pooled.tolist(), reported.num_logprobs):
        assert hidden is not None, "pooled rows come with their hidden states"
        out[index, : reported.hidden_size] = hidden[first : last + 1].double().sum(dim=0)
    return out


def _logprobs(
    logits: Tensor, token_ids: Tensor, sampling: SamplingRows, groups: ParallelGroups, vocab_size: int
) -> Tensor:
    num_top = int(sampling.num_top_logprobs.max(initial=0))
    at = torch.from_numpy(np.flatnonzero(sampling.has_logprobs)).to(logits.device)
    whole = groups.all_gather(logits[at].float()).transpose(0, 1).flatten(1)[:, :vocab_size].double()
    logs = torch.log_softmax(whole, dim=-1)
    chosen = logs.gather(1, token_ids[at].clamp(min=0)[:, None])
    top = logs.topk(min(num_top, vocab_size), dim=-1)
    return torch.cat((chosen, top.indices.double(), top.values), dim=1)


def read(numbers: Sequence[Sequence[float]], reported: Reported) -> list[RowReport | None]:
    """One per wanted row; each gets as many of the most likely tokens as it asked for."""
    sampling = reported.sampling
    rows, found = iter(numbers), list[RowReport | None]()
    widest = int(sampling.num_top_logprobs.max(initial=0))
    for has_logprobs, num_top in zip(sampling.has_logprobs.tolist(), sampling.num_top_logprobs.tolist(), strict=True):
        if not has_logprobs:
            found.append(None)
            continue
        first, *rest = next(rows)
        ids, logprobs = rest[:widest][:num_top], rest[widest : 2 * widest][:num_top]
        found.append(TokenLogprobs(first, [int(i) for i in ids], logprobs))
    for _, last in reported.pooled.tolist():
        found[last] = PooledHidden(next(rows)[: reported.hidden_size])
    return found
