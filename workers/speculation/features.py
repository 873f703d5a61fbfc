"""Hidden states of the tokens of a step, on their way from the model to a drafter that goes by them.

Knows nothing of what they are hidden states of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from workers.engine.step import StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class StepFeatures:
    """Of all tokens that a step computed."""

    hidden: Tensor  # [tokens, width], on the device, in the batch's order
    first_rows: Sequence[int]  # of each of the plan's requests; those of its tokens follow each other


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRun:
    """Of tokens of one request that follow each other."""

    hidden: Tensor  # of the step that computed them
    first_row: int
    start: int  # position in the request of the first
    num_tokens: int

    @property
    def end(self) -> int:
        """Position behind the last."""
        return self.start + self.num_tokens

    def part(self, start: int, end: int) -> FeatureRun:
        """Of the tokens at these positions."""
        return FeatureRun(self.hidden, self.first_row + start - self.start, start, end - start)

    @property
    def rows(self) -> Tensor:
        """[num_tokens, width]."""
        return self.hidden[self.first_row : self.first_row + self.num_tokens]


def features_of(plan: StepPlan, hidden: Tensor) -> StepFeatures:
    """hidden: [tokens, width] in the batch's order: requests with one token come first."""
    order = np.argsort(plan.num_tokens > 1, kind="stable")
    counts = plan.num_tokens[order]
    first_rows = np.empty(len(order), np.int64)
    first_rows[order] = np.cumsum(counts) - counts
    return StepFeatures(hidden, first_rows.tolist())
