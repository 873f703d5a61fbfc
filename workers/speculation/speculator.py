"""Before each step of an engine: which requests get draft tokens, how many, and which ones. After it: what became of
them.

Drafts are proposed for requests that decode, and none of whose tokens is being chosen. The engine has no other part in
speculation than that its scheduler takes drafts into its plans. Knows nothing of tensors or clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from workers.config import SpeculativeOptions
from workers.engine.outcome import JudgedDrafts
from workers.engine.request import Request, RequestRole
from workers.engine.scheduler import Scheduler
from workers.engine.speculation import SpeculationCounters
from workers.engine.step import SchedulerOutput
from workers.speculation.acceptance import AcceptanceEstimates
from workers.speculation.drafters.drafter import Drafter, DraftWanted
from workers.speculation.goodput import draft_budget
from workers.speculation.quiet import QuietRequests
from workers.speculation.standing import MIN_GAIN, DraftStandings
from workers.speculation.step_costs import StepCosts

log = logging.getLogger(__name__)

_PROBE_TOKENS = 1
_LONGEST_INTERVAL = 3.0  # between two steps, times what the later one and its drafting took


@dataclass(slots=True)
class _Draft:
    """Of one request, before a step."""

    wanted: DraftWanted
    token_ids: Sequence[int] = ()
    drafted_by: int = 0  # index of the drafter
    length: int = 0  # of what is proposed, or may be
    expected_gain: float = 0.0  # of the step

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.wanted.request.request_id


@dataclass(frozen=True, slots=True)
class _Expected:
    """Of a step with drafts."""

    gain: float  # times as many tokens a second as without; 0: nothing is expected
    num_running: int  # requests that were looked at


@dataclass(frozen=True, slots=True)
class _Proposed:
    """Drafts that are being judged. Steps may be in flight, so each keeps what was expected of its own."""

    drafted_by: int  # index of the drafter
    expected: _Expected


_NOTHING = _Expected(0.0, 0)
_UNKNOWN = _Proposed(0, _NOTHING)


class Speculator:
    """Of one engine. drafters: a request's drafts are those of the first one that proposes some; one whose proposals
    cost time comes last. costs: measured times of steps; without them every proposed draft is taken."""

    def __init__(
        self,
        options: SpeculativeOptions,
        drafters: Sequence[Drafter],
        costs: StepCosts | None,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._drafters: Sequence[Drafter] = drafters
        self._costs = costs if options.enable_adaptive_verification else None
        self._clock = clock
        self._estimates = [AcceptanceEstimates(options.most_tokens) for _ in drafters]
        self._proposed: dict[str, _Proposed] = {}  # of requests whose drafts are being judged
        self._quiet = QuietRequests()
        self._probed = ""  # the request that had the last probe
        self._standings = DraftStandings()
        self._drafting_s = 0.0  # since the last step was through
        self._in_vain = _NOTHING  # of the last look, if a drafter was asked and proposed nothing
        self._last_step = (0, 0.0)  # sequences of the step before, if all of them decoded, and when it ended
        self._is_broken = False  # a drafter has raised
        positions = [0] * options.most_tokens
        self.counters = SpeculationCounters(
            num_accepted_tokens_per_pos=list(positions), num_reached_tokens_per_pos=list(positions)
        )

    # ---------------------------------------------------------------------------------------------------- before a step
    def propose(self, scheduler: Scheduler) -> None:
        """Give the scheduler drafts for the plan that it makes next."""
        if self._is_broken:
            return
        if self._costs is not None and self._standings.of(len(_looked_at(scheduler))).passes():
            _await_no_drafts(scheduler)
            return
        with self._guard():
            began_s = self._clock()
            self._propose_to(scheduler)
            took_s = self._clock() - began_s
            self._drafting_s += took_s
            self.counters.drafting_seconds += took_s
        if self._is_broken:
            for request in scheduler.running:
                request.awaits_drafts, request.draft_token_ids = False, []

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """A drafter that raises is given up: no stream depends on it."""
        try:
            yield
        except Exception:
            log.exception("drafts cannot be proposed any more; decoding goes on without them")
            self._is_broken, self._drafters, self._estimates = True, (), []

    def _propose_to(self, scheduler: Scheduler) -> None:
        waiting = [r for r in scheduler.waiting_for_kv if self._limit(r, 1) > 0]
        for drafter in self._drafters if waiting else ():
            drafter.prepare(waiting)
        running = _looked_at(scheduler)
        if not running:
            return
        wanted = []
        for request in running:
            limit = self._limit(request, len(running))
            request.awaits_drafts = limit > 0 and not self._quiet.passes_over(request.request_id)
            if limit > 0 and _is_ready(request):
                wanted.append(DraftWanted(request, limit))
        if wanted:
            for draft in self._propose(scheduler, wanted, len(running)):
                expected = _Expected(draft.expected_gain, len(running))
                self._proposed[draft.request_id] = _Proposed(draft.drafted_by, expected)

    def _limit(self, request: Request, num_running: int) -> int:
        """Most draft tokens of a request, whatever they are."""
        if request.role in (RequestRole.PREFILL, RequestRole.EMBED):
            return 0
        most = self._options.most_tokens_at(num_running)
        if request.sampling.num_speculative_tokens is not None:
            most = min(most, request.sampling.num_speculative_tokens)
        return min(most, request.window_tokens - 1, request.max_num_tokens - 1 - request.num_tokens)

    def _propose(self, scheduler: Scheduler, wanted: Sequence[DraftWanted], num_running: int) -> Sequence[_Draft]:
        """The drafts that the scheduler was given."""
        drafts = [_Draft(one) for one in wanted]
        is_adaptive = self._costs is not None
        for index, drafter in enumerate(self._drafters):
            if not (is_adaptive and drafter.is_costly):
                self._ask(index, [draft for draft in drafts if not draft.token_ids])
        if is_adaptive:
            self._choose_lengths(scheduler, drafts, num_running)
        for draft in drafts:
            self._quiet.note(draft.request_id, has_drafts=bool(draft.token_ids))
            if draft.token_ids:
                scheduler.propose(draft.request_id, list(draft.token_ids))
        proposed = [draft for draft in drafts if draft.token_ids]
        if not proposed:
            self._in_vain = _Expected(max(draft.expected_gain for draft in drafts), num_running)
        return proposed

    def _ask(self, index: int, drafts: Sequence[_Draft]) -> None:
        """Let one of the drafters propose tokens."""
        if drafts:
            found = self._drafters[index].propose([draft.wanted for draft in drafts])
            for draft, token_ids in zip(drafts, found, strict=True):
                draft.token_ids, draft.drafted_by = token_ids[: draft.wanted.num_tokens], index

    def _choose_lengths(self, scheduler: Scheduler, drafts: Sequence[_Draft], num_running: int) -> None:
        """Cut drafts to what pays. A drafter whose proposals cost time is asked for as many as pay, where the others
        had none."""
        costs, last = self._costs, len(self._drafters) - 1
        assert costs is not None, "without costs every draft is taken"
        costly = self._drafters[last]
        is_open = [costly.is_costly and not draft.token_ids for draft in drafts]
        for draft, is_unasked in zip(drafts, is_open, strict=True):
            draft.length = draft.wanted.num_tokens if is_unasked else len(draft.token_ids)
            draft.drafted_by = last if is_unasked else draft.drafted_by

        is_sampled = _are_sampled(scheduler.running)

        def step_s(lengths: Sequence[int], num_drafts: int) -> float:
            drafted = [length for length, is_unasked in zip(lengths, is_open, strict=True) if is_unasked and length]
            return costs.step_s(num_running, num_drafts, is_sampled) + (costly.draft_s(drafted) if drafted else 0.0)

        survival = [self._estimates[draft.drafted_by].survival(draft.request_id, draft.length) for draft in drafts]
        min_gain = MIN_GAIN * self._standings.of(num_running).bias
        budget = draft_budget(survival, num_running, _spare_tokens(scheduler, num_running), step_s, min_gain)
        lengths = budget.lengths
        if any(lengths):
            for draft in drafts:
                draft.expected_gain = budget.gain
        elif any(draft.length for draft in drafts):
            lengths = self._probe(scheduler, drafts, num_running)
        asked = []
        for draft, length, is_unasked in zip(drafts, lengths, is_open, strict=True):
            draft.token_ids = draft.token_ids[:length]
            if is_unasked and length:
                draft.wanted = DraftWanted(draft.wanted.request, length)
                asked.append(draft)
        self._ask(last, asked)

    def _probe(self, scheduler: Scheduler, drafts: Sequence[_Draft], num_running: int) -> Sequence[int]:
        """No drafts pay: let one request have one, so that a change is noticed, and look again after a pause. The same
        one as before, if it can: a draft model has read its prompt."""
        self._standings.of(num_running).pause()
        _await_no_drafts(scheduler)
        able = [index for index, draft in enumerate(drafts) if draft.length]
        probed = next((index for index in able if drafts[index].request_id == self._probed), able[0])
        self._probed = drafts[probed].request_id
        return [min(_PROBE_TOKENS, draft.length) * (index == probed) for index, draft in enumerate(drafts)]

    def while_computing(self, plan: SchedulerOutput) -> None:
        """As in Speculation: the last drafter goes on with what is being judged, as far as the step leaves it time."""
        if self._is_broken or self._costs is None:
            return
        last = len(self._drafters) - 1
        drafted = (r for r in plan.running_requests() if r.drafts_in_flight)
        judged = [r for r in drafted if self._proposed.get(r.request_id, _UNKNOWN).drafted_by == last]
        if not (judged and self._drafters[last].is_costly):
            return
        num_seqs = len(plan.requests)
        num_drafts, is_sampled = sum(plan.num_tokens) - num_seqs, _are_sampled(plan.requests)
        draft_s = self._drafters[last].draft_s([1] * len(judged))
        num_tokens = int(self._costs.step_s(num_seqs, num_drafts, is_sampled) / draft_s)
        if num_tokens > 1:  # the first one stands for the token that follows the last draft
            with self._guard():
                self._drafters[last].ahead(judged, min(num_tokens, self._options.most_tokens + 1))

    # ----------------------------------------------------------------------------------------------------- after a step
    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Speculation."""
        with self._guard():
            for drafter in self._drafters:
                drafter.computed(plan, features)

    def step_took(self, plan: SchedulerOutput, judged: Sequence[JudgedDrafts], duration_s: float) -> None:
        """A step is through. duration_s: from its start to its end, without the drafting before it."""
        num_before, ended_s = self._last_step
        is_timed = self._costs is not None and plan.requests and plan.num_tokens == plan.num_logits
        self._last_step = (len(plan.requests) if is_timed else 0, self._clock())
        drafting_s, self._drafting_s = self._drafting_s, 0.0
        in_vain, self._in_vain = self._in_vain, _NOTHING
        with self._guard():
            proposed = [self._note(one) for one in judged]
            if is_timed and num_before == len(plan.requests):
                interval_s = self._last_step[1] - ended_s
                if 0 < interval_s < _LONGEST_INTERVAL * (duration_s + drafting_s):  # else it has waited for a client
                    expected = max((one.expected for one in proposed), default=in_vain, key=lambda one: one.gain)
                    self._note_interval(plan, judged, expected, interval_s, drafting_s)

    def _note(self, one: JudgedDrafts) -> _Proposed:
        counters, request_id = self.counters, one.request.request_id
        counters.num_drafts += 1
        counters.num_draft_tokens += one.num_draft_tokens
        counters.num_accepted_tokens += one.num_right
        for position in range(one.num_right):
            counters.num_accepted_tokens_per_pos[position] += 1
        for position in range(min(one.num_draft_tokens, one.num_right + 1)):
            counters.num_reached_tokens_per_pos[position] += 1
        proposed = self._proposed.pop(request_id, _UNKNOWN)
        if self._estimates:
            self._estimates[proposed.drafted_by].note(request_id, one.num_draft_tokens, one.num_right)
        return proposed

    def _note_interval(
        self,
        plan: SchedulerOutput,
        judged: Sequence[JudgedDrafts],
        expected: _Expected,
        interval_s: float,
        drafting_s: float,
    ) -> None:
        """interval_s: since the end of the step before, which had as many sequences. drafting_s: how much of it was
        spent drafting; where that overlaps with steps in flight, too much is taken off."""
        assert self._costs is not None, "without costs no step is timed"
        num_seqs, num_drafts = len(plan.requests), sum(plan.num_tokens) - len(plan.requests)
        is_sampled = _are_sampled(plan.requests)
        plain_s = self._costs.step_s(num_seqs, 0, is_sampled)
        self._costs.observe(num_seqs, num_drafts, interval_s - drafting_s, is_sampled)
        num_tokens = 1 + sum(one.num_right for one in judged) / num_seqs  # of each sequence, on average
        self.counters.saved_seconds += num_tokens * plain_s - interval_s if judged else -drafting_s
        if expected.gain:
            self._standings.of(expected.num_running).note(expected.gain, num_tokens * plain_s / interval_s)

    def forget(self, request: Request) -> None:
        """The request has left the engine."""
        self._proposed.pop(request.request_id, None)
        self._quiet.forget(request.request_id)
        with self._guard():
            for drafter, estimates in zip(self._drafters, self._estimates, strict=True):
                estimates.forget(request.request_id)
                drafter.forget(request)


def _looked_at(scheduler: Scheduler) -> Sequence[Request]:
    """Running requests that may get drafts."""
    return [request for request in scheduler.running if not request.is_stalled]


def _await_no_drafts(scheduler: Scheduler) -> None:
    """Requests may be planned ahead of their tokens."""
    for request in scheduler.running:
        request.awaits_drafts = False


def _are_sampled(requests: Sequence[Request]) -> bool:
    return any(request.sampling.temperature > 0 for request in requests)


def _is_ready(request: Request) -> bool:
    """Its last token is known, and all before it are computed."""
    return not request.num_pending_tokens and request.num_tokens - request.num_computed_tokens == 1


def _spare_tokens(scheduler: Scheduler, num_running: int) -> int:
    """Of a step, beside a token of each running request and the prompts that wait for it."""
    budget = scheduler.config.max_num_batched_tokens - num_running
    return max(0, budget - min(scheduler.queues.num_queued_tokens, budget // 2))
