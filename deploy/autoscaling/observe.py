"""From what Serve and the workers say to what planner.scaling decides on. Pure: clocks and connections are elsewhere.

Rates and means come from the differences of the workers' counters between two observations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from switchyard.v1 import worker_pb2

from deploy.autoscaling.serve_api import RUNNING, STOPPING, ServeReplica, ServeState
from deploy.autoscaling.workers import WorkerReport
from deploy.config import ClusterConfig, PoolConfig
from planner.scaling.actions import (
    DRAINED,
    DRAINING,
    READY,
    STARTING,
    SWITCHED,
    Progress,
    WorkerProgress,
)
from planner.scaling.observation import Observation, PoolObservation, StepSample
from planner.scaling.rollout import WorkerCounts

_STATUS = {
    worker_pb2.WORKER_PHASE_READY: READY,
    worker_pb2.WORKER_PHASE_DRAINING: DRAINING,
    worker_pb2.WORKER_PHASE_DRAINED: DRAINED,
    worker_pb2.WORKER_PHASE_SWITCHED: SWITCHED,
}
_FIRST_STARTUP_S = 60.0
_SMOOTHING = 0.5  # weight of the newest start


def worker_id_of(pool: str, replica: ServeReplica) -> str:
    """How the worker of a replica is called in the directory."""
    return f"{pool}-{replica.replica_id}"


def progress_of(state: ServeState, reports: Mapping[str, WorkerReport]) -> Progress:
    """The workers that Serve counts, in the order in which it would end them, and those that it ends already first."""
    workers = [
        _progress(name, replica, reports.get(worker_id_of(name, replica)))
        for name, pool in state.pools.items()
        for replica in _ending_order(pool.replicas, _node_order(state))
    ]
    return Progress(tuple(workers), {name: pool.target_num_replicas for name, pool in state.pools.items()})


def _ending_order(replicas: Sequence[ServeReplica], nodes: Mapping[str, int]) -> list[ServeReplica]:
    """As Serve 2.60 chooses (DeploymentScheduler._get_replicas_to_stop): those that do not run yet, then node by node,
    of one node the newest first."""
    rank = {STOPPING: 0, RUNNING: 2}
    last = len(nodes)
    return sorted(
        replicas, key=lambda r: (rank.get(r.state, 1), nodes.get(r.node_id, last), -r.start_time_s, r.replica_id)
    )


def _node_order(state: ServeState) -> dict[str, int]:
    """Place of each node in the order in which Serve empties them: the head last, those with fewest replicas first, and
    of equal ones that first on which a worker ran first. With a node for each worker that is the oldest worker's."""
    running = [
        replica
        for pool in state.pools.values()
        for replica in sorted(pool.replicas, key=lambda r: r.start_time_s)
        if replica.state == RUNNING
    ]
    counts = Counter(replica.node_id for replica in running)  # in the order of its first use, and sorted() is stable
    ordered = sorted(counts, key=lambda node: (node == state.head_node_id, counts[node]))
    return {node: place for place, node in enumerate(ordered)}


def _progress(pool: str, replica: ServeReplica, report: WorkerReport | None) -> WorkerProgress:
    worker_id = worker_id_of(pool, replica)
    if replica.state == STOPPING:
        return WorkerProgress(worker_id=worker_id, home_pool=pool, pool=pool, status=DRAINING)
    if report is None:
        return WorkerProgress(worker_id=worker_id, home_pool=pool, pool=pool, status=STARTING)
    status = _STATUS.get(report.status.phase, STARTING)
    return WorkerProgress(
        worker_id=worker_id, home_pool=pool, pool=report.status.pool, status=status, epoch=report.leased.epoch
    )


@dataclass(slots=True)
class _Means:
    """Per request; what was seen last, while no request ends."""

    uncached_tokens: float = math.nan
    uncached_tokens_square: float = math.nan
    context_tokens: float = math.nan
    output_tokens: float = math.nan
    kv_wait_s: float = 0.0


@dataclass(slots=True)
class _Sums:
    """Of one pool over one interval."""

    requests_per_s: float = 0.0
    requests: float = 0.0
    prompt_tokens: float = 0.0
    ended: float = 0.0
    uncached_tokens: float = 0.0
    uncached_tokens_squared: float = 0.0
    output_tokens: float = 0.0
    kv_waits: float = 0.0
    kv_wait_s: float = 0.0
    steps: list[StepSample] = field(default_factory=list)


class Observer:
    """Remembers the counters of the last observation."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._before: dict[str, WorkerReport] = {}
        self._means: dict[str, _Means] = {name: _Means() for name in config.pools}
        self.startup_s: dict[str, float] = {}
        """By pool, as measured; kept over a restart by whoever made this."""
        self._starting: dict[str, float] = {}  # Unix time of the start, by worker id

    def note_starts(self, progress: Progress, state: ServeState, now_unix_s: float) -> None:
        """Measure how long workers take to start."""
        began = {worker_id_of(n, r): r.start_time_s for n, pool in state.pools.items() for r in pool.replicas}
        for worker in progress.workers:
            if worker.status == STARTING:
                self._starting.setdefault(worker.worker_id, began[worker.worker_id])
            elif worker.status == READY and worker.worker_id in self._starting:
                took_s = max(0.0, now_unix_s - self._starting.pop(worker.worker_id))
                before_s = self.startup_s.get(worker.home_pool, took_s)
                self.startup_s[worker.home_pool] = before_s + _SMOOTHING * (took_s - before_s)
        alive = {worker.worker_id for worker in progress.workers}
        self._starting = {name: s for name, s in self._starting.items() if name in alive}

    def observe(
        self,
        reports: Mapping[str, WorkerReport],
        counts: Mapping[str, WorkerCounts],
        pins: Mapping[str, int],
        now_s: float,
    ) -> Observation:
        """All pools now. counts: as planner.scaling.rollout.count_workers has them. pins: set by an operator."""
        by_pool: dict[str, list[WorkerReport]] = {name: [] for name in self._config.pools}
        for report in reports.values():
            by_pool.setdefault(report.status.pool, []).append(report)
        observed = tuple(
            self._pool(name, pool, by_pool[name], counts.get(name, WorkerCounts()), pins.get(name), now_s)
            for name, pool in self._config.pools.items()
        )
        self._before = dict(reports)
        return Observation(observed)

    def _pool(
        self,
        name: str,
        pool: PoolConfig,
        reports: list[WorkerReport],
        counts: WorkerCounts,
        pinned: int | None,
        now_s: float,
    ) -> PoolObservation:
        sums = _Sums()
        for report in reports:
            self._add(sums, report)
        means = self._update_means(name, pool.role, sums)
        loads = [report.answer.load for report in reports]
        hellos = [report.answer.worker for report in reports]
        return PoolObservation(
            name=name,
            role=pool.role,
            gpus_per_worker=pool.tp * pool.pp,
            tp=pool.tp,
            pp=pool.pp,
            fingerprint=self._fingerprint(pool, hellos),
            min_workers=pool.min_replicas or pool.replicas,
            max_workers=pool.max_replicas or pool.replicas,
            configured_workers=pool.replicas,
            pinned_workers=pinned,
            num_ready=counts.num_ready,
            num_starting=counts.num_starting,
            num_flipping_in=counts.num_flipping_in,
            num_draining=counts.num_draining,
            startup_s=self.startup_s.get(name, _FIRST_STARTUP_S),
            metrics_age_s=max((now_s - report.at_s for report in reports), default=0.0),
            arrivals_per_s=sums.requests_per_s,
            uncached_tokens_mean=means.uncached_tokens,
            uncached_tokens_square_mean=means.uncached_tokens_square,
            context_tokens_mean=means.context_tokens,
            output_tokens_mean=means.output_tokens,
            num_waiting=sum(load.num_waiting for load in loads),
            num_running=sum(load.num_running + load.num_waiting_for_kv for load in loads),
            num_queued_tokens=float(sum(load.num_queued_tokens for load in loads)),
            num_kv_blocks_used=float(sum(h.num_blocks - x.num_free_blocks for h, x in zip(hellos, loads, strict=True))),
            kv_blocks_per_worker=min((hello.num_blocks for hello in hellos), default=0),
            block_size=max((hello.block_size for hello in hellos), default=16),
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            handoff_s=means.kv_wait_s,
            step_samples=tuple(sums.steps),
        )

    def _fingerprint(self, pool: PoolConfig, hellos: list[worker_pb2.WorkerHello]) -> str:
        """Workers of equal fingerprints hold the same model in the same way on the same kind of device. An empty pool
        may take any of its shape: the model and the block layout are the cluster's."""
        names = {hello.kv_fingerprint.hex() for hello in hellos}
        return f"{pool.device}/{'/'.join(sorted(names)) or self._any_fingerprint()}"

    def _any_fingerprint(self) -> str:
        return next((report.answer.worker.kv_fingerprint.hex() for report in self._before.values()), "")

    def _add(self, sums: _Sums, report: WorkerReport) -> None:
        """What a worker counted since the last observation; a new worker's first interval begins with its start."""
        before = self._before.get(report.leased.record.worker_id)
        now, age_s = report.answer.load, report.status.age_seconds
        then = before.answer.load if before is not None else worker_pb2.WorkerLoad()
        elapsed_s = report.at_s - before.at_s if before is not None else age_s
        if elapsed_s <= 0:
            return
        num_requests = now.num_requests - then.num_requests
        sums.requests_per_s += num_requests / elapsed_s
        sums.requests += num_requests
        sums.prompt_tokens += now.num_prompt_tokens - then.num_prompt_tokens
        sums.ended += now.num_ended_requests - then.num_ended_requests
        uncached = now.num_computed_prompt_tokens - then.num_computed_prompt_tokens
        sums.uncached_tokens += uncached
        sums.uncached_tokens_squared += now.uncached_tokens_squared - then.uncached_tokens_squared
        output = now.num_generated_tokens - then.num_generated_tokens
        sums.output_tokens += output
        sums.kv_waits += now.num_kv_waits - then.num_kv_waits
        sums.kv_wait_s += now.kv_wait_seconds - then.kv_wait_seconds
        num_steps = now.num_steps - then.num_steps
        if num_steps > 0:
            sums.steps.append(
                StepSample(
                    duration_s=(now.step_seconds - then.step_seconds) / num_steps,
                    num_prefill_tokens=uncached / num_steps,
                    num_decode_seqs=output / num_steps,
                    num_context_tokens=(now.step_context_tokens - then.step_context_tokens) / num_steps,
                    worker_age_s=max(0.0, age_s - elapsed_s),
                )
            )

    def _update_means(self, name: str, role: str, sums: _Sums) -> _Means:
        means = self._means[name]
        if sums.requests > 0:
            means.context_tokens = sums.prompt_tokens / sums.requests
        if sums.ended > 0:
            means.uncached_tokens = sums.uncached_tokens / sums.ended
            means.uncached_tokens_square = sums.uncached_tokens_squared / sums.ended
            means.output_tokens = 1.0 if role == "prefill" else sums.output_tokens / sums.ended
        if sums.kv_waits > 0:
            means.kv_wait_s = sums.kv_wait_s / sums.kv_waits
        return means
