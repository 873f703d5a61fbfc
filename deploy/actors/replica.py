"""A Ray Serve replica: one worker of a pool. Owns the worker's ranks, shows their health and metrics, drains them.

Tokens and KV blocks pass it by: routers connect to rank 0. When a rank fails, the replica ends itself, its other ranks
end with it, and Serve starts the next one. Knows nothing of routing or models.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import time
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.actors.health import Progress
from deploy.actors.kv_nodes import KVNodeSettings
from deploy.actors.metrics import RayMetrics, Report
from deploy.actors.rank_actor import RankActor
from deploy.actors.start_failure import ReplicaFailed, failure_of
from deploy.plan import PoolPlan
from telemetry import worker
from workers.errors import rank_name

log = logging.getLogger(__name__)

_REPORT_S = 0.5
_DRAIN_LOOK_S = 0.1
_BUSY_KEYS = ("num_running", "num_waiting", "num_waiting_for_kv")


class WorkerReplica:
    """One worker."""

    async def __init__(self, plan: PoolPlan, kv_nodes: KVNodeSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._plan = plan
        self._worker_id = f"{plan.name}-{serve.get_replica_context().replica_id.unique_id}"
        self._stopping = False
        try:
            await self._start_ranks(kv_nodes)
        except Exception as error:
            raise ReplicaFailed(failure_of(error)) from error
        self._progress = Progress(plan.progress_timeout_s, time.monotonic())
        self._metrics = RayMetrics(worker.RAY_METRICS, self._labels(plan.name, plan.spec.role))
        self._tasks = [asyncio.create_task(self._watch(number)) for number in range(self._plan.num_ranks)]
        self._tasks.append(asyncio.create_task(self._report()))

    async def _start_ranks(self, kv_nodes: KVNodeSettings) -> None:
        self._ranks = self._make_ranks(kv_nodes)
        init_method = await self._ranks[0].rendezvous.remote()
        await asyncio.gather(*[rank.connect.remote(init_method) for rank in self._ranks])
        self._address, *_ = await asyncio.gather(*[rank.serve.remote() for rank in self._ranks])
        self._pids = await asyncio.gather(*[rank.pid.remote() for rank in self._ranks])
        self._hosts = await asyncio.gather(*[rank.host.remote() for rank in self._ranks])

    def _make_ranks(self, kv_nodes: KVNodeSettings) -> list[Any]:
        spec = dataclasses.replace(self._plan.spec, worker_id=self._worker_id)
        group = ray.util.get_current_placement_group()
        ranks = []
        for rank in range(self._plan.num_ranks):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=self._plan.bundle_of(rank)
            )
            actor = ray.remote(RankActor).options(
                name=None,
                num_cpus=self._plan.cpus_per_rank,
                num_gpus=self._plan.gpus_per_rank,
                max_restarts=0,  # a new process could not join the others' group
                max_concurrency=4,  # wait_failed takes one for good
                scheduling_strategy=strategy,
            )
            ranks.append(actor.remote(spec, kv_nodes, rank))
        return ranks

    # ---- what Serve asks
    def record_replica_metadata(self) -> dict[str, Any]:
        """Shown in Serve's state: where the worker is, and its ranks' processes."""
        return {
            "worker_id": self._worker_id,
            "address": self._address,
            "role": self._plan.spec.role,
            "rank_pids": list(self._pids),
        }

    def check_health(self) -> None:
        """Raises when the engine no longer gets on. A lost rank is seen at once elsewhere."""
        problem = self._progress.problem(time.monotonic())
        if problem:
            raise RuntimeError(f"{self._worker_id}: {problem}")

    def describe(self) -> dict[str, Any]:
        """The same as the metadata; for those who hold a handle."""
        return self.record_replica_metadata()

    async def __del__(self) -> None:
        """Drain: Serve waits for this, up to the pool's drain_timeout_s."""
        if self._stopping or not hasattr(self, "_tasks"):
            return
        self._stopping = True
        deadline_s = time.monotonic() + self._plan.drain_timeout_s
        with contextlib.suppress(ray.exceptions.RayError):  # the rank is gone: nothing to drain
            await self._ranks[0].retire.remote()
        while time.monotonic() < deadline_s and await self._is_busy():
            await asyncio.sleep(_DRAIN_LOOK_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*[rank.stop.remote() for rank in self._ranks], return_exceptions=True)

    # ---- watching
    def _labels(self, pool: str, role: str) -> dict[str, str]:
        return dict(zip(worker.LABELS, (self._worker_id, pool, role), strict=True))

    async def _load(self) -> Report:
        report: Report = await self._ranks[0].metrics.remote()
        return report

    async def _is_busy(self) -> bool:
        report = await self._load()
        return any(report.get(key) for key in _BUSY_KEYS)

    async def _report(self) -> None:
        while True:
            try:
                report = await self._load()
            except ray.exceptions.RayError:
                return  # the rank is gone: its watcher acts
            self._progress.observe(report, time.monotonic())
            self._metrics.relabel(self._labels(report["pool"], report["role"]))
            self._metrics.report(report)
            await asyncio.sleep(_REPORT_S)

    async def _watch(self, number: int) -> None:
        try:
            reason = await self._ranks[number].wait_failed.remote()
        except ray.exceptions.RayError as error:
            engine = self._plan.spec.engine
            name = f"{rank_name(number, engine.tp, engine.pp)}, pid {self._pids[number]}, died"
            reason = f"{name}: {str(error).splitlines()[0]}"
        if not self._stopping:
            log.error("%s: a rank failed (%s); starting anew", self._worker_id, reason)
            self._kill_ranks_here()
            os._exit(1)  # at once: every other way waits for health checks or for calls into the dead group

    def _kill_ranks_here(self) -> None:
        """Ray asks the ranks of a replica that is gone to end, which one that is stopped does not hear."""
        here = ray.get_runtime_context().get_node_id()
        for pid, host in zip(self._pids, self._hosts, strict=True):
            if host == here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
