"""What a decision is: targets for all pools as one plan, the order of its steps, and why. Data only."""

from __future__ import annotations

from dataclasses import dataclass

GROW, RETIRE, FLIP = "grow", "retire", "flip"


@dataclass(frozen=True, slots=True)
class Step:
    """One part of a plan. Those whose GPUs are free, or soon will be, come first."""

    kind: str
    """flip: workers change the pool they serve in. retire: they drain and end. grow: new ones are asked for."""
    pool: str
    """Whose workers they are, or will be."""
    num_workers: int
    """How many."""
    to_pool: str = ""
    """flip: where they serve afterwards."""
    after: tuple[str, ...] = ()
    """retire: pools of the same role that must have their targets ready before."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Targets that belong together: carried out as one, or replaced by the next plan."""

    plan_id: int
    """Grows with every plan that differs from the one before."""
    targets: dict[str, int]
    """Workers that serve in each pool when it is carried out."""
    steps: tuple[Step, ...]
    """In order: flips, retirements that make room, growth, retirements of what was replaced."""
    gpus_per_worker: dict[str, int]
    """By pool."""
    max_gpus: int
    """Never exceeded on the way, by ready, starting and draining workers together."""

    @property
    def flips(self) -> tuple[tuple[str, str, int], ...]:
        """From pool, to pool, workers."""
        return tuple((step.pool, step.to_pool, step.num_workers) for step in self.steps if step.kind == FLIP)

    @property
    def num_gpus(self) -> int:
        """When it is carried out."""
        return sum(self.gpus_per_worker[name] * count for name, count in self.targets.items())


@dataclass(frozen=True, slots=True)
class PoolExplanation:
    """Why a pool has its target."""

    pool: str
    role: str
    num_workers: int
    """Ready, starting and on their way from other pools."""
    target: int
    binding: str
    """The constraint that decided: a limit of the policy (ttft, tpot, kv_blocks ...), damping, minimum, maximum,
    pinned, budget, not_reached, hold, off."""
    reason: str
    """In a sentence."""
    num_gpus: int
    """Held or asked for now, those of draining workers included."""
    target_gpus: int
    """Of the target."""
    num_missing: int = 0
    """Workers that were asked for and cannot be had."""
    terms: dict[str, float] | None = None
    """What the policy's number was computed from; units are in the names. None: nothing was computed."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a plan is what it is."""

    plan_id: int
    mode: str
    """As configured: only in mode act is the plan carried out."""
    policy: str
    at_s: float
    """The `now_s` of the decision."""
    num_gpus: int
    """Held or asked for now, in all pools."""
    target_gpus: int
    """Of the plan."""
    max_gpus: int
    """The budget."""
    pools: tuple[PoolExplanation, ...]
    """In the observation's order."""
