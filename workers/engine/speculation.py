"""The seam between an engine and speculative decoding: draft tokens before a step, its outcome after it.

Knows nothing of where drafts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.engine.outcome import JudgedDrafts
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler
from workers.engine.step import SchedulerOutput


@dataclass(slots=True)
class SpeculationCounters:
    """Grow from 0 at the engine's start; the names are vLLM's. Drafts that a grammar cut are not counted."""

    num_drafts: int = 0  # runs of draft tokens
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_reached_tokens_per_pos: list[int] = field(default_factory=list)  # that were judged, all before them accepted
    drafting_seconds: float = 0.0
    saved_seconds: float = 0.0  # by what steps without drafts would have taken; negative where drafts cost time


class Speculation(Protocol):
    """Of one engine, called on its thread."""

    counters: SpeculationCounters

    def propose(self, scheduler: Scheduler) -> None:
        """Before a plan is made: give the scheduler draft tokens for it."""
        ...

    def while_computing(self, plan: SchedulerOutput) -> None:
        """The step is being computed elsewhere, and the engine has nothing to do before it is through."""
        ...

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """A step is through, and its outcome is in the books: hidden states of its tokens, where the drafter wants
        them. Comes before step_took."""
        ...

    def step_took(self, plan: SchedulerOutput, judged: Sequence[JudgedDrafts], duration_s: float) -> None:
        """A step is through. duration_s: from its start to its end, without the drafting before it."""
        ...

    def forget(self, request: Request) -> None:
        """The request has left the engine."""
        ...
