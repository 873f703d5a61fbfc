"""Weights set to zero: by magnitude, by Wanda (arXiv:2306.11695), or by SparseGPT (arXiv:2301.00774).

A pattern is N of M neighbouring columns kept, or a share of each row or block of columns. The result is dense, with
zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.calibration.statistics import InputStatistics
from compress.errors import CompressError
from compress.methods.gptq import inverse_factor

PruningMethod = Literal["magnitude", "wanda", "sparsegpt"]
_BLOCK_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights stay: `kept` of every `of` neighbouring columns; of = 0: all but the share `pruned` of them."""

    kept: int = 0
    of: int = 0
    pruned: float = 0.5

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From "2:4" or "0.5". Raises CompressError."""
        first, _, second = text.partition(":")
        if second and first.isdigit() and second.isdigit() and 0 < int(first) < int(second):
            return cls(int(first), int(second))
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise CompressError(f"sparsity {text!r} is neither like 2:4 nor a share between 0 and 1")
        return cls(pruned=share)

    def check(self, name: str, inputs: int) -> None:
        """Raise CompressError, naming the matrix, unless the pattern divides its columns."""
        if self.of and inputs % self.of:
            raise CompressError(f"{name}: a pattern of {self.kept}:{self.of} does not divide its {inputs} inputs")

    def mask(self, scores: Tensor) -> Tensor:
        """True where a weight stays. scores [outputs, columns]: what it is worth."""
        if self.of:
            groups = scores.unflatten(1, (-1, self.of))
            best = groups.topk(self.kept, dim=-1).indices
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)
        count = round(scores.shape[1] * (1 - self.pruned))
        best = scores.topk(count, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def prune(weight: Tensor, method: PruningMethod, pattern: Pattern, statistics: InputStatistics | None) -> Tensor:
    """fp32 [outputs, inputs] -> the same with zeros. statistics: only magnitude does without."""
    if method == "magnitude":
        return weight * pattern.mask(weight.abs())
    assert statistics is not None
    if method == "wanda" or not statistics.num_rows:
        return weight * pattern.mask(weight.abs() * statistics.mean_square.sqrt().clamp(min=1e-12))
    assert statistics.hessian is not None
    return sparsegpt(weight, statistics.hessian, pattern)


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float = 0.01) -> Tensor:
    """GPTQ's walk over the columns, with zero for what is not kept in place of a rounded number.

    Which weights stay is decided a block of columns at a time (of a pattern: a group at a time), by their values then.
    """
    factor = inverse_factor(hessian + torch.diag((hessian.diagonal() <= 0).float()), damping)
    left, diagonal = weight.clone(), factor.diagonal()
    for begin in range(0, weight.shape[1], _BLOCK_COLUMNS):
        end = min(begin + _BLOCK_COLUMNS, weight.shape[1])
        errors = torch.zeros_like(left[:, begin:end])
        is_kept = torch.ones_like(errors, dtype=torch.bool)
        for j in range(begin, end):
            width = pattern.of or end - begin
            if (j - begin) % width == 0:
                chosen = slice(j, min(j + width, end))
                scores = (left[:, chosen] / diagonal[chosen]).square()
                is_kept[:, j - begin : chosen.stop - begin] = pattern.mask(scores)
            error = left[:, j].masked_fill(is_kept[:, j - begin], 0.0) / factor[j, j]
            left[:, j:end].addr_(error, factor[j, j:end], alpha=-1)
            left[:, j].masked_fill_(~is_kept[:, j - begin], 0.0)
            errors[:, j - begin] = error
        left[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    return left
