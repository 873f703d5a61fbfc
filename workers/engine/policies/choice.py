"""Which class a configuration means."""

from __future__ import annotations

from collections.abc import Callable

from workers.config import SchedulingOptions
from workers.engine.policies.fair_share import FairShare
from workers.engine.policies.orders import ByDeadline, ByPriority, FirstCome
from workers.engine.policies.policy import SchedulingPolicy

_POLICIES: dict[str, Callable[[SchedulingOptions], SchedulingPolicy]] = {
    "fcfs": lambda options: FirstCome(),
    "priority": lambda options: ByPriority(options.priority_ageing_s),
    "deadline": lambda options: ByDeadline(options.deadline_patience_s),
    "fair_share": lambda options: FairShare(options.prompt_token_weight, options.output_token_weight),
}


def make_policy(options: SchedulingOptions) -> SchedulingPolicy:
    """A policy for one engine."""
    return _POLICIES[options.policy](options)
