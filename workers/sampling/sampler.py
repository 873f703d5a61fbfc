"""Choosing the next token, without state: a counter-based generator makes the same choice on any worker, in any batch.

Sampling is Gumbel-max over the masked logits (kernels.philox has the noise): the arg max of logits / temperature +
Gumbel noise is a sample of the softmax, and vocabulary-parallel ranks need to reduce one (value, id) pair only. On CUDA
a kernel does all rows at once; workers.sampling.cpu_choice does the same in fp64. Knows nothing of requests.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels
from workers.parallel import ParallelGroups
from workers.sampling.cpu_choice import Positions, best_on_cpu, typical_tokens
from workers.sampling.params import NO_CHOICE, NO_TOKEN, SamplingRows


def sample(
    logits: Tensor, sampling: SamplingRows, positions: Positions, groups: ParallelGroups, vocab_size: int
) -> Tensor:
    """int64 [rows]: one token per row.

    logits: [rows, vocab / tp], this rank's share of the vocabulary, which starts at tp_rank * vocab / tp; ids from
    vocab_size on are padding. positions: of the tokens in their completions, the counters of the generator. Every rank
    of the stage gets the same answer. On a tie the smallest id wins. A row whose best score is no finite number, as
    after an overflow in float16, gets NO_TOKEN; one that has lost all its logits gets NO_CHOICE.
    """
    logits = logits.float()
    first_id = groups.shard.tp_rank * logits.shape[1]
    if first_id + logits.shape[1] > vocab_size:
        logits = logits.clone()
        logits[:, max(0, vocab_size - first_id) :] = float("-inf")
    needs_all = bool(sampling.temperature.any()) and bool(sampling.are_cut.any())
    if needs_all and groups.shard.tp > 1:
        logits = groups.all_gather(logits).transpose(0, 1).flatten(1)
        first_id = 0
    values, ids = _best(logits, sampling, positions, first_id)
    if groups.shard.tp > 1 and not needs_all:
        all_values, all_ids = groups.all_gather(values), groups.all_gather(ids)
        values, rank = all_values.max(dim=0)
        ids = all_ids.gather(0, rank[None])[0]
    ids = torch.where(torch.isfinite(values), ids, NO_TOKEN)
    return ids.masked_fill_(values == float("-inf"), NO_CHOICE)


def _best(logits: Tensor, sampling: SamplingRows, positions: Positions, first_id: int) -> tuple[Tensor, Tensor]:
    """fp64 [rows] and int64 [rows]: the best score of each row and its vocabulary id."""
    if not sampling.temperature.any():
        values, ids = logits.max(dim=-1)
        return values.double(), ids + first_id
    if (sampling.typical_p < 1.0).any():
        logits = masked_typical(logits, sampling)
    if logits.is_cuda:
        return _best_on_cuda(logits, sampling, positions, first_id)
    values, ids = best_on_cpu(logits, sampling, positions, first_id)
    return values, ids + first_id


def masked_typical(logits: Tensor, sampling: SamplingRows) -> Tensor:
    """The logits, of which those outside the typical set are -inf in rows that ask for it."""
    rows = np.flatnonzero((sampling.typical_p < 1.0) & (sampling.temperature > 0))
    at = torch.from_numpy(rows).to(logits.device)
    temperature = torch.from_numpy(sampling.temperature[rows]).to(logits.device)
    typical_p = torch.from_numpy(sampling.typical_p[rows]).to(logits.device)
    chosen = logits[at]
    is_typical = typical_tokens(chosen.double() / temperature[:, None], typical_p)
    return logits.index_copy(0, at, chosen.masked_fill(~is_typical, float("-inf")))


def _best_on_cuda(logits: Tensor, sampling: SamplingRows, positions: Positions, first_id: int) -> tuple[Tensor, Tensor]:
    def column(values: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(dtype).pin_memory().to(logits.device, non_blocking=True)

    values, ids = kernels.sample(
        logits,
        column(sampling.temperature, torch.float32),
        column(sampling.top_k, torch.int64),
        column(sampling.top_p, torch.float32),
        column(sampling.min_p, torch.float32),
        column(sampling.seed.view(np.int64), torch.int64),  # the device holds a seed as the signed number of its bits
        column(positions, torch.int64),
        first_id,
    )
    return values.double(), ids
