"""The best score of each row on a CPU, in fp64, all rows of a kind at once.

The rules are those of kernels.sampling: top_k, then top_p, then min_p leave tokens, tokens tied with the last one stay,
and noise that belongs to (seed, position, vocabulary id) decides among them. A filtered row is cut to its largest
logits first, where those are enough, and needs noise for them only. A row's result does not depend on the others.
Knows nothing of requests.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.philox import gumbel, uniform_words, uniform_words_at
from workers.sampling.params import SamplingRows

_FEW = 1024  # candidates of a filtered row that are looked at before the whole row is
_NOISE_AT_ONCE = 1 << 18  # numbers: what is computed of them lies in the processor's cache

Positions = npt.NDArray[np.int64]


def best_on_cpu(logits: Tensor, sampling: SamplingRows, positions: Positions, first_id: int) -> tuple[Tensor, Tensor]:
    """fp64 [rows] and int64 [rows]: the best score of each row, and its index. logits: fp32 [rows, ids]."""
    values, indices = logits.max(dim=-1)
    values = values.double()
    is_sampled = sampling.temperature > 0
    is_filtered = is_sampled & ((sampling.top_k > 0) | (sampling.top_p < 1.0) | (sampling.min_p > 0))
    for kind, best in ((is_sampled & ~is_filtered, _best_of_all), (is_filtered, _best_of_filtered)):
        rows = np.flatnonzero(kind)
        if rows.size:
            at = torch.from_numpy(rows)
            # In fp64: a temperature of 1e-40 is allowed, and means nearly greedy, not infinite.
            scaled = logits[at].double() / torch.from_numpy(sampling.temperature[rows])[:, None]
            values[at], indices[at] = best(scaled, sampling.of(rows), positions[rows], first_id)
    return values, indices


def _best_of_all(scaled: Tensor, sampling: SamplingRows, positions: Positions, first_id: int) -> tuple[Tensor, Tensor]:
    """Rows that may choose any token."""
    num_rows, num_ids = scaled.shape
    step = max(1, _NOISE_AT_ONCE // num_ids)
    parts = []
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        seeds, counters = _keys(sampling.seed[rows], positions[rows])
        noise = gumbel(uniform_words(seeds, counters, first_id, num_ids, scaled.device))
        parts.append((scaled[rows] + noise).max(dim=-1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _best_of_filtered(
    scaled: Tensor, sampling: SamplingRows, positions: Positions, first_id: int
) -> tuple[Tensor, Tensor]:
    """Rows that choose among some of the tokens. A row whose largest logits are too few is looked at whole."""
    num_rows, num_ids = scaled.shape
    values = torch.empty(num_rows, dtype=torch.float64)
    indices = torch.empty(num_rows, dtype=torch.int64)
    rows = np.arange(num_rows)
    for few in (_FEW, num_ids):
        few = min(few, num_ids)
        part, at = sampling.of(rows), torch.from_numpy(rows)
        whole = scaled[at]
        candidates, ids = _largest(whole, few)
        is_left, is_enough = _filtered(whole, candidates, part)
        if few == num_ids:
            is_enough = np.ones(len(rows), np.bool_)
        done = np.flatnonzero(is_enough)
        if done.size:
            where = torch.from_numpy(done)
            seeds, counters = _keys(part.seed[done], positions[rows[done]])
            noise = gumbel(uniform_words_at(seeds, counters, ids[where] + first_id))
            scores = (candidates[where] + noise).masked_fill(~is_left[where], float("-inf"))
            best = scores.max(dim=-1, keepdim=True).values
            values[at[where]] = best[:, 0]
            indices[at[where]] = torch.where(scores == best, ids[where], num_ids).min(dim=-1).values
        rows = rows[~is_enough]
        if not rows.size:
            break
    return values, indices.clamp(max=num_ids - 1)  # a row of NaN has no best, and its value says so


def _largest(scaled: Tensor, few: int) -> tuple[Tensor, Tensor]:
    """[rows, few]: the largest numbers of each row in falling order, and their indices."""
    if few == scaled.shape[1]:
        ordered = scaled.sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    return scaled.topk(few, dim=-1)


def _filtered(scaled: Tensor, candidates: Tensor, sampling: SamplingRows) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """bool [rows, few]: which candidates are left; and of each row whether all that are left are among them.

    candidates: the largest of scaled, in falling order.
    """
    num_ids, few = scaled.shape[1], candidates.shape[1]
    top_k = np.where((sampling.top_k > 0) & (sampling.top_k < num_ids), sampling.top_k, num_ids)
    has_k = torch.from_numpy(top_k < num_ids)
    kth = candidates.gather(1, torch.from_numpy(np.minimum(top_k, few) - 1)[:, None])
    is_left = ~has_k[:, None] | (candidates >= kth)
    kept = candidates.masked_fill(~is_left, float("-inf"))
    total = torch.where(has_k, kept.logsumexp(dim=-1), scaled.logsumexp(dim=-1))
    shares = torch.exp(kept - total[:, None])
    top_p = torch.from_numpy(sampling.top_p)[:, None]
    reached = (shares.cumsum(dim=-1) - shares < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    last = candidates.gather(1, reached - 1)
    is_left &= (top_p >= 1.0) | (candidates >= last)
    floor = candidates[:, :1] + torch.log(torch.from_numpy(sampling.min_p))[:, None]
    is_left &= candidates >= floor
    has_all_of_k = ~has_k | (candidates[:, -1] < kth[:, 0])  # more may be tied with the last
    return is_left, (~is_left[:, -1] & has_all_of_k).numpy()


def left_tokens(scaled: Tensor, sampling: SamplingRows) -> Tensor:
    """bool [rows, ids]: what top_k, top_p and min_p leave of each row. scaled: fp64 logits over the temperature."""
    candidates, ids = _largest(scaled, scaled.shape[1])
    is_left, _ = _filtered(scaled, candidates, sampling)
    return torch.empty_like(is_left).scatter_(1, ids, is_left)


def typical_tokens(scaled: Tensor, typical_p: Tensor) -> Tensor:
    """bool [rows, ids]: the smallest set of probability >= typical_p of the tokens whose information, -log p, is
    closest to the expected one (locally typical sampling, arXiv 2202.00666). scaled: [rows, ids]; typical_p: [rows]."""
    logs = torch.log_softmax(scaled, dim=-1)
    shares = logs.exp()
    entropy = -torch.nansum(shares * logs, dim=-1, keepdim=True)
    distance, order = torch.sort((-logs - entropy).abs(), dim=-1, stable=True)
    ordered = shares.gather(1, order)
    is_kept = ordered.cumsum(dim=-1) - ordered < typical_p[:, None]
    is_kept &= distance < float("inf")
    is_kept[:, 0] = True
    return torch.zeros_like(is_kept).scatter_(1, order, is_kept)


def _keys(seeds: npt.NDArray[np.uint64], positions: Positions) -> tuple[Tensor, Tensor]:
    """int64 [rows, 1] each; a seed as the signed number of its bits."""
    return torch.from_numpy(seeds.view(np.int64))[:, None], torch.from_numpy(positions)[:, None]
