"""What a step chose on one rank, on its way to the host. Knows nothing of how it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workers.runtime.batching import PreparedBatch
from workers.sampling.params import RowReport
from workers.sampling.row_reports import Reported
from workers.sampling.row_reports import read as read_reports
from workers.speculation.features import StepFeatures


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What a step chose, or will have chosen: these wait for it, and give nothing where it is not known."""

    prepared: PreparedBatch | None
    reported: Reported | None
    token_ids: Callable[[], list[Any]]  # in the batch's order
    numbers: Callable[[], list[Any]]  # of row_reports.numbers_of
    features: StepFeatures | None = None

    def in_plan_order(self) -> tuple[list[int], list[RowReport | None]]:
        """Token ids, and what rows report besides."""
        token_ids = self.token_ids()
        if self.prepared is None or self.reported is None or not token_ids:
            return [], []
        order: list[int] = self.prepared.order.tolist()
        sampled = [0] * len(token_ids)
        for index, token_id in zip(order, token_ids, strict=True):
            sampled[index] = token_id
        if self.reported.is_empty:
            return sampled, []
        return sampled, _in_order(read_reports(self.numbers(), self.reported), order)


NOTHING_CHOSEN = Chosen(None, None, list, list)


def _in_order(found: Sequence[RowReport | None], order: Sequence[int]) -> list[RowReport | None]:
    """From the batch's order to the plan's."""
    by_index = dict(zip(order, found, strict=True))
    return [by_index[index] for index in range(len(order))]
