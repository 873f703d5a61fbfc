"""What a compressed model loses: nats per token above the plain model, KL divergence, and how often they agree.

Knows nothing of how models are compressed: it compares hidden states before the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calibration.walk import ModelWalk


@dataclass(frozen=True, slots=True)
class Loss:
    """On held-out blocks; each block gives one number of each kind, and a spread is a standard error over blocks."""

    plain_nats: float  # mean negative log-likelihood of a token under the plain model
    added_nats: float  # what the compressed model has more
    added_nats_spread: float
    kl_nats: float  # of the compressed model's distribution from the plain one's
    kl_nats_spread: float
    top1_agreement: float  # share of positions at which both have the same most likely token
    num_blocks: int
    num_tokens: int


@torch.no_grad()
def compare(
    walk: ModelWalk, blocks: Tensor, plain: Tensor, compressed: Tensor, compressed_walk: ModelWalk | None = None
) -> Loss:
    """Token ids [blocks, tokens] and both models' hidden states behind their last layers. compressed_walk: whose norm
    and head are those of the compressed model; None: it has the plain ones."""
    walks = (walk, compressed_walk or walk)
    rows = [_of_block(walks, blocks[i : i + 1], plain[i : i + 1], compressed[i : i + 1]) for i in range(len(blocks))]
    nats, other_nats, kl, agree = torch.tensor(rows, dtype=torch.float64).T
    return Loss(
        float(nats.mean()),
        float((other_nats - nats).mean()),
        _standard_error(other_nats - nats),
        float(kl.mean()),
        _standard_error(kl),
        float(agree.mean()),
        len(blocks),
        blocks.numel(),
    )


def _of_block(walks: tuple[ModelWalk, ModelWalk], ids: Tensor, plain: Tensor, compressed: Tensor) -> tuple[float, ...]:
    log_p, log_q = (
        F.log_softmax(walk.logits(x)[:, :-1], dim=-1).flatten(0, 1)
        for walk, x in zip(walks, (plain, compressed), strict=True)
    )
    targets = ids[:, 1:].flatten().to(log_p.device)
    nats, other_nats = F.nll_loss(log_p, targets), F.nll_loss(log_q, targets)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    return float(nats), float(other_nats), float(kl), float(agree)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
