"""What a simulated fleet is made of, and what a simulation gives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from costs.step_time import StepCost
from planner.scaling.actions import STARTING
from planner.scaling.plan import Explanation
from planner.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPool:
    """One pool, as it starts and as fast as its workers are."""

    name: str
    role: str
    cost: StepCost
    workers: int = 1
    """At the start, ready."""
    min_workers: int = 1
    max_workers: int = 64
    gpus_per_worker: int = 1
    startup_s: float = 120.0
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    kv_tokens: int = 400_000
    """Of one worker."""
    drain_timeout_s: float = 120.0


@dataclass(slots=True)
class FleetResult:
    """What a simulation gave."""

    num_requests: int
    ttft_s: list[float] = field(default_factory=list)
    """Of finished requests."""
    tpot_s: list[float] = field(default_factory=list)
    """In the same order."""
    gpu_s: float = 0.0
    """Of workers that exist: starting and draining ones too."""
    most_gpus: int = 0
    """At any time."""
    num_killed_streams: int = 0
    """Streams whose worker ended under them, and that went on elsewhere."""
    num_moved_streams: int = 0
    """Streams whose worker did not drain in time, and that went on elsewhere."""
    num_unfinished: int = 0
    """Requests that were still under way when the simulation ended."""
    num_flips: int = 0
    duration_s: float = 0.0
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Targets of each pool, decision by decision."""
    explanations: list[Explanation] = field(default_factory=list)

    def attainment(self, ttft_s: float, tpot_s: float) -> float:
        """Share of all requests that kept to both objectives."""
        kept = sum(a <= ttft_s and b <= tpot_s for a, b in zip(self.ttft_s, self.tpot_s, strict=True))
        return kept / max(1, self.num_requests)

    def reversals(self, pool: str) -> int:
        """How often the pool's target turned round."""
        counts = self.counts[pool]
        moves = [b - a for a, b in itertools.pairwise(counts) if a != b]
        return sum(a * b < 0 for a, b in itertools.pairwise(moves))


@dataclass(slots=True, eq=False)
class Stream:
    """One request."""

    request: TraceRequest
    first_token_s: float = 0.0
    num_done: float = 0.0
    """Tokens decoded, at the last move."""
    ends_at: float = 0.0
    """On its worker's count of steps."""


@dataclass(slots=True, eq=False)
class Worker:
    """One worker of either role."""

    worker_id: str
    home: str
    pool: str
    number: int
    status: str = STARTING
    ready_at_s: float = 0.0
    draining_since_s: float = 0.0
    epoch: int = 1
    # prefill
    prompt: Stream | None = None
    # decode: all streams get a token each step, so one count of steps is enough
    streams: list[tuple[float, int, Stream]] = field(default_factory=list)
    steps_done: float = 0.0
    at_s: float = 0.0
    context: float = 0.0
    version: int = 0
