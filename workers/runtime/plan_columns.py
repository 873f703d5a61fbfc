"""A plan's columns in the order of the batch: sequences with one token first, as the attention kernels need them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.engine.step import Ints, StepPlan

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PlanColumns:
    """The plan's columns in the batch's order."""

    rows: Ints
    start_positions: Ints
    num_tokens: Ints
    write_from: Ints
    num_logits: Ints
    num_prompt_logits: Ints
    num_known: Ints
    order: Longs | None  # of the plan's requests; None: as they are
    total_tokens: int
    total_logits: int
    num_single: int  # requests with one token
    num_last: int  # requests whose next token is chosen
    longest: int  # tokens of one request

    @staticmethod
    def of(plan: StepPlan) -> PlanColumns:
        num_requests = plan.num_requests
        total_tokens, total_logits = int(plan.num_tokens.sum()), int(plan.num_logits.sum())
        is_single = total_tokens == num_requests
        order = None if is_single else np.argsort(plan.num_tokens > 1, kind="stable")

        def column(values: Ints) -> Ints:
            return values if order is None else values[order]

        return PlanColumns(
            rows=column(plan.rows),
            start_positions=column(plan.start_positions),
            num_tokens=column(plan.num_tokens),
            write_from=column(plan.write_from),
            num_logits=column(plan.num_logits),
            num_prompt_logits=column(plan.num_prompt_logits),
            num_known=column(plan.num_known),
            order=order,
            total_tokens=total_tokens,
            total_logits=total_logits,
            num_single=num_requests if is_single else int((plan.num_tokens == 1).sum()),
            num_last=int((plan.num_logits > plan.num_prompt_logits).sum()),
            longest=1 if is_single else int(plan.num_tokens.max()),
        )

    def write_token_ids(self, into: npt.NDArray[np.integer], plan: StepPlan, ends: Longs) -> None:
        """The known tokens, in the batch's order; a pending one comes last in its run and is left out."""
        if not len(plan.token_ids):
            return
        known = plan.token_ids
        if self.order is not None:
            known_ends = np.cumsum(plan.num_known)
            known = np.concatenate([known[known_ends[i] - plan.num_known[i] : known_ends[i]] for i in self.order])
        if len(known) == len(into):
            into[:] = known
        else:
            starts = np.repeat(ends - self.num_tokens, self.num_known)
            within = np.arange(len(known)) - np.repeat(np.cumsum(self.num_known) - self.num_known, self.num_known)
            into[starts + within] = known


@dataclass(frozen=True, slots=True, eq=False)
class WantedLogits:
    """The wanted rows of logits, in the batch's order."""

    requests: Longs  # in the batch's order
    behind: Longs  # how many more of its request's rows follow
    batch_rows: Longs
    token_positions: Longs  # in the request: of the token that the row chooses

    @staticmethod
    def of(columns: PlanColumns, ends: Longs) -> WantedLogits:
        counts, total = columns.num_logits, columns.total_logits
        if total == columns.total_tokens == len(counts):
            requests = np.arange(total)
            return WantedLogits(
                requests, np.zeros(total, np.int64), requests, columns.start_positions.astype(np.int64) + 1
            )
        requests = np.repeat(np.arange(len(counts)), counts)
        behind = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(total)
        batch_rows = ends[requests] - 1 - behind
        token_positions = (columns.start_positions + columns.num_tokens)[requests] - behind
        return WantedLogits(requests, behind, batch_rows, token_positions)

    def num_drafts(self, columns: PlanColumns) -> Longs:
        """Of the rows before each row, those of the same request."""
        if columns.num_last == columns.total_logits:
            return np.zeros(len(self.requests), np.int64)
        num_choosing = (columns.num_logits - columns.num_prompt_logits)[self.requests]
        num_drafts: Longs = np.maximum(0, num_choosing - 1 - self.behind)
        return num_drafts

    def runs(self, is_chosen: npt.NDArray[np.bool_]) -> Longs:
        """[requests, 2]: the first and the last row of each request whose rows are chosen."""
        lasts = np.flatnonzero(is_chosen & (self.behind == 0))
        firsts = np.searchsorted(self.requests, self.requests[lasts])  # a request's rows lie together
        return np.stack((firsts, lasts), axis=1)

    def order(self, plan: StepPlan, order: Longs | None) -> Longs:
        """The index of each row among the wanted rows of the plan."""
        if order is None:
            return np.arange(len(self.requests))
        last_indices = np.cumsum(plan.num_logits) - 1
        return last_indices[order[self.requests]] - self.behind


def prompt_targets_of(plan: StepPlan) -> Longs | None:
    """Of each wanted row of logits of the plan the token of the prompt that it tells of; -1: it chooses one."""
    if not len(plan.prompt_targets):
        return None
    targets = np.full(int(plan.num_logits.sum()), -1, np.int64)
    starts = np.cumsum(plan.num_logits) - plan.num_logits
    within = np.arange(len(targets)) - np.repeat(starts, plan.num_logits)
    targets[within < np.repeat(plan.num_prompt_logits, plan.num_logits)] = plan.prompt_targets
    return targets
