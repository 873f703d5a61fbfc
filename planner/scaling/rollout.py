"""Carries a plan out, action by action: the plan and what is seen of workers -> what to do next.

A worker that changes its pool (a flip) leaves the routers' tables, drains, takes the new role under a new epoch and is
announced; its weights and cache stay. One that retires drains before Ray Serve is asked for one less. Growth waits
until the budget has room for it, with draining workers counted; a pool that another one replaces waits until that one
is ready. Everything is derived from what is seen, so an action that got lost is sent again, and an autoscaler that
starts anew finishes or undoes what it finds half done. Pure: knows nothing of Serve, leases or clocks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.scaling.actions import (
    DRAINED,
    DRAINING,
    READY,
    SILENT,
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
from planner.scaling.plan import FLIP, RETIRE, Plan


@dataclass(frozen=True, slots=True)
class Transition:
    """What is being done with one worker."""

    to_pool: str = ""
    """Of a flip, or where it drained and is to serve again; empty: the worker retires."""
    released: bool = False
    """Serve was asked for one less: the worker is about to end."""


@dataclass(frozen=True, slots=True)
class RolloutState:
    """What is under way. Serialisable; a lost one is derived again from what is seen."""

    plan: Plan | None = None
    transitions: dict[str, Transition] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)
    """What Serve should have been asked for, by home pool."""


def adopt(state: RolloutState, plan: Plan) -> RolloutState:
    """Follow this plan from now on. What the last one began is finished or undone, as this one needs it; what it began
    with pools that this one does not have, since they left the configuration, is forgotten."""
    known = plan.targets
    transitions = {name: t for name, t in state.transitions.items() if not t.to_pool or t.to_pool in known}
    return RolloutState(plan, transitions, {pool: n for pool, n in state.replicas.items() if pool in known})


def advance(state: RolloutState, progress: Progress) -> tuple[RolloutState, tuple[Action, ...]]:
    """The next actions; none when the plan is carried out or something must be waited for."""
    if state.plan is None:
        return state, ()
    work = _Work(state, state.plan, progress)
    work.notice_who_leaves()
    work.undo()
    work.adopt_orphans()
    work.follow_transitions()
    work.flip()
    work.cancel_starting()
    work.retire()
    work.grow()
    return work.outcome()


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """The counts of a PoolObservation."""

    num_ready: int = 0
    num_starting: int = 0
    num_silent: int = 0
    num_flipping_in: int = 0
    num_draining: int = 0


_COUNTED_AS = {
    STARTING: "num_starting",
    SILENT: "num_silent",
    READY: "num_ready",
    SWITCHED: "num_flipping_in",
}


def count_workers(state: RolloutState, progress: Progress) -> dict[str, WorkerCounts]:
    """What an observation says of each pool while a plan is under way. Workers that Serve was asked for and that do not
    exist yet are starting."""
    counted: Counter[tuple[str, str]] = Counter()
    for worker in progress.workers:
        transition = state.transitions.get(worker.worker_id)
        to_pool = transition.to_pool if transition is not None else ""
        if to_pool and (worker.pool, worker.status) != (to_pool, READY):
            counted[to_pool, "num_flipping_in"] += 1
        elif worker.status in (DRAINING, DRAINED) or (transition is not None and not to_pool):
            counted[worker.pool, "num_draining"] += 1
        else:
            counted[worker.pool, _COUNTED_AS[worker.status]] += 1
    for pool, replicas in (progress.replicas | state.replicas).items():
        counted[pool, "num_starting"] += max(0, replicas - sum(w.home_pool == pool for w in progress.workers))
    pools = {pool for pool, _ in counted} | set(state.plan.targets if state.plan else ())
    fields = [field.name for field in dataclasses.fields(WorkerCounts)]
    return {pool: WorkerCounts(**{name: counted[pool, name] for name in fields}) for pool in pools}


class _Work:
    """One call of advance."""

    def __init__(self, state: RolloutState, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._workers = {worker.worker_id: worker for worker in progress.workers}
        self._transitions = {
            name: transition for name, transition in state.transitions.items() if name in self._workers
        }
        self._replicas = progress.replicas | state.replicas
        self._actions: list[Action] = []

    def outcome(self) -> tuple[RolloutState, tuple[Action, ...]]:
        """The state and the actions. What Serve was asked for is said again when it says otherwise: a redeployment sets
        it back to the configuration's count."""
        changed = [
            SetReplicas(pool, count)
            for pool, count in sorted(self._replicas.items())
            if self._progress.replicas.get(pool) != count
        ]
        return RolloutState(self._plan, self._transitions, self._replicas), (*self._actions, *changed)

    # ---- counts

    def _serving(self, pool: str, status: tuple[str, ...] = (STARTING, SILENT, READY)) -> list[WorkerProgress]:
        """Its workers with no transition, in Serve's order."""
        workers = self._workers.values()
        return [w for w in workers if w.pool == pool and w.status in status and w.worker_id not in self._transitions]

    def _asked(self, pool: str) -> int:
        """Workers of a home pool that Serve was asked for and that do not exist yet; they will serve in it."""
        existing = sum(
            1
            for w in self._workers.values()
            if w.home_pool == pool and not self._transitions.get(w.worker_id, Transition()).released
        )
        return max(0, self._replicas.get(pool, 0) - existing)

    def _have(self, pool: str) -> int:
        """Workers that serve in a pool, or will, when all transitions are done."""
        incoming = sum(1 for transition in self._transitions.values() if transition.to_pool == pool)
        return len(self._serving(pool)) + self._asked(pool) + incoming

    def _excess(self, pool: str) -> int:
        """More than the target; negative: fewer. A pool that the plan does not have is to be empty."""
        return self._have(pool) - self._plan.targets.get(pool, 0)

    def _gpus(self) -> int:
        """Held or asked for: every worker that exists, and those that Serve will add."""
        gpus = self._plan.gpus_per_worker
        held = sum(gpus.get(w.home_pool, 0) for w in self._workers.values())
        return held + sum(gpus.get(pool, 0) * self._asked(pool) for pool in self._replicas)

    # ---- transitions

    def notice_who_leaves(self) -> None:
        """Serve ends as many workers of a home pool as exist beyond its replicas, by its own choice. Those are leaving;
        one that was to leave and lives on, since Serve chose another, is taken care of as an orphan."""
        self._revoke_unheard()
        for home, count in self._replicas.items():
            existing = [w.worker_id for w in self._workers.values() if w.home_pool == home]
            released = [name for name in existing if name in self._transitions and self._transitions[name].released]
            if self._progress.replicas.get(home) == count == len(existing):
                for name in released:  # Serve has as many as it should: it ended others
                    del self._transitions[name]
                continue
            others = [name for name in existing if name not in released]
            for name in others[: max(0, len(existing) - count - len(released))]:
                self._transitions[name] = Transition(released=True)

    def _revoke_unheard(self) -> None:
        """A start that was cancelled, of which Serve has not heard, became ready: it serves, so it drains first."""
        for worker in self._workers.values():
            home = worker.home_pool
            unheard = self._progress.replicas.get(home, 0) > self._replicas.get(home, 0)
            if unheard and worker.status == READY and self._is_released(worker):
                del self._transitions[worker.worker_id]
                self._replicas[home] += 1

    def undo(self) -> None:
        """Bring back workers that the plan needs where they were."""
        for worker_id, transition in list(self._transitions.items()):
            worker = self._workers[worker_id]
            undoable = not transition.released and worker.status in (READY, DRAINING, DRAINED)
            # One that does not drain yet costs nothing to keep, even if the other pool needs it.
            is_free = worker.status == READY or not transition.to_pool or self._excess(transition.to_pool) > 0
            if undoable and is_free and worker.pool != transition.to_pool and self._excess(worker.pool) < 0:
                del self._transitions[worker_id]
                if worker.status != READY:
                    self._serve_again(worker)

    def adopt_orphans(self) -> None:
        """Workers that somebody began to flip or to retire, of which nothing is remembered."""
        for worker in list(self._workers.values()):
            if worker.worker_id in self._transitions or worker.status not in (DRAINING, DRAINED, SWITCHED):
                continue
            if worker.status == SWITCHED:
                self._transitions[worker.worker_id] = Transition(to_pool=worker.pool)
                continue
            # It is not counted where it served. Needed there: it serves again. Else it flips, or retires.
            takers = [*self._takers(worker.pool), worker.home_pool]
            to_pool = next((pool for pool in takers if pool != worker.pool and self._excess(pool) < 0), "")
            if self._excess(worker.pool) < 0 and not to_pool:
                self._serve_again(worker)
            else:
                self._transitions[worker.worker_id] = Transition(to_pool=to_pool)

    def _serve_again(self, worker: WorkerProgress) -> None:
        self._transitions[worker.worker_id] = Transition(to_pool=worker.pool)

    def follow_transitions(self) -> None:
        """The next action for each worker under way."""
        for worker_id, transition in list(self._transitions.items()):
            worker = self._workers[worker_id]
            if transition.to_pool:
                self._follow_flip(worker, transition)
            elif worker.status == READY and not transition.released:
                self._actions.append(Drain(worker_id))
        for home in self._replicas:
            self._release_drained(home)

    def _release_drained(self, home: str) -> None:
        """Serve is asked for fewer workers only while the ones that it ends first are drained, wherever they serve. One
        that it would end before changes places with one that drained."""
        order = [w for w in self._workers.values() if w.home_pool == home and not self._is_released(w)]
        drained = [w for w in order if self._retires(w) and w.status == DRAINED]
        for worker in order:
            waits = worker.worker_id in self._transitions and worker not in drained
            retires_soon = worker not in drained and worker.pool not in self._plan.targets
            if not drained or waits or retires_soon:
                return
            if worker in drained:
                drained.remove(worker)
            else:
                self._transitions[drained.pop().worker_id] = Transition(to_pool=worker.pool)
                if worker.status == READY:
                    return  # it is one too many now, and retires once the other one serves
            self._replicas[home] -= 1
            self._transitions[worker.worker_id] = Transition(released=True)

    def _is_released(self, worker: WorkerProgress) -> bool:
        return self._transitions.get(worker.worker_id, Transition()).released

    def _retires(self, worker: WorkerProgress) -> bool:
        """Drains to end, and Serve does not know."""
        transition = self._transitions.get(worker.worker_id)
        return transition is not None and not transition.to_pool and not transition.released

    def _follow_flip(self, worker: WorkerProgress, transition: Transition) -> None:
        match worker.status:
            case "ready" if worker.pool == transition.to_pool:
                del self._transitions[worker.worker_id]
            case "ready":
                self._actions.append(Drain(worker.worker_id))
            case "draining" | "drained" if worker.pool == transition.to_pool:
                self._actions.append(Announce(worker.worker_id, worker.epoch + 1))
            case "drained":
                self._actions.append(SwitchRole(worker.worker_id, transition.to_pool, worker.epoch + 1))
            case "switched":
                self._actions.append(Announce(worker.worker_id, worker.epoch))

    def _takers(self, pool: str) -> Sequence[str]:
        """Pools that the plan flips workers of this pool to."""
        return [step.to_pool for step in self._plan.steps if step.kind == FLIP and step.pool == pool]

    # ---- the plan

    def _pools(self) -> list[str]:
        """Those of the plan, and others that workers still serve in."""
        return list(dict.fromkeys([*self._plan.targets, *(worker.pool for worker in self._workers.values())]))

    def flip(self) -> None:
        """Begin flips. Home is always a way; else the oldest go, since Serve ends the newest when the pool shrinks."""
        for pool in self._pools():
            for worker in self._serving(pool, (READY,)):
                home = worker.home_pool
                if home != pool and min(self._excess(pool), self._spare(pool), -self._excess(home)) > 0:
                    self._begin_flip(worker, home)
            for to_pool in self._takers(pool):
                count = min(self._excess(pool), self._spare(pool), -self._excess(to_pool))
                for worker in self._serving(pool, (READY,))[::-1][: max(0, count)]:
                    self._begin_flip(worker, to_pool)

    def _begin_flip(self, worker: WorkerProgress, to_pool: str) -> None:
        self._transitions[worker.worker_id] = Transition(to_pool=to_pool)
        self._actions.append(Drain(worker.worker_id))

    def cancel_starting(self) -> None:
        """Workers that nobody waits for any more go first: they serve nobody."""
        for pool in self._plan.targets:
            starting = self._asked(pool) + sum(w.home_pool == pool for w in self._serving(pool, (STARTING,)))
            cancelled = min(max(0, self._excess(pool)), starting)
            existing = max(0, cancelled - self._asked(pool))
            self._replicas[pool] = self._replicas.get(pool, 0) - cancelled
            for worker in [w for w in self._serving(pool, (STARTING,)) if w.home_pool == pool][:existing]:
                self._transitions[worker.worker_id] = Transition(released=True)

    def retire(self) -> None:
        """Begin to drain what is too much, but a pool that is replaced waits for its replacement."""
        for pool in self._pools():
            if not self._replacement_is_ready(pool):
                continue
            while self._excess(pool) > 0 and self._retire_one(pool):
                pass

    def _retire_one(self, pool: str) -> bool:
        """Drain a worker that Serve would end first of its home. If all such ones serve in other pools, a worker of
        this pool replaces one there first, and that one retires once it is ready. False: none can be spared now."""
        if self._spare(pool) <= 0:
            return False
        serving = self._serving(pool, (READY,))
        first: dict[str, WorkerProgress] = {}
        for worker in self._workers.values():
            if worker.status == READY and worker.worker_id not in self._transitions:
                first.setdefault(worker.home_pool, worker)
        homes = dict.fromkeys([pool, *(worker.home_pool for worker in serving)])
        victims = [first[home] for home in homes if home in first]
        victim = next((worker for worker in victims if worker.pool == pool), victims[0])
        if victim.pool not in self._plan.targets and victim.pool != pool:
            return False  # that pool is to be empty, so this worker retires from there first
        if victim.pool == pool:
            self._transitions[victim.worker_id] = Transition()
            self._actions.append(Drain(victim.worker_id))
        else:
            self._begin_flip(serving[-1], victim.pool)
        return True

    def _spare(self, pool: str) -> int:
        """Ready workers beyond the target: those that start or flip in replace nobody yet."""
        return len(self._serving(pool, (READY,))) - self._plan.targets.get(pool, 0)

    def _replacement_is_ready(self, pool: str) -> bool:
        after = [other for s in self._plan.steps if s.kind == RETIRE and s.pool == pool for other in s.after]
        return all(len(self._serving(other, (READY,))) >= self._plan.targets.get(other, 0) for other in after)

    def grow(self) -> None:
        """Ask Serve for more, as far as the budget has room now: what drains still holds its GPUs."""
        for pool, gpus in sorted(self._plan.gpus_per_worker.items()):
            while self._excess(pool) < 0 and self._gpus() + gpus <= self._plan.max_gpus:
                self._replicas[pool] = self._replicas.get(pool, 0) + 1
