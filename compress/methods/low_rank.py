"""A matrix as a product of two thin ones, the best for the inputs that calibration saw (SVD-LLM, arXiv:2403.07378).

With H = mean(x^T x) = L L^T, the truncated singular value decomposition of W L is the factorization of that rank with
the least mean squared change of the outputs. ASVD (arXiv:2312.05821) scales by mean magnitudes in place of L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibration.statistics import InputStatistics

_DAMPING = 1e-4  # of the Hessian's mean diagonal


@dataclass(frozen=True, slots=True)
class Factors:
    """left @ right is meant."""

    left: Tensor  # [outputs, rank]
    right: Tensor  # [rank, inputs]


def rank_of(outputs: int, inputs: int, kept_share: float) -> int:
    """The largest rank whose factors have this share of the matrix's parameters, and at least 1."""
    return max(1, int(kept_share * outputs * inputs / (outputs + inputs)))


def factorized(weight: Tensor, rank: int, statistics: InputStatistics | None) -> Factors:
    """weight fp32 [outputs, inputs]. Without statistics all inputs count alike."""
    whitening = None if statistics is None or not statistics.num_rows else _whitening(statistics)
    scaled = weight if whitening is None else weight @ whitening
    left, values, right = torch.linalg.svd(scaled, full_matrices=False)
    roots = values[:rank].sqrt()
    right = right[:rank] * roots[:, None]
    if whitening is not None:
        right = torch.linalg.solve_triangular(whitening.T, right.T, upper=True).T
    return Factors(left[:, :rank] * roots, right)


def _whitening(statistics: InputStatistics) -> Tensor:
    """Lower triangular L."""
    hessian = statistics.hessian
    if hessian is None:
        return torch.diag(statistics.mean_square.sqrt().clamp(min=1e-6))
    share, damping = float(hessian.diagonal().mean()), _DAMPING
    identity = torch.eye(len(hessian), device=hessian.device)
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * share * identity)
        if not int(failed):
            return factor
        damping *= 10
