"""Whether this router can serve, and what is missing: one summary for /readyz, gRPC health and people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from switchyard.v1.worker_pb2 import WorkerLoad

from checkpoint.identity import ServedModel
from router.service.dispatch import Dispatcher


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool: its workers that are up."""

    role: str
    num_workers: int


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker that takes requests."""

    worker_id: str
    pool: str
    role: str
    address: str


@dataclass(frozen=True, slots=True)
class TierDown:
    """A tier that does less for a worker than it should."""

    tier: str
    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class RefusedWorker:
    """A worker in the directory that does not serve what this router serves."""

    worker_id: str
    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class ControlState:
    """What the router shares with the other routers, as far as it answers."""

    directory_is_up: bool
    journal_is_up: bool
    journal_is_missing: bool  # there should be one


@dataclass(frozen=True, slots=True)
class Readiness:
    """Ready: requests are served. Degraded: they are, but something that should be there is not."""

    is_ready: bool
    is_degraded: bool
    cluster: str
    model: str
    pools: dict[str, PoolState]
    workers: tuple[WorkerState, ...]
    tiers_down: tuple[TierDown, ...]
    workers_refused: tuple[RefusedWorker, ...]
    directory_is_up: bool
    streams_can_resume: bool


def readiness(
    served: ServedModel,
    dispatcher: Dispatcher,
    control: ControlState,
    refusals: Sequence[tuple[str, str, str]],
    is_stopping: bool,
) -> Readiness:
    """The state of things now."""
    infos = dispatcher.fleet.workers
    pools: dict[str, PoolState] = {}
    for info in infos:
        num_before = pools[info.pool].num_workers if info.pool in pools else 0
        pools[info.pool] = PoolState(info.role.value, num_before + 1)
    tiers_down = tuple(
        TierDown(tier, worker_id, reason)
        for worker_id, load in sorted(dispatcher.loads.items())
        for tier, reason in sorted(_problems(load).items())
    )
    workers_refused = tuple(RefusedWorker(*refusal) for refusal in sorted(refusals))
    return Readiness(
        is_ready=dispatcher.fleet.can_serve and not is_stopping,
        is_degraded=bool(tiers_down or workers_refused) or not control.directory_is_up or control.journal_is_missing,
        cluster=served.cluster,
        model=served.model,
        pools=pools,
        workers=tuple(
            WorkerState(info.worker_id, info.pool, info.role.value, dispatcher.connections[info.worker_id].address)
            for info in infos
        ),
        tiers_down=tiers_down,
        workers_refused=workers_refused,
        directory_is_up=control.directory_is_up,
        streams_can_resume=control.journal_is_up,
    )


def _problems(load: WorkerLoad) -> dict[str, str]:
    """Why a worker's tiers do less than they should, by tier."""
    silent = {tier: "does not answer" for tier, is_up in load.tier_is_up.items() if not is_up}
    return {**silent, **load.tier_problems}
