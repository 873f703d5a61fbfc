"""One autoscaler: looks, decides every `interval_s`, and carries the plan out, action by action.

    Serve, workers -> observe -> planner.scaling.decide -> planner.scaling.rollout -> Serve, workers

What it remembers is saved after every round, so that the next one goes on in mid-plan. It acts only while it holds the
lock, and asks for that before each action. In mode advise it decides and says so, and changes nothing; in mode off it
only shows where workers stand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from deploy.autoscaling.memory import Memory, MemoryUnavailable
from deploy.autoscaling.metrics import AutoscalerMetrics
from deploy.autoscaling.observe import Observer
from deploy.autoscaling.problems import Problems
from deploy.autoscaling.serve_api import ServeApi, ServeState, ServeUnavailable
from deploy.autoscaling.workers import WorkerReport, WorkerUnavailable, WorkerWatch
from deploy.config import ClusterConfig
from planner.scaling.actions import Action, Announce, Drain, Progress, SetReplicas, SwitchRole
from planner.scaling.decide import ScalingState, decide
from planner.scaling.plan import FLIP, GROW, RETIRE, Explanation, Plan, Step
from planner.scaling.record import DecisionLog, DecisionRecord, Saved, Start
from planner.scaling.rollout import adopt, advance, count_workers

log = logging.getLogger(__name__)

_IDLE_S = 1.0
_BUSY_S = 0.1  # while workers drain or change roles: a stream waits for them
# Of a plan's step: reason and note of its Event, and the pool that it is for.
_NOTES: dict[str, Callable[[Step], tuple[str, str, str]]] = {
    FLIP: lambda s: ("RolesSwitch", f"{s.num_workers} of {s.pool} serve in {s.to_pool}", s.to_pool),
    GROW: lambda s: ("PoolGrows", f"{s.num_workers} more in {s.pool}", s.pool),
    RETIRE: lambda s: ("PoolShrinks", f"{s.num_workers} of {s.pool} retire", s.pool),
}


class Lock(Protocol):
    """Which of several autoscalers acts."""

    @property
    def problem(self) -> str:
        """Why the last try to hold it failed; empty also when another autoscaler holds it."""

    def hold(self) -> bool:
        """Whether this one acts."""

    def release(self) -> None:
        """Let another one act at once. Never raises."""


class EventSink(Protocol):
    """Shows changes to people, as Kubernetes Events do. A reason and an action are one word each."""

    def emit(self, reason: str, note: str, action: str, is_warning: bool) -> None: ...

    def why_missing(self, pool: str) -> str: ...


class Autoscaler:
    """`tick` is called again and again."""

    def __init__(
        self,
        config: ClusterConfig,
        serve: ServeApi,
        watch: WorkerWatch,
        memory: Memory,
        lock: Lock,
        metrics: AutoscalerMetrics,
        events: EventSink | None = None,
        decision_log: DecisionLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._mode = config.autoscaling.mode
        self._serve = serve
        self._watch = watch
        self._memory = memory
        self._lock = lock
        self._events = events
        self._decision_log = decision_log
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._observer = Observer(config)
        self._problems = Problems(clock)
        self._saved: Saved | None = None  # None: not the one that acts, or not loaded yet
        self._pins: dict[str, int] = {}
        self._decided_s = -float("inf")
        self._is_ours = False
        self._was_saved: Saved | None = None

    def tick(self) -> float:
        """One round; the seconds until the next one. What does not answer is left for that."""
        if not self._holds_lock():
            return _IDLE_S
        try:
            if self._saved is None:
                self._saved = self._was_saved = self._memory.load()
                self._observer.startup_s = self._memory.startups()
            self._pins = self._memory.pins()
            self._problems.over("memory")
        except MemoryUnavailable as error:
            self._note_problem("memory", str(error))
            if self._saved is None:
                return _IDLE_S
        try:
            state = self._serve.state()
        except ServeUnavailable as error:
            self._note_problem("serve", str(error))
            return _IDLE_S
        self._problems.over("serve")
        reports = self._watch.poll()
        if self._watch.problem:
            self._note_problem("directory", self._watch.problem)
        else:
            self._problems.over("directory")
        progress = self._observer.progress(state, reports)
        self._note_starts(progress, state)
        self._metrics.show_progress(progress, self._config.pools)
        if self._mode != "off" and self._clock() - self._decided_s >= self._config.autoscaling.interval_s:
            self._decide(progress, reports)
        has_acted = self._mode == "act" and self._carry_out(progress)
        self._save()
        if has_acted:
            return 0.0
        return _BUSY_S if self._saved is not None and self._saved.rollout.transitions else _IDLE_S

    def stop(self) -> None:
        """Let another one act at once."""
        if self._is_ours:
            self._lock.release()
        self._is_ours = False
        self._metrics.show_leader(False)

    # ---- who acts

    def _holds_lock(self) -> bool:
        is_ours = self._lock.hold()
        if self._lock.problem:
            self._note_problem("lease", self._lock.problem)
        elif is_ours:
            self._problems.over("lease")
        if is_ours != self._is_ours:
            why = "the lock cannot be held" if self._lock.problem else "another one acts"
            log.info("this autoscaler acts now" if is_ours else f"this autoscaler waits: {why}")
            self._saved, self._decided_s = None, -float("inf")  # the other one may have changed it
        self._is_ours = is_ours
        self._metrics.show_leader(is_ours)
        return is_ours

    def _note_starts(self, progress: Progress, state: ServeState) -> None:
        before = dict(self._observer.startup_s)
        self._observer.note_starts(progress, state, self._wall_clock())
        if self._observer.startup_s != before:
            try:
                self._memory.save_startups(self._observer.startup_s)
            except MemoryUnavailable as error:
                self._note_problem("memory", str(error), "what is saved")

    # ---- deciding

    def _decide(self, progress: Progress, reports: Mapping[str, WorkerReport]) -> None:
        assert self._saved is not None
        scaling, rollout = self._saved.scaling, self._saved.rollout
        counts = count_workers(rollout, progress)
        observation = self._observer.observe(reports, counts, self._pins, self._clock())
        now_s = self._wall_clock()
        plan, after, explanation = decide(observation, scaling, now_s, self._config.autoscaling)
        record = DecisionRecord(now_s, observation, plan, explanation)
        self._decided_s = self._clock()
        if self._mode == "act":
            rollout = adopt(rollout, plan)
        self._emit_changes(scaling.plan, plan, explanation)
        self._saved = Saved(after, rollout)
        self._metrics.show_decision(explanation)
        self._write(Start(self._config.autoscaling, scaling), record, after)

    def _write(self, start: Start, record: DecisionRecord, after: ScalingState) -> None:
        try:
            self._memory.write(start, record, after)
            self._problems.over("decisions in memory")
        except MemoryUnavailable as error:
            self._note_problem("memory", str(error), "decisions in memory")
        try:
            if self._decision_log is not None:
                self._decision_log.write(start, record, after)
                self._problems.over("record")
        except OSError as error:
            self._note_problem("record", f"{error.filename or 'the file of decisions'}: {error.strerror}")

    def _emit_changes(self, before: Plan | None, plan: Plan, explanation: Explanation) -> None:
        for pool in explanation.pools:
            if pool.num_missing:
                why = self._events.why_missing(pool.pool) if self._events is not None else ""
                self._emit("PlanNotReached", f"{pool.pool}: {pool.reason}" + (f"; {why}" if why else ""), "Hold", True)
        if before is not None and plan.plan_id == before.plan_id:
            return
        reasons = {pool.pool: f"{pool.binding}: {pool.reason}" for pool in explanation.pools}
        verb = "" if explanation.mode == "act" else " (advice)"
        for step in plan.steps:
            reason, note, concerned = _NOTES[step.kind](step)
            action = "SwitchRole" if step.kind == FLIP else "Scale"
            self._emit(reason, f"{note}{verb}: {reasons[concerned]}", action, False)

    def _emit(self, reason: str, note: str, action: str, is_warning: bool) -> None:
        log.log(logging.WARNING if is_warning else logging.INFO, "%s: %s", reason, note)
        if self._events is not None:
            self._events.emit(reason, note, action, is_warning)

    # ---- acting

    def _carry_out(self, progress: Progress) -> bool:
        """Whether something was done, so that it is worth to look again at once."""
        assert self._saved is not None
        rollout, actions = advance(self._saved.rollout, progress)
        self._saved = Saved(self._saved.scaling, rollout)
        has_acted = False
        for action in actions:
            if not self._holds_lock():
                break  # the next one that acts sees what is half done
            has_acted = self._act(action, progress) or has_acted
        return has_acted

    def _act(self, action: Action, progress: Progress) -> bool:
        """Whether it was done. What fails is asked for again in a later round: actions come from what is seen."""
        try:
            match action:
                case SetReplicas(pool, num_replicas):
                    self._serve.set_replicas(pool, num_replicas)
                    kind = "replicas"
                case Drain(worker_id):
                    self._watch.drain(worker_id, self._drain_timeout_s(worker_id, progress))
                    kind = "drain"
                case SwitchRole(worker_id, to_pool, _):
                    self._watch.switch(worker_id, to_pool, self._config.pools[to_pool].role)
                    kind = "switch"
                case Announce(worker_id, _):
                    self._watch.announce(worker_id)
                    kind = "announce"
        except ServeUnavailable as error:
            self._note_problem("serve", str(error), "replicas")
            return False
        except WorkerUnavailable as error:
            self._note_problem("worker", str(error))
            return False
        self._problems.over("replicas" if kind == "replicas" else "worker")
        log.info("%s", action)
        self._metrics.count_action(kind)
        return kind != "replicas"  # those take Serve seconds

    def _drain_timeout_s(self, worker_id: str, progress: Progress) -> float:
        """Of the pool that it serves in, whose streams it has."""
        worker = next(worker for worker in progress.workers if worker.worker_id == worker_id)
        pools = self._config.pools
        return pools[worker.pool if worker.pool in pools else worker.home_pool].drain_timeout_s

    # ---- the rest

    def _save(self) -> None:
        if self._saved is None or self._saved == self._was_saved:
            return
        try:
            self._memory.save(self._saved)
            self._was_saved = self._saved
            self._problems.over("what is saved")
        except MemoryUnavailable as error:
            self._note_problem("memory", str(error), "what is saved")

    def _note_problem(self, part: str, message: str, what: str = "") -> None:
        """what: what it is logged under, where that is only some of what the part does."""
        self._problems.note(what or part, message)
        self._metrics.count_problem(part)
