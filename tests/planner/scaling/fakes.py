"""Observations, a cluster that follows actions in virtual time, and the loop that drives decisions over both."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from costs.step_time import StepCost
from planner.scaling.actions import (
    DRAINED,
    DRAINING,
    READY,
    STARTING,
    SWITCHED,
    Action,
    Announce,
    Drain,
    Progress,
    SetReplicas,
    SwitchRole,
    WorkerProgress,
)
from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation, PoolObservation, StepSample
from planner.scaling.plan import Explanation, Plan, PoolExplanation
from planner.scaling.rollout import RolloutState, adopt, advance, count_workers

COSTS = {
    "prefill": StepCost(0.01, 5e-5, 0.0, 0.0),  # a prompt of 1,000 tokens takes about 75 ms
    "decode": StepCost(0.01, 0.0, 2e-4, 1e-8),  # 32 streams take 17 ms a step
    "mixed": StepCost(0.01, 5e-5, 2e-4, 1e-8),
}


def samples(cost: StepCost, worker_age_s: float = 1e6, factor: float = 1.0) -> tuple[StepSample, ...]:
    """Steps of all sizes, measured without error."""
    sizes = itertools.product((0, 100, 400), (0, 4, 32), (0, 4_000, 60_000))
    return tuple(
        StepSample(
            duration_s=factor * cost.step_s(prefill, seqs, context),
            num_prefill_tokens=prefill,
            num_decode_seqs=seqs,
            num_context_tokens=context,
            worker_age_s=worker_age_s,
        )
        for prefill, seqs, context in sizes
    )


def pool(role: str = "prefill", **changes: object) -> PoolObservation:
    """A pool of one ready worker of one GPU that gets prompts of 1,000 tokens and gives 200."""
    base = PoolObservation(
        name=role,
        role=role,
        max_workers=32,
        num_ready=1,
        startup_s=60.0,
        uncached_tokens_mean=1000.0,
        uncached_tokens_square_mean=1.2e6,
        context_tokens_mean=1000.0,
        output_tokens_mean=200.0,
        kv_blocks_per_worker=20_000,
        step_samples=samples(COSTS[role]),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def act(**changes: object) -> AutoscalingConfig:
    """A configuration that acts."""
    return dataclasses.replace(AutoscalingConfig(mode="act"), **changes)  # type: ignore[arg-type]


def explained(explanation: Explanation, name: str) -> PoolExplanation:
    """The part of one pool."""
    return next(part for part in explanation.pools if part.pool == name)


def repeat(
    observation: Observation | Sequence[PoolObservation],
    config: AutoscalingConfig,
    seconds: float,
    state: ScalingState | None = None,
    start_s: float = 0.0,
) -> tuple[Plan, ScalingState, Explanation]:
    """The last of decisions on the same observation, at every interval for so long."""
    seen = observation if isinstance(observation, Observation) else Observation(tuple(observation))
    state, now_s = state or ScalingState(), start_s
    while True:
        plan, state, explanation = decide(seen, state, now_s, config)
        if now_s >= start_s + seconds:
            return plan, state, explanation
        now_s += config.interval_s


@dataclass(slots=True)
class FakeWorker:
    """One worker."""

    worker_id: str
    home: str
    pool: str
    number: int
    status: str = STARTING
    epoch: int = 1
    since_s: float = 0.0
    """Of its status."""
    ends_at_s: float = math.inf
    """Serve has chosen it."""


@dataclass(slots=True)
class FakeCluster:
    """Starts and drains take their time; nodes may be too few. Ends workers in Serve's order."""

    gpus_per_worker: dict[str, int]
    startup_s: float = 60.0
    drain_s: float = 20.0
    end_s: float = 0.0
    """From Serve's choice of a worker to its end."""
    most_nodes_gpus: int = 10**6
    """GPUs of the nodes that can be had: beyond them workers start for ever."""
    now_s: float = 0.0
    workers: list[FakeWorker] = field(default_factory=list)
    replicas: dict[str, int] = field(default_factory=dict)
    ended_while_serving: list[str] = field(default_factory=list)
    most_gpus: int = 0
    history: list[str] = field(default_factory=list)
    """Actions and changes, in order."""
    _number: int = 0

    def start_with(self, counts: Mapping[str, int]) -> FakeCluster:
        """Ready workers."""
        for name, count in counts.items():
            self.replicas[name] = count
            for _ in range(count):
                self._add(name).status = READY
        return self

    def _add(self, home: str) -> FakeWorker:
        self._number += 1
        worker = FakeWorker(f"{home}-{self._number}", home, home, self._number, since_s=self.now_s)
        self.workers.append(worker)
        self.most_gpus = max(self.most_gpus, self.gpus())
        return worker

    def gpus(self) -> int:
        return sum(self.gpus_per_worker[worker.home] for worker in self.workers)

    def order(self) -> list[FakeWorker]:
        return sorted(self.workers, key=lambda w: (w.status != STARTING, -w.number))

    def ready(self, name: str) -> int:
        """Those that Serve is ending are left out."""
        return sum(w.pool == name and w.status == READY and w.ends_at_s == math.inf for w in self.workers)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.workers = [worker for worker in self.workers if worker.ends_at_s > self.now_s]
        used = sum(self.gpus_per_worker[w.home] for w in self.workers if w.status != STARTING)
        for worker in self.workers:
            elapsed_s = self.now_s - worker.since_s
            gpus = self.gpus_per_worker[worker.home]
            if worker.status == STARTING and elapsed_s >= self.startup_s and used + gpus <= self.most_nodes_gpus:
                worker.status, worker.since_s, used = READY, self.now_s, used + gpus
                self.history.append(f"{worker.worker_id} ready in {worker.pool}")
            elif worker.status == DRAINING and elapsed_s >= self.drain_s:
                worker.status, worker.since_s = DRAINED, self.now_s
                self.history.append(f"{worker.worker_id} drained")

    def progress(self) -> Progress:
        seen = tuple(
            WorkerProgress(worker_id=w.worker_id, home_pool=w.home, pool=w.pool, status=w.status, epoch=w.epoch)
            for w in self.order()
        )
        return Progress(seen, dict(self.replicas))

    def act(self, actions: Iterable[Action]) -> None:
        by_id = {worker.worker_id: worker for worker in self.workers}
        for action in actions:
            self.history.append(str(action))
            match action:
                case SetReplicas(name, count):
                    self._scale(name, count)
                case Drain(worker_id) if by_id[worker_id].status == READY:
                    by_id[worker_id].status, by_id[worker_id].since_s = DRAINING, self.now_s
                case SwitchRole(worker_id, to_pool, epoch) if by_id[worker_id].status == DRAINED:
                    worker = by_id[worker_id]
                    worker.pool, worker.epoch, worker.status = to_pool, epoch, SWITCHED
                case Announce(worker_id, epoch):
                    worker = by_id[worker_id]
                    worker.epoch, worker.status, worker.since_s = epoch, READY, self.now_s

    def _scale(self, name: str, count: int) -> None:
        self.replicas[name] = count
        existing = [w for w in self.order() if w.home == name and w.ends_at_s == math.inf]
        for worker in existing[: max(0, len(existing) - count)]:
            if worker.status not in (STARTING, DRAINED):
                self.ended_while_serving.append(worker.worker_id)
            worker.ends_at_s = self.now_s + self.end_s
            if not self.end_s:
                self.workers.remove(worker)
        for _ in range(count - len(existing)):
            self._add(name)


@dataclass(slots=True)
class Loop:
    """Decisions every interval, the rollout every 5 s. demand: changes of each pool's template, by time."""

    config: AutoscalingConfig
    templates: Sequence[PoolObservation]
    cluster: FakeCluster
    demand: Callable[[float], Mapping[str, Mapping[str, object]]] = lambda now_s: {}
    scaling: ScalingState = field(default_factory=ScalingState)
    rollout: RolloutState = field(default_factory=RolloutState)
    observations: list[Observation] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)

    def observe(self) -> Observation:
        """The templates with the cluster's counts and the demand of now."""
        counted = count_workers(self.rollout, self.cluster.progress())
        demand = self.demand(self.cluster.now_s)
        return Observation(
            tuple(
                dataclasses.replace(
                    template,
                    **dataclasses.asdict(counted[template.name]),
                    **demand.get(template.name, {}),
                )
                for template in self.templates
            )
        )

    def run(self, seconds: float) -> Loop:
        """Let so much time pass."""
        end_s = self.cluster.now_s + seconds
        while self.cluster.now_s < end_s:
            self.cluster.pass_time(5.0)
            if self.cluster.now_s % self.config.interval_s == 0:
                seen, now_s = self.observe(), self.cluster.now_s
                plan, self.scaling, explanation = decide(seen, self.scaling, now_s, self.config)
                self.observations.append(seen)
                self.plans.append(plan)
                self.explanations.append(explanation)
                self.rollout = adopt(self.rollout, plan)
            self.rollout, actions = advance(self.rollout, self.cluster.progress())
            self.cluster.act(actions)
        return self

    def reversals(self, name: str) -> int:
        """How often the pool's target turned round."""
        targets = [plan.targets[name] for plan in self.plans]
        moves = [b - a for a, b in itertools.pairwise(targets) if a != b]
        return sum(a * b < 0 for a, b in itertools.pairwise(moves))
