"""Before each step of an engine: which requests get draft tokens, how many, and which ones. After it: what became of
them.

Drafts are proposed for requests that decode, and none of whose tokens is being chosen. The engine has no other part in
speculation than that its scheduler takes drafts into its plans. Knows nothing of tensors or clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from workers.config import SpeculativeOptions
from workers.engine.outcome import JudgedDrafts
from workers.engine.request import Request, RequestRole
from workers.engine.scheduler import Scheduler
from workers.engine.speculation import SpeculationCounters
from workers.engine.step import SchedulerOutput
from workers.speculation.acceptance import AcceptanceEstimates
from workers.speculation.drafters.drafter import Drafter, DraftWanted
from workers.speculation.goodput import DraftBudget, GainBias, draft_budget
from workers.speculation.step_costs import StepCosts

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 64  # steps between two probes while no drafts pay
_PROBE_TOKENS = 1
MIN_GAIN = 1.03  # times as many tokens a second as without drafts: less is within the error of the estimates


class Speculator:
    """Of one engine. costs: measured times of steps; without them every proposed draft is taken."""

    def __init__(
        self,
        options: SpeculativeOptions,
        drafter: Drafter,
        costs: StepCosts | None,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._drafter = drafter
        self._costs = costs if options.enable_adaptive_verification else None
        self._clock = clock
        self._estimates = AcceptanceEstimates(options.most_tokens)
        self._pause = 0  # steps to come without a look at drafts
        self._next_pause = 1
        self._drafting_s = 0.0  # before the last step
        self._expected_gain = 0.0  # of the next step; 0: nothing is expected of it
        self._bias = GainBias()
        self._is_broken = False  # the drafter has raised
        self.counters = SpeculationCounters(num_accepted_tokens_per_pos=[0] * options.most_tokens)

    # ---------------------------------------------------------------------------------------------------- before a step
    def propose(self, scheduler: Scheduler) -> None:
        """Give the scheduler drafts for the plan that it makes next."""
        self._drafting_s = self._expected_gain = 0.0
        if self._is_broken:
            return
        try:
            if scheduler.waiting_for_kv:
                self._drafter.prepare(scheduler.waiting_for_kv)
            self._propose_unless_paused(scheduler)
        except Exception:
            log.exception("drafts cannot be proposed any more; decoding goes on without them")
            self._is_broken = True
            for request in scheduler.running:
                request.awaits_drafts, request.draft_token_ids = False, []

    def _propose_unless_paused(self, scheduler: Scheduler) -> None:
        if self._pause:
            self._pause -= 1
            return
        began_s = self._clock()
        running = [r for r in scheduler.running if not r.is_stalled]
        if not running:
            return
        limits = [self._limit(request, len(running)) for request in running]
        is_any = False
        for request, limit in zip(running, limits, strict=True):
            request.awaits_drafts = limit > 0
            is_any |= limit > 0
        if is_any:
            wanted = [DraftWanted(r, k) for r, k in zip(running, limits, strict=True) if k > 0 and _is_ready(r)]
            self._propose(scheduler, wanted, len(running))
            self._drafting_s = self._clock() - began_s
            self.counters.drafting_seconds += self._drafting_s

    def _limit(self, request: Request, num_running: int) -> int:
        """Most draft tokens of a request, whatever they are."""
        if request.role in (RequestRole.PREFILL, RequestRole.EMBED):
            return 0
        most = self._options.most_tokens_at(num_running)
        if request.sampling.num_speculative_tokens is not None:
            most = min(most, request.sampling.num_speculative_tokens)
        return min(most, request.window_tokens - 1, request.max_num_tokens - 1 - request.num_tokens)

    def _propose(self, scheduler: Scheduler, wanted: Sequence[DraftWanted], num_running: int) -> None:
        if not wanted:
            return
        drafts: list[Sequence[int]] = []
        if self._costs is None:
            drafts = self._drafter.propose(wanted)
        elif self._drafter.draft_s([1]) > 0:  # proposals cost time: only those are asked for that pay
            lengths = self._lengths(scheduler, wanted, [one.num_tokens for one in wanted], num_running)
            wanted = [DraftWanted(one.request, k) for one, k in zip(wanted, lengths, strict=True) if k]
            drafts = self._drafter.propose(wanted) if wanted else []
        else:
            drafts = self._drafter.propose(wanted)
            lengths = self._lengths(scheduler, wanted, [len(found) for found in drafts], num_running)
            drafts = [found[:k] for found, k in zip(drafts, lengths, strict=True)]
        for one, found in zip(wanted, drafts, strict=True):
            scheduler.propose(one.request.request_id, list(found[: one.num_tokens]))

    def _lengths(
        self, scheduler: Scheduler, wanted: Sequence[DraftWanted], limits: Sequence[int], num_running: int
    ) -> list[int]:
        """How many draft tokens of each request the step takes."""
        costs = self._costs
        assert costs is not None, "without costs every draft is taken"
        survival = [
            self._estimates.survival(one.request.request_id, limit) for one, limit in zip(wanted, limits, strict=True)
        ]

        def step_s(lengths: Sequence[int], num_drafts: int) -> float:
            return costs.step_s(num_running, num_drafts) + (self._drafter.draft_s(lengths) if num_drafts else 0.0)

        min_gain = MIN_GAIN * self._bias.ratio
        budget = draft_budget(survival, num_running, _spare_tokens(scheduler, num_running), step_s, min_gain)
        if any(budget.lengths):
            self._next_pause, self._expected_gain = 1, budget.gain
        elif any(limits):
            budget = DraftBudget(self._probe(wanted, limits), 0.0)
        return list(budget.lengths)

    def _probe(self, wanted: Sequence[DraftWanted], limits: Sequence[int]) -> list[int]:
        """No drafts pay: let one request have one, so that a change is noticed, and look again after a pause."""
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
        for one in wanted:
            one.request.awaits_drafts = False
        able = [index for index, limit in enumerate(limits) if limit]
        probed = able[self.counters.num_drafts % len(able)]
        return [min(_PROBE_TOKENS, limit) if index == probed else 0 for index, limit in enumerate(limits)]

    # ----------------------------------------------------------------------------------------------------- after a step
    def step_took(self, plan: SchedulerOutput, judged: Sequence[JudgedDrafts], duration_s: float) -> None:
        """A step is through. duration_s: from its start to its end, without the drafting before it."""
        counters = self.counters
        for one in judged:
            counters.num_drafts += 1
            counters.num_draft_tokens += one.num_drafts
            counters.num_accepted_tokens += one.num_right
            for position in range(one.num_right):
                counters.num_accepted_tokens_per_pos[position] += 1
            self._estimates.note(one.request.request_id, one.num_drafts, one.num_right)
        if self._costs is not None and plan.requests and plan.num_tokens == plan.num_logits:
            num_seqs, num_drafts = len(plan.requests), sum(plan.num_tokens) - len(plan.requests)
            plain_s = self._costs.step_s(num_seqs, 0)
            self._costs.observe(num_seqs, num_drafts, duration_s)
            if judged:
                num_tokens = 1 + sum(one.num_right for one in judged) / num_seqs  # of each sequence, on average
                took_s = duration_s + self._drafting_s
                counters.saved_seconds += num_tokens * plain_s - took_s
                if self._expected_gain:
                    self._bias.note(self._expected_gain, num_tokens * plain_s / took_s)

    def forget(self, request: Request) -> None:
        """The request has left the engine."""
        self._estimates.forget(request.request_id)
        if not self._is_broken:
            self._drafter.forget(request)


def _is_ready(request: Request) -> bool:
    """Its last token is known, and all before it are computed."""
    return not request.num_pending_tokens and request.num_tokens - request.num_computed_tokens == 1


def _spare_tokens(scheduler: Scheduler, num_running: int) -> int:
    """Of a step, beside a token of each running request and the prompts that wait for it."""
    budget = scheduler.config.max_num_batched_tokens - num_running
    return max(0, budget - min(scheduler.queues.num_queued_tokens, budget // 2))
