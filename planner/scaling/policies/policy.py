"""What a scaling policy is: a pure function of one pool, with no memory of its own.

Damping, minimums, flips and the budget are the same for all policies: see planner.scaling.decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from costs.step_time import StepCostFit
from planner.scaling.forecast import Trend
from planner.scaling.observation import PoolObservation


@dataclass(frozen=True, slots=True)
class Learned:
    """What decisions remember of a pool's demand and speed."""

    arrivals: Trend | None = None
    steps: StepCostFit = field(default_factory=StepCostFit)


@dataclass(frozen=True, slots=True)
class Want:
    """How many workers a pool needs. Between the two numbers it is left as it is."""

    least: int
    """With fewer it should grow."""
    enough: int
    """With more it may shrink."""
    binding: str
    """The constraint that needs `least`."""
    terms: dict[str, float]
    """What it was computed from; units are in the names."""
    unreachable: str = ""
    """An objective that no number of workers reaches; empty: none."""


@dataclass(frozen=True, slots=True)
class Hold:
    """The pool stays as it is."""

    reason: str


class ScalingPolicy(Protocol):
    """Made from the configuration."""

    def want(self, pool: PoolObservation, learned: Learned) -> Want | Hold:
        """For one pool whose figures are fresh."""
        ...
