"""Choosing the next token, without state: a counter-based generator makes the same choice on any worker, in any batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) is keyed by the request's seed; its
counter is (choice, position in the completion, vocabulary id / 4), and each of the four words of a block belongs to one
vocabulary id. Sampling is Gumbel-max over the masked logits: the arg max of logits / temperature + Gumbel noise is a
sample of the softmax, and vocabulary-parallel ranks need to reduce one (value, id) pair only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.parallel import ParallelGroups
from workers.step import SampleSpec

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Four int64 tensors of one shape, each word in [0, 2**32), from counters of that shape and a two-word key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(c0, _M0)
        hi1, lo1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product; int64 holds no 64-bit unsigned, so the factor is split in halves."""
    low = a * (m & 0xFFFF)  # < 2**48
    high = a * (m >> 16)  # < 2**48, in units of 2**16
    total = high + (low >> 16)  # < 2**49
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(
    seed: int, choice: int, position: int, first_id: int, num_ids: int, device: torch.device | None = None
) -> Tensor:
    """fp64 [num_ids]: standard Gumbel noise of the vocabulary ids first_id .. first_id + num_ids - 1."""
    first_block, last_block = first_id // 4, (first_id + num_ids + 3) // 4
    blocks = torch.arange(first_block, last_block, dtype=torch.int64, device=device)
    constant = torch.full_like(blocks, 0)
    words = philox4x32((constant + choice, constant + position, blocks, constant), (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack(words, dim=1).flatten()[first_id - 4 * first_block :][:num_ids]
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32  # never 0 or 1
    return -torch.log(-torch.log(uniform))


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
        logits = torch.empty_like(logits).scatter_(0, order, kept)  # an index by a mask would wait for the device
    return logits


def sample(logits: Tensor, specs: Sequence[SampleSpec], groups: ParallelGroups, vocab_size: int) -> Tensor:
    """int64 [rows]: one token per row.

    logits: [rows, vocab / tp], this rank's share of the vocabulary, which starts at tp_rank * vocab / tp; ids from
    vocab_size on are padding. Every rank of the stage gets the same answer. On a tie the smallest id wins.
    """
    logits = logits.float()
    first_id = groups.shard.tp_rank * logits.shape[1]
    if first_id + logits.shape[1] > vocab_size:
        logits = logits.clone()
        logits[:, max(0, vocab_size - first_id) :] = float("-inf")
    needs_all = any(s.temperature > 0 and (s.top_k > 0 or s.top_p < 1.0) for s in specs)
    if needs_all and groups.shard.tp > 1:
        logits = groups.all_gather(logits).transpose(0, 1).flatten(1)
        first_id = 0
    values, ids = _best(logits, specs, first_id)
    if groups.shard.tp == 1 or needs_all:
        return ids
    all_values, all_ids = groups.all_gather(values), groups.all_gather(ids)
    return all_ids.gather(0, all_values.argmax(dim=0, keepdim=True))[0]


def _best(logits: Tensor, specs: Sequence[SampleSpec], first_id: int) -> tuple[Tensor, Tensor]:
    """fp64 [rows] and int64 [rows]: the best score of each row and its vocabulary id."""
    if all(s.temperature == 0 for s in specs):
        values, ids = logits.max(dim=-1)
        return values.double(), ids + first_id
    scores = []
    for row, spec in zip(logits, specs, strict=True):
        if spec.temperature == 0:
            scores.append(row.double())
            continue
        # In fp64: a temperature of 1e-40 is allowed, and means nearly greedy, not infinite.
        scaled = mask_top_k_top_p(row.double() / spec.temperature, spec.top_k, spec.top_p)
        scores.append(scaled + gumbel(spec.seed, 0, spec.position, first_id, len(row), row.device))
    values, ids = torch.stack(scores).max(dim=-1)
    return values, ids + first_id
