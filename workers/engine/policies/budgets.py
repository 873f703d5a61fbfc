"""What each step may take: the token budget, and of it what prompts may have beside streams that run.

With a target for the time between two tokens the second part is learnt from the steps that were measured
(workers.engine.policies.prefill_budget); without one it is all of the budget. In a pipeline of n stages a stream gets a
token in every n-th plan, so a plan may take one n-th of the target. Pure; reads no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.config import SchedulingOptions
from workers.engine.pipeline import PlanSpread
from workers.engine.policies.prefill_budget import PrefillBudget, StepBudget
from workers.engine.request import Request
from workers.engine.step import SchedulerOutput


class StepBudgets:
    """Of one engine."""

    def __init__(self, options: SchedulingOptions, num_tokens: int, num_stages: int) -> None:
        target_s = options.tpot_target_s / num_stages
        self._num_tokens = num_tokens
        self._prefill = PrefillBudget(target_s, options.min_prefill_tokens) if target_s else None

    def next(self, running: Sequence[Request], spread: PlanSpread) -> StepBudget:
        """Of the plan that is being made; spread has begun it."""
        if self._prefill is None:
            return StepBudget(self._num_tokens, self._num_tokens)
        contexts = [r.num_computed_tokens for r in running if _is_decoding(r) and not spread.awaits_turn(r)]
        contexts = contexts[: spread.max_running]
        if not contexts:
            return StepBudget(self._num_tokens, self._num_tokens)
        beside = max(1, self._num_tokens - len(contexts))  # prompts must come to an end
        return StepBudget(self._num_tokens, min(beside, self._prefill.num_tokens(len(contexts), sum(contexts))))

    def step_took(self, plan: SchedulerOutput, duration_s: float, since_last_s: float) -> None:
        """A step was measured: from its start to its end, and from the end of the step before."""
        if self._prefill is not None and plan.requests:
            # Streams notice what lies between two steps, too, unless the engine was idle.
            noticed_s = since_last_s if since_last_s < 2 * duration_s else duration_s
            self._prefill.observe(plan.work(), noticed_s)


def _is_decoding(request: Request) -> bool:
    left = len(request.token_ids) + request.num_pending_tokens - request.num_computed_tokens
    return left == 1 and request.window_tokens > 0
