"""From what Serve and the workers say to what planner.scaling decides on. Pure: clocks and connections are elsewhere.

Rates and means come from the differences of the workers' counters between two observations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from switchyard.v1 import worker_pb2

from deploy.autoscaling.serve_api import RUNNING, STOPPING, ServeReplica, ServeState
from deploy.autoscaling.workers import WorkerReport
from deploy.config import ClusterConfig, PoolConfig
from planner.scaling.actions import (
    DRAINED,
    DRAINING,
    READY,
    SILENT,
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


def progress_of(
    state: ServeState, reports: Mapping[str, WorkerReport], last_pools: Mapping[str, str] | None = None
) -> Progress:
    """The workers that Serve counts, in the order in which it would end them, and those that it ends already first.

    last_pools: where workers were last heard to serve, by id.
    """
    workers = [
        _progress(name, replica, reports.get(worker_id_of(name, replica)), last_pools or {})
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


def _progress(
    home: str, replica: ServeReplica, report: WorkerReport | None, last_pools: Mapping[str, str]
) -> WorkerProgress:
    worker_id = worker_id_of(home, replica)
    pool, epoch = last_pools.get(worker_id, home), 0
    status = SILENT if replica.state == RUNNING else STARTING
    if report is not None:
        pool, epoch = report.status.pool, report.leased.epoch
        status = _STATUS.get(report.status.phase, SILENT)
    if replica.state == STOPPING:
        status = DRAINING
    return WorkerProgress(worker_id=worker_id, home_pool=home, pool=pool, status=status, epoch=epoch)


def _is_ready(report: WorkerReport) -> bool:
    return report.status.phase == worker_pb2.WORKER_PHASE_READY


@dataclass(slots=True)
class _Means:
    """Per request; what was seen last, while no request ends."""

    uncached_tokens: float = math.nan
    uncached_tokens_square: float = math.nan
    context_tokens: float = math.nan
    output_tokens: float = math.nan
    kv_wait_s: float = 0.0

    def update(self, sums: _Sums) -> None:
        """Take what an interval has shown."""
        if sums.requests > 0:
            self.context_tokens = sums.prompt_tokens / sums.requests
        if sums.ended > 0:
            self.uncached_tokens = sums.uncached_tokens / sums.ended
            self.uncached_tokens_square = sums.uncached_tokens_squared / sums.ended
            self.output_tokens = sums.output_tokens / sums.ended
        if sums.kv_waits > 0:
            self.kv_wait_s = sums.kv_wait_s / sums.kv_waits


@dataclass(slots=True)
class _Sums:
    """Over the workers of one pool and one interval. Tokens are those of requests that ended."""

    num_ready: int = 0
    num_ready_measured: int = 0
    """Those of them whose counters are known from the interval's start on."""
    ready_requests_per_s: float = 0.0
    """What the measured ones got."""
    left_requests_per_s: float = 0.0
    """What workers got that have left since, as far as that is known."""
    requests: float = 0.0
    prompt_tokens: float = 0.0
    ended: float = 0.0
    uncached_tokens: float = 0.0
    uncached_tokens_squared: float = 0.0
    output_tokens: float = 0.0
    kv_waits: float = 0.0
    kv_wait_s: float = 0.0
    steps: list[StepSample] = field(default_factory=list)

    @property
    def arrivals_per_s(self) -> float:
        """As if all ready workers got what the measured ones got; NaN while none of them is measured."""
        if self.num_ready and not self.num_ready_measured:
            return math.nan
        return self.left_requests_per_s + self.ready_requests_per_s * self.num_ready / max(1, self.num_ready_measured)

    def add(self, report: WorkerReport, then: worker_pb2.WorkerLoad, elapsed_s: float) -> None:
        """What a worker has counted since `then`."""
        now = report.answer.load
        requests_per_s = (now.num_requests - then.num_requests) / elapsed_s
        if _is_ready(report):
            self.num_ready_measured += 1
            self.ready_requests_per_s += requests_per_s
        else:
            self.left_requests_per_s += requests_per_s
        self.requests += now.num_requests - then.num_requests
        self.prompt_tokens += now.num_prompt_tokens - then.num_prompt_tokens
        self.ended += now.num_ended_requests - then.num_ended_requests
        self.uncached_tokens += now.num_ended_uncached_tokens - then.num_ended_uncached_tokens
        self.uncached_tokens_squared += now.uncached_tokens_squared - then.uncached_tokens_squared
        self.output_tokens += now.num_ended_output_tokens - then.num_ended_output_tokens
        self.kv_waits += now.num_kv_waits - then.num_kv_waits
        self.kv_wait_s += now.kv_wait_seconds - then.kv_wait_seconds
        num_steps = now.num_steps - then.num_steps
        if num_steps > 0:
            self.steps.append(
                StepSample(
                    duration_s=(now.step_seconds - then.step_seconds) / num_steps,
                    num_prefill_tokens=(now.num_computed_prompt_tokens - then.num_computed_prompt_tokens) / num_steps,
                    num_decode_seqs=(now.num_generated_tokens - then.num_generated_tokens) / num_steps,
                    num_context_tokens=(now.step_context_tokens - then.step_context_tokens) / num_steps,
                    worker_age_s=max(0.0, report.status.age_seconds - elapsed_s),
                )
            )


class Observer:
    """Remembers the counters of the last observation, how long starts took, and where workers were last heard."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._observed_s = math.inf
        self._before: dict[str, WorkerReport] = {}
        self._means: dict[str, _Means] = {name: _Means() for name in config.pools}
        self._last_pools: dict[str, str] = {}
        self.startup_s: dict[str, float] = {}
        """By pool, as measured; kept over a restart by whoever made this."""
        self._starting: dict[str, float] = {}  # Unix time of the start, by worker id

    def progress(self, state: ServeState, reports: Mapping[str, WorkerReport]) -> Progress:
        """Where the workers of the configured pools stand."""
        pools = {name: pool for name, pool in state.pools.items() if name in self._config.pools}
        ids = {worker_id_of(name, replica) for name, pool in pools.items() for replica in pool.replicas}
        heard = self._last_pools | {name: report.status.pool for name, report in reports.items()}
        self._last_pools = {name: pool for name, pool in heard.items() if name in ids}
        return progress_of(ServeState(pools, state.head_node_id), reports, self._last_pools)

    def note_starts(self, progress: Progress, state: ServeState, now_unix_s: float) -> None:
        """Measure how long workers take to start: those that were seen before they ran."""
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
        sums = {name: self._sum(by_pool[name]) for name in self._config.pools}
        for name, means in self._means.items():
            means.update(sums[name])
        self._before, self._observed_s = dict(reports), now_s
        return Observation(
            tuple(
                self._pool(name, by_pool[name], sums[name], counts.get(name, WorkerCounts()), pins.get(name), now_s)
                for name in self._config.pools
            )
        )

    def _sum(self, reports: list[WorkerReport]) -> _Sums:
        """Left out is a worker that this has not seen from the start of the interval on, or that served elsewhere."""
        sums = _Sums(num_ready=sum(map(_is_ready, reports)))
        for report in reports:
            before = self._before.get(report.leased.record.worker_id)
            if before is None:
                if report.at_s - report.status.age_seconds >= self._observed_s:  # it has started since
                    sums.add(report, worker_pb2.WorkerLoad(), report.status.age_seconds)
            elif before.status.pool == report.status.pool and report.at_s > before.at_s:
                sums.add(report, before.answer.load, report.at_s - before.at_s)
        return sums

    def _pool(
        self,
        name: str,
        reports: list[WorkerReport],
        sums: _Sums,
        counts: WorkerCounts,
        pinned: int | None,
        now_s: float,
    ) -> PoolObservation:
        pool, means = self._config.pools[name], self._means[name]
        loads = [report.answer.load for report in reports]
        hellos = [report.answer.worker for report in reports]
        return PoolObservation(
            name=name,
            role=pool.role,
            gpus_per_worker=pool.tp * pool.pp,
            tp=pool.tp,
            pp=pool.pp,
            fingerprint=self._fingerprint(pool, hellos),
            min_workers=pool.fewest,
            max_workers=pool.most,
            configured_workers=pool.replicas,
            pinned_workers=pinned,
            **asdict(counts),
            startup_s=self.startup_s.get(name, _FIRST_STARTUP_S),
            metrics_age_s=max((now_s - report.at_s for report in reports), default=0.0),
            arrivals_per_s=sums.arrivals_per_s,
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
            handoff_s=self._handoff_s() if pool.role == "prefill" else 0.0,
            step_samples=tuple(sums.steps),
        )

    def _handoff_s(self) -> float:
        """Decode workers measure it, and it is part of the time to first token, which prefill pools are sized for."""
        waits = [m.kv_wait_s for name, m in self._means.items() if self._config.pools[name].role == "decode"]
        return max(waits, default=0.0)

    def _fingerprint(self, pool: PoolConfig, hellos: list[worker_pb2.WorkerHello]) -> str:
        """Workers of equal fingerprints hold the same model in the same way on the same kind of device. An empty pool
        may take any of its shape: the model and the block layout are the cluster's."""
        names = {hello.kv_fingerprint.hex() for hello in hellos}
        return f"{pool.device}/{'/'.join(sorted(names)) or self._any_fingerprint()}"

    def _any_fingerprint(self) -> str:
        return next((report.answer.worker.kv_fingerprint.hex() for report in self._before.values()), "")
