"""GPTQ (arXiv:2210.17323): columns are rounded one by one, and each one's error is undone in the later ones.

With the inputs' Hessian H = mean(x^T x), the error that counts is tr(D H D^T) of the change D, which is what the output
changes by. Knows nothing of where weights and Hessians come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.grids.grid import Grid, Scales, group_of_column, num_groups
from compress.rounded import RoundedMatrix

ActOrder = Literal["none", "static", "permuted"]
"""In which order columns are rounded: their own; by falling Hessian, with the groups that lie side by side; or so, with
groups of columns that follow one another in that order."""

_BLOCK_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How columns are ordered and how the Hessian is made invertible."""

    act_order: ActOrder = "static"
    damping: float = 0.01  # of the Hessian's mean diagonal, added to it; tenfold until it can be inverted


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, the upper Cholesky factor of the damped inverse: H^-1 = U^T U."""
    share = float(hessian.diagonal().mean())
    identity: Tensor = torch.eye(len(hessian), device=hessian.device)
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * share * identity)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not int(failed) and bool(upper.isfinite().all()):
                return upper
        damping = max(damping, 1e-4) * 10
    return identity  # columns are then rounded each by itself


def gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, peak: Tensor, dtype: torch.dtype, options: GptqOptions
) -> RoundedMatrix:
    """weight fp32 [outputs, inputs], hessian fp32 [inputs, inputs]; peak and dtype as in Grid.fit. Weights that are 0
    stay 0: they were pruned."""
    inputs, is_dead = weight.shape[1], hessian.diagonal() <= 0
    hessian = hessian + torch.diag(is_dead.float())  # columns that no input used are rounded each by itself
    order = torch.arange(inputs, device=weight.device)
    if options.act_order != "none":
        order = hessian.diagonal().argsort(descending=True, stable=True)
    groups = group_of_column(grid, inputs, weight.device)
    fitted = grid.fit(weight, peak, dtype) if options.act_order == "static" or not grid.group_size else None
    of_step = groups[order] if options.act_order == "static" else groups  # the group of each column, in rounding order
    factor = inverse_factor(hessian[order][:, order], options.damping)
    run = _Run(weight[:, order], factor, grid, peak, dtype, of_step)
    rounded, scales = run.all_columns(fitted)
    back = order.argsort()
    is_mixed = options.act_order == "permuted" and bool(grid.group_size)
    of_column = of_step[back] if is_mixed else groups
    return RoundedMatrix(grid, rounded[:, back], scales, of_column, is_mixed)


@dataclass(frozen=True, slots=True)
class _Run:
    """One matrix, its columns in the order in which they are rounded."""

    weight: Tensor
    factor: Tensor
    grid: Grid
    peak: Tensor
    dtype: torch.dtype
    group_of_step: Tensor

    def all_columns(self, fitted: Scales | None) -> tuple[Tensor, Scales]:
        """Rounded columns, and all scales; those that are not fitted yet are when their group begins."""
        left, inputs = self.weight.clone(), self.weight.shape[1]
        rounded, groups = torch.empty_like(left), self.group_of_step.tolist()
        found = dict(enumerate(_each(fitted, num_groups(self.grid, inputs)))) if fitted is not None else {}
        for begin in range(0, inputs, _BLOCK_COLUMNS):
            end = min(begin + _BLOCK_COLUMNS, inputs)
            errors = torch.empty_like(left[:, begin:end])
            for j in range(begin, end):
                if groups[j] not in found:
                    width = self.grid.group_size or inputs
                    found[groups[j]] = self._fit_late(left, errors, begin, j, width)
                scales = found[groups[j]]
                rounded[:, j : j + 1] = self.grid.snap(left[:, j : j + 1], scales.values, scales.zeros)
                rounded[:, j].masked_fill_(self.weight[:, j] == 0, 0.0)
                error = (left[:, j] - rounded[:, j]) / self.factor[j, j]
                left[:, j:end].addr_(error, self.factor[j, j:end], alpha=-1)
                errors[:, j - begin] = error
            left[:, end:].addmm_(errors, self.factor[begin:end, end:], alpha=-1)
        return rounded, _joined([found[group] for group in sorted(found)])

    def _fit_late(self, left: Tensor, errors: Tensor, begin: int, step: int, width: int) -> Scales:
        """By the group's weights as the errors of all columns before it have changed them, the current block's too."""
        end = min(step + width, left.shape[1])
        columns = left[:, step:end].clone()
        block_end = min(begin + _BLOCK_COLUMNS, left.shape[1])
        if end > block_end and step > begin:
            late = slice(block_end - step, end - step)
            columns[:, late].addmm_(errors[:, : step - begin], self.factor[begin:step, block_end:end], alpha=-1)
        return self.grid.fit(columns, self.peak, self.dtype)


def _each(scales: Scales, count: int) -> list[Scales]:
    return [Scales(*scales.at(group), scales.divisor) for group in range(count)]


def _joined(parts: list[Scales]) -> Scales:
    zeros = None
    if parts[0].zeros is not None:
        zeros = torch.cat([part.zeros for part in parts if part.zeros is not None], 1)
    return Scales(torch.cat([part.values for part in parts], 1), zeros, parts[0].divisor)
