"""A head that goes by the model's own hidden states proposes tokens.

It has an entry for each token but a request's last: the hidden state that the model computed at the token, and the
token that follows. Entries are computed from what the last steps left, just before tokens are proposed; those of drafts
have the head's own output in place of a hidden state, and are overwritten when the model's has come. Tokens that the
model did not compute here, since their KV came from a cache or another worker, have no entry: the head sees those that
it has, at their right positions. Knows nothing of how a head computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.engine.request import Request, RequestRole, RequestStatus
from workers.engine.step import SchedulerOutput, StepPlan
from workers.speculation.drafters.draft_plan import (
    DraftLimits,
    PlanNumbers,
    Wait,
    append,
    chain_s,
    drafts_of,
    take_row,
    until_failed,
)
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.sequences import DraftSequence, DraftSequences
from workers.speculation.features import FeatureRun, StepFeatures
from workers.speculation.step_costs import StepCosts

BEFORE_FIRST = 1  # tokens before the first that an entry is named by: an entry has the token after its position


@dataclass(frozen=True, slots=True)
class HeadEntries:
    """What a step of a head needs beside its plan; of each of the plan's requests."""

    num_left_out: Sequence[int]  # an entry's position is its place in the cache and so much
    runs: Sequence[Sequence[FeatureRun]]  # hidden states of its entries; none: the head's own, of the entry before


class HeadRunner(Protocol):
    """Carries out the head's steps. A plan's positions are places in the head's cache."""

    def start(self, plan: StepPlan, entries: HeadEntries | None = None) -> Wait:
        """As ModelRunner.start."""
        ...


@dataclass(slots=True)
class _Waiting:
    """Hidden states of a request that are not in an entry yet, without a gap; the last one stays when it is."""

    request: Request
    runs: list[FeatureRun] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position behind the last."""
        return self.runs[-1].end

    @property
    def num_tokens(self) -> int:
        """In all."""
        return self.end - self.runs[0].start if self.runs else 0

    def add(self, run: FeatureRun) -> None:
        """What was computed before, and again after a preemption, counts once."""
        if self.runs and run.start > self.end:
            self.runs.clear()
        start = max(run.start, self.end) if self.runs else run.start
        if start < run.end:
            self.runs.append(run.part(start, run.end))

    def between(self, start: int, end: int) -> list[FeatureRun]:
        """Those at these positions."""
        parts = [(run, max(start, run.start), min(end, run.end)) for run in self.runs]
        return [run.part(first, last) for run, first, last in parts if first < last]


@dataclass(slots=True)
class _Turn:
    """A request in a run of the head's steps."""

    waiting: _Waiting
    sequence: DraftSequence
    num_tokens: int  # to propose; 0: its entries are only computed
    start: int  # positions of the entries that are computed
    end: int

    @property
    def request(self) -> Request:
        """Whose turn it is."""
        return self.waiting.request


class FeatureHead:
    """costs: of the head's steps; None: not measured, and then not counted."""

    def __init__(
        self,
        runner: HeadRunner,
        sequences: DraftSequences,
        limits: DraftLimits,
        costs: StepCosts | None,
        temperature_scale: float = 1.0,
    ) -> None:
        self._runner = runner
        self._sequences = sequences
        self._limits = limits
        self._costs = costs
        self._temperature_scale = temperature_scale
        self._plans = PlanNumbers()
        self._waiting: dict[str, _Waiting] = {}

    # -------------------------------------------------------------------------------------------------- hidden states
    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter: what follows needs hidden states of the step that is not through."""

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter."""
        assert isinstance(features, StepFeatures)
        columns = zip(plan.requests, plan.start_positions, plan.num_tokens, features.first_rows, strict=True)
        for request, start, count, first_row in columns:
            end = min(start + count, request.num_tokens - 1)  # rejected drafts lie behind, and nothing follows the last
            if start < end and _may_draft(request):
                waiting = self._waiting.setdefault(request.request_id, _Waiting(request))
                waiting.add(FeatureRun(features.hidden, first_row, start, end - start))
        while sum(one.num_tokens - 1 for one in self._waiting.values()) > self._limits.max_num_batched_tokens:
            self._catch_up()

    def _catch_up(self) -> None:
        """Compute entries while nothing is proposed: hidden states take up memory."""
        behind = [one for one in self._waiting.values() if one.num_tokens > 1]
        turns = self._turns([(one.request, 0) for one in behind])
        named = {turn.request.request_id for turn in turns}
        if turns:
            self._first_step(turns)()
            self._note(turns)
        for one in behind:
            if one.request.request_id not in named:  # no space, or nothing that is not there
                one.runs = one.between(one.end - 1, one.end)

    # ---------------------------------------------------------------------------------------------------------- drafts
    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter. Of a request whose last hidden state is not there it proposes nothing."""
        turns = self._turns([(one.request, one.num_tokens) for one in wanted])
        waits = [self._first_step(turns)] if turns else []
        drafting = [turn for turn in turns if turn.num_tokens]
        for step in range(1, max((turn.num_tokens for turn in drafting), default=0)):
            waits.append(self._next_step([turn for turn in drafting if turn.num_tokens > step], step))
        drafts = drafts_of(waits, [(turn.request.request_id, turn.num_tokens) for turn in drafting])
        self._note(turns)
        return [until_failed(drafts.get(one.request.request_id, [])) for one in wanted]

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter: without hidden states nothing can be."""

    def _turns(self, wanted: Iterable[tuple[Request, int]]) -> list[_Turn]:
        """Those that have space in the head's cache, and something to do there; those that lack least come first."""
        asked = [(self._waiting.get(request.request_id), count) for request, count in wanted]
        known = [(waiting, count) for waiting, count in asked if waiting is not None and waiting.runs]
        names = {waiting.request.request_id for waiting, _ in known}
        found = [self._turn(waiting, count, names) for waiting, count in known[: self._limits.max_num_seqs]]
        turns = [turn for turn in found if turn is not None and turn.start < turn.end]
        return sorted(turns, key=lambda turn: turn.end - turn.start)

    def _turn(self, waiting: _Waiting, count: int, used: Collection[str]) -> _Turn | None:
        request, end = waiting.request, waiting.end
        sequence = self._sequences.of(request, 0, used)
        if sequence is None:
            return None
        first = waiting.runs[0].start
        if first > sequence.num_computed + sequence.num_left_out:
            sequence.num_left_out = first - sequence.num_computed
        if end < request.num_tokens - 1:
            count = 0
        num_entries = end - sequence.num_left_out + max(0, count - 1)
        if self._sequences.of(request, num_entries, used) is None:
            return None
        start = sequence.num_computed + sequence.num_left_out
        return _Turn(waiting, sequence, count, min(start, end - 1) if count else start, end)

    def _first_step(self, turns: list[_Turn]) -> Wait:
        """The entries that a request lacks, and its first proposal where none is lacking then. Turns for which there is
        no space in the step are taken out."""
        plan, left = SchedulerOutput(), self._limits.max_num_batched_tokens
        planned, runs = [], []
        for turn in turns:
            request, sequence = turn.request, turn.sequence
            if turn.end - turn.start > left:
                turn.end, turn.num_tokens = turn.start + left, 0
            if turn.end == turn.start:
                break
            left -= turn.end - turn.start
            # An entry has the token behind its position: that is the first of the completion one entry earlier.
            take_row(plan, sequence, request, self._temperature_scale, BEFORE_FIRST)
            token_ids = request.token_ids[turn.start + BEFORE_FIRST : turn.end + BEFORE_FIRST]
            append(plan, sequence, turn.start - sequence.num_left_out, token_ids, int(turn.num_tokens > 0))
            runs.append(turn.waiting.between(turn.start, turn.end))
            planned.append(turn)
        turns[:] = planned
        return self._start(plan, turns, runs)

    def _next_step(self, turns: Sequence[_Turn], step: int) -> Wait:
        """One more entry of each, of the token that the last step chooses."""
        plan = SchedulerOutput()
        for turn in turns:
            append(plan, turn.sequence, turn.end - turn.sequence.num_left_out + step - 1, None, 1)
        return self._start(plan, turns, ())

    def _start(self, plan: SchedulerOutput, turns: Sequence[_Turn], runs: Sequence[Sequence[FeatureRun]]) -> Wait:
        entries = HeadEntries([turn.sequence.num_left_out for turn in turns], runs)
        return self._runner.start(self._plans.sent(plan), entries)

    def _note(self, turns: Sequence[_Turn]) -> None:
        for turn in turns:
            sequence, waiting = turn.sequence, turn.waiting
            sequence.computed(max(sequence.num_computed, turn.end - sequence.num_left_out), ())
            self._sequences.note_full_blocks(sequence, turn.request.token_ids)
            waiting.runs = waiting.between(turn.end - 1, waiting.end)

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._waiting.pop(request.request_id, None)
        self._sequences.forget(request.request_id)

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return self._costs is not None

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return chain_s(self._costs, lengths)


def _may_draft(request: Request) -> bool:
    is_wanted = request.sampling.num_speculative_tokens != 0
    is_decoded = request.role not in (RequestRole.PREFILL, RequestRole.EMBED)
    return is_wanted and is_decoded and request.status is not RequestStatus.FINISHED
