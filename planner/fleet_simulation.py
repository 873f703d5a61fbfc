"""A fleet in virtual time, scaled by the production code: the decisions and the rollout of planner.scaling.

Coarse on purpose, for comparing policies: prefill is one first-come-first-served queue before its workers, decode a
batch per worker whose step time is linear in its streams and their context. There is no prefix cache and no
preemption, and a stream that loses its worker goes on at another one. Pools of prefill and of decode only.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation, PoolObservation, StepSample
from planner.scaling.plan import Explanation
from planner.scaling.policies.policy import ScalingPolicy
from planner.scaling.rollout import (
    DRAINED,
    DRAINING,
    READY,
    STARTING,
    SWITCHED,
    Action,
    Announce,
    Drain,
    Progress,
    RolloutState,
    SetReplicas,
    SwitchRole,
    WorkerCounts,
    WorkerProgress,
    adopt,
    advance,
    count_workers,
)
from planner.scaling.step_cost import StepCost
from planner.trace import TraceRequest

_TICK_S = 5.0  # between two looks of the rollout
_RATE_WINDOW_S, _LENGTH_WINDOW_S = 30.0, 300.0  # over which arrivals are counted, and lengths averaged
_RUN_OUT_S = 900.0  # after the last arrival; what has not ended then counts as missed
_MEASURING_ERROR = 0.03  # of step times


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
class _Stream:
    """One request."""

    request: TraceRequest
    first_token_s: float = 0.0
    num_done: float = 0.0
    """Tokens decoded, at the last move."""
    ends_at: float = 0.0
    """On its worker's count of steps."""


@dataclass(slots=True, eq=False)
class _Worker:
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
    prompt: _Stream | None = None
    # decode: all streams get a token each step, so one count of steps is enough
    streams: list[tuple[float, int, _Stream]] = field(default_factory=list)
    steps_done: float = 0.0
    at_s: float = 0.0
    context: float = 0.0
    version: int = 0


class _Fleet:
    def __init__(self, trace: Sequence[TraceRequest], pools: Sequence[FleetPool], seed: int) -> None:
        self.now_s = 0.0
        self.pools = {pool.name: pool for pool in pools}
        self.by_role = {pool.role: pool for pool in pools}
        self.replicas = {pool.name: pool.workers for pool in pools}
        self.workers: list[_Worker] = []
        self.result = FleetResult(len(trace), counts={pool.name: [] for pool in pools})
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, str, object]] = []
        self._number = 0
        self._prompts: deque[_Stream] = deque()
        self._waiting: deque[_Stream] = deque()  # prefilled, and no decode worker has room
        self._recent: deque[TraceRequest] = deque()
        self._ended = 0  # requests of earlier observations
        self._samples: dict[str, list[StepSample]] = {name: [] for name in self.pools}
        self._charged_s = 0.0
        for pool in pools:
            for _ in range(pool.workers):
                self._start(pool.name, 0.0).status = READY
        for request in trace:
            self.at(request.arrival_s, "arrival", request)

    # ---- time

    def at(self, time_s: float, kind: str, subject: object = None) -> None:
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, kind, subject))

    def next(self) -> tuple[str, object]:
        time_s, _, kind, subject = heapq.heappop(self._events)
        self.now_s = max(self.now_s, time_s)
        return kind, subject

    def charge(self) -> None:
        """GPU time up to now; called before the number of workers changes."""
        gpus = self.num_gpus()
        self.result.gpu_s += gpus * (self.now_s - self._charged_s)
        self._charged_s = self.now_s

    def num_gpus(self) -> int:
        return sum(self.pools[worker.home].gpus_per_worker for worker in self.workers)

    # ---- workers

    def _start(self, pool: str, startup_s: float) -> _Worker:
        self.charge()
        self._number += 1
        worker = _Worker(f"{pool}-{self._number}", pool, pool, self._number)
        self.workers.append(worker)
        self.result.most_gpus = max(self.result.most_gpus, self.num_gpus())
        if startup_s:
            self.at(self.now_s + startup_s, "ready", worker)
        return worker

    def become_ready(self, worker: _Worker) -> None:
        if worker in self.workers and worker.status == STARTING:
            worker.status, worker.ready_at_s = READY, self.now_s
            self.serve()

    def _end(self, worker: _Worker) -> None:
        """What it has under way goes on elsewhere; with none left, nobody notices."""
        self.charge()
        self.workers.remove(worker)
        if worker.prompt is not None:
            self._prompts.appendleft(worker.prompt)
            self.result.num_killed_streams += 1
            worker.prompt = None
        self.result.num_killed_streams += len(worker.streams)
        self._move_streams(worker)

    def _move_streams(self, worker: _Worker) -> None:
        self._decoded(worker)
        for ends_at, _, stream in worker.streams:
            stream.num_done = stream.request.num_output_tokens - (ends_at - worker.steps_done)
            self._waiting.append(stream)
        worker.streams, worker.context, worker.version = [], 0.0, worker.version + 1

    def _order(self) -> list[_Worker]:
        """In which Serve ends workers."""
        return sorted(self.workers, key=lambda w: (w.status != STARTING, -w.number))

    def progress(self) -> Progress:
        for worker in self.workers:
            if worker.status == DRAINING:
                if self.now_s - worker.draining_since_s > self.pools[worker.pool].drain_timeout_s:
                    self._move_streams(worker)
                if worker.prompt is None and not worker.streams:
                    worker.status = DRAINED
        seen = tuple(
            WorkerProgress(worker_id=w.worker_id, home_pool=w.home, pool=w.pool, status=w.status, epoch=w.epoch)
            for w in self._order()
        )
        return Progress(seen, dict(self.replicas))

    def act(self, actions: Sequence[Action]) -> None:
        by_id = {worker.worker_id: worker for worker in self.workers}
        for action in actions:
            match action:
                case SetReplicas(pool, count):
                    self.replicas[pool] = count
                    existing = [worker for worker in self._order() if worker.home == pool]
                    for worker in existing[: max(0, len(existing) - count)]:
                        self._end(worker)
                    for _ in range(count - len(existing)):
                        self._start(pool, self.pools[pool].startup_s)
                case Drain(name) if by_id[name].status == READY:
                    by_id[name].status, by_id[name].draining_since_s = DRAINING, self.now_s
                case SwitchRole(name, to_pool, epoch):
                    by_id[name].pool, by_id[name].epoch, by_id[name].status = to_pool, epoch, SWITCHED
                    self.result.num_flips += 1
                case Announce(name, epoch):
                    by_id[name].epoch, by_id[name].status = epoch, READY
                case _:
                    pass
        self.serve()

    # ---- requests

    def arrive(self, request: TraceRequest) -> None:
        self._recent.append(request)
        self._prompts.append(_Stream(request))
        self.serve()

    def serve(self) -> None:
        """Prompts to idle workers, prefilled streams to those with room."""
        pool = self.by_role["prefill"]
        idle = [w for w in self.workers if w.pool == pool.name and w.status == READY and w.prompt is None]
        for worker in idle:
            if not self._prompts:
                break
            worker.prompt = stream = self._prompts.popleft()
            tokens = stream.request.num_prompt_tokens
            steps = -(-tokens // pool.max_num_batched_tokens)
            step_s = pool.cost.step_s(tokens / steps, 0, 0)
            self._sample(worker, step_s, tokens / steps, 0, 0)
            self.at(self.now_s + steps * step_s, "prefilled", (worker, stream))
        while self._waiting and self._decode(self._waiting[0]):
            self._waiting.popleft()

    def prefilled(self, worker: _Worker, stream: _Stream) -> None:
        if worker.prompt is not stream:
            return  # it ended before
        worker.prompt = None
        stream.first_token_s = self.now_s
        self._waiting.append(stream)
        self.serve()

    def _decode(self, stream: _Stream) -> bool:
        pool = self.by_role["decode"]
        tokens = stream.request.num_prompt_tokens + stream.num_done
        able = [
            w for w in self.workers if w.pool == pool.name and w.status == READY and len(w.streams) < pool.max_num_seqs
        ]
        worker = min(able, key=lambda w: len(w.streams), default=None)
        if worker is None or (worker.streams and worker.context + tokens > pool.kv_tokens):
            return False
        self._decoded(worker)
        stream.ends_at = worker.steps_done + max(0.0, stream.request.num_output_tokens - stream.num_done)
        self._number += 1
        heapq.heappush(worker.streams, (stream.ends_at, self._number, stream))
        worker.context += tokens
        self._expect_end(worker)
        return True

    def _step_s(self, worker: _Worker) -> float:
        return self.pools[worker.pool].cost.step_s(0, len(worker.streams), worker.context)

    def _decoded(self, worker: _Worker) -> None:
        """Bring a worker's steps up to now."""
        if worker.streams:
            steps = (self.now_s - worker.at_s) / self._step_s(worker)
            worker.steps_done += steps
            worker.context += steps * len(worker.streams)
        worker.at_s = self.now_s

    def _expect_end(self, worker: _Worker) -> None:
        worker.version += 1
        if worker.streams:
            left = max(0.0, worker.streams[0][0] - worker.steps_done)
            self.at(self.now_s + left * self._step_s(worker), "decoded", (worker, worker.version))

    def decoded(self, worker: _Worker, version: int) -> None:
        if version != worker.version:
            return
        self._decoded(worker)
        while worker.streams and worker.streams[0][0] <= worker.steps_done + 1e-6:
            _, _, stream = heapq.heappop(worker.streams)
            request = stream.request
            worker.context -= request.num_prompt_tokens + request.num_output_tokens
            self.result.ttft_s.append(stream.first_token_s - request.arrival_s)
            decode_s = self.now_s - stream.first_token_s
            self.result.tpot_s.append(decode_s / max(1, request.num_output_tokens))
        worker.context = max(0.0, worker.context) if worker.streams else 0.0
        self._expect_end(worker)
        self.serve()

    # ---- what is observed

    def _sample(self, worker: _Worker, step_s: float, prefill: float, seqs: float, context: float) -> None:
        samples = self._samples[worker.pool]
        if len(samples) < 32:
            error = 1 + self._rng.gauss(0, _MEASURING_ERROR)
            samples.append(
                StepSample(
                    duration_s=step_s * max(0.5, error),
                    num_prefill_tokens=prefill,
                    num_decode_seqs=seqs,
                    num_context_tokens=context,
                    worker_age_s=self.now_s - worker.ready_at_s if worker.ready_at_s else 1e6,
                )
            )

    def observe(self, counted: Mapping[str, WorkerCounts]) -> Observation:
        while self._recent and self._recent[0].arrival_s < self.now_s - _LENGTH_WINDOW_S:
            self._recent.popleft()
        window_s = min(_RATE_WINDOW_S, max(self.now_s, 1.0))
        rate = sum(r.arrival_s >= self.now_s - window_s for r in self._recent) / window_s
        for worker in self.workers:
            if worker.streams and worker.status == READY:
                self._decoded(worker)
                self._expect_end(worker)
                self._sample(worker, self._step_s(worker), 0, len(worker.streams), worker.context)
        observed = tuple(self._observe(pool, rate, counted) for pool in self.pools.values())
        self._ended = len(self.result.ttft_s)
        return Observation(observed)

    def _observe(self, pool: FleetPool, rate: float, counted: Mapping[str, WorkerCounts]) -> PoolObservation:
        count = max(1, len(self._recent))
        here, counts = [worker for worker in self.workers if worker.pool == pool.name], counted[pool.name]
        prefill = pool.role == "prefill"
        prompts = [stream.request.num_prompt_tokens for stream in self._prompts] if prefill else []
        samples, self._samples[pool.name] = self._samples[pool.name], []
        return PoolObservation(
            name=pool.name,
            role=pool.role,
            gpus_per_worker=pool.gpus_per_worker,
            tp=pool.gpus_per_worker,
            min_workers=pool.min_workers,
            max_workers=pool.max_workers,
            configured_workers=pool.workers,
            num_ready=counts.num_ready,
            num_starting=counts.num_starting,
            num_flipping_in=counts.num_flipping_in,
            num_draining=counts.num_draining,
            startup_s=pool.startup_s,
            arrivals_per_s=rate,
            uncached_tokens_mean=sum(r.num_prompt_tokens for r in self._recent) / count,
            uncached_tokens_square_mean=sum(r.num_prompt_tokens**2 for r in self._recent) / count,
            context_tokens_mean=sum(r.num_prompt_tokens for r in self._recent) / count,
            output_tokens_mean=sum(r.num_output_tokens for r in self._recent) / count,
            num_waiting=len(self._prompts) if prefill else len(self._waiting),
            num_running=sum((w.prompt is not None) + len(w.streams) for w in here),
            num_queued_tokens=float(sum(prompts)),
            num_kv_blocks_used=sum(w.context for w in here) / 16,
            kv_blocks_per_worker=pool.kv_tokens // 16,
            block_size=16,
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            ttft_mean_s=_mean(self.result.ttft_s[self._ended :]),
            tpot_mean_s=_mean(self.result.tpot_s[self._ended :]),
            step_samples=tuple(samples),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def simulate(
    trace: Sequence[TraceRequest],
    pools: Sequence[FleetPool],
    config: AutoscalingConfig,
    policy: ScalingPolicy | None = None,
    seed: int = 0,
) -> FleetResult:
    """Play a trace against one pool of prefill and one of decode; policy as in decide. The same seed gives the same."""
    fleet = _Fleet(trace, pools, seed)
    scaling, rollout = ScalingState(), RolloutState()
    decide_at_s = config.interval_s
    ends_s = (trace[-1].arrival_s if trace else 0.0) + _RUN_OUT_S
    fleet.at(_TICK_S, "tick")
    while len(fleet.result.ttft_s) < len(trace) and fleet.now_s < ends_s:
        match fleet.next():
            case "arrival", TraceRequest() as request:
                fleet.arrive(request)
            case "ready", _Worker() as worker:
                fleet.become_ready(worker)
            case "prefilled", (_Worker() as worker, _Stream() as stream):
                fleet.prefilled(worker, stream)
            case "decoded", (_Worker() as worker, int(version)):
                fleet.decoded(worker, version)
            case "tick", _:
                fleet.at(fleet.now_s + _TICK_S, "tick")
                progress = fleet.progress()
                if fleet.now_s >= decide_at_s:
                    decide_at_s += config.interval_s
                    observation = fleet.observe(count_workers(rollout, progress))
                    plan, scaling, explanation = decide(observation, scaling, fleet.now_s, config, policy)
                    rollout = adopt(rollout, plan)
                    fleet.result.explanations.append(explanation)
                    for name, target in plan.targets.items():
                        fleet.result.counts[name].append(target)
                rollout, actions = advance(rollout, progress)
                fleet.act(actions)
    fleet.charge()
    fleet.result.duration_s = fleet.now_s
    return fleet.result
