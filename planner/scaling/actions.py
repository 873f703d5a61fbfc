"""What a rollout sees of workers, and what it asks for. Data only."""

from __future__ import annotations

from dataclasses import dataclass

STARTING, SILENT, READY = "starting", "silent", "ready"
DRAINING, DRAINED, SWITCHED = "draining", "drained", "switched"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProgress:
    """One worker as it is seen now."""

    worker_id: str
    home_pool: str
    """The pool that it was started in: the Serve deployment that counts it."""
    pool: str
    """The pool that it serves in now, or will when it is ready or announced; of a silent one as last heard."""
    status: str
    """starting; silent: runs, and does not report; ready: takes requests; draining: takes none, and some still run;
    drained: none runs; switched: has a new role, and routers do not know it yet."""
    epoch: int = 0
    """Of its lease: grows with each change of role."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The cluster as it is seen now."""

    workers: tuple[WorkerProgress, ...]
    """In the order in which Serve would end them: starting ones first, then the newest."""
    replicas: dict[str, int]
    """What Serve was asked for, by home pool."""


@dataclass(frozen=True, slots=True)
class SetReplicas:
    """Ask Serve for this many workers of a home pool."""

    pool: str
    num_replicas: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take the worker off the routers' tables; its requests run to their end, or are moved at the drain's timeout."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """Give a drained worker its new role, under a new epoch."""

    worker_id: str
    to_pool: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Let routers send requests to a worker: one with a new role, or one that drained and is needed after all."""

    worker_id: str
    epoch: int


Action = SetReplicas | Drain | SwitchRole | Announce
