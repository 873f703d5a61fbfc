"""Events, workers and requests of a fleet in virtual time. Carries out the actions of planner.scaling.rollout."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence

from planner.fleet.meter import Interval, Meter, observe_pool
from planner.fleet.parts import FleetPool, FleetResult, Stream, Worker
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
from planner.scaling.observation import Observation, PoolObservation
from planner.scaling.rollout import WorkerCounts
from planner.trace import TraceRequest


class Fleet:
    """Pools, workers and requests at one time; `simulation` asks it for the next event."""

    def __init__(self, trace: Sequence[TraceRequest], pools: Sequence[FleetPool], seed: int) -> None:
        self.now_s = 0.0
        self.pools = {pool.name: pool for pool in pools}
        self.by_role = {pool.role: pool for pool in pools}
        self.replicas = {pool.name: pool.workers for pool in pools}
        self.workers: list[Worker] = []
        self.result = FleetResult(len(trace), counts={pool.name: [] for pool in pools})
        self._meter = Meter(self.pools, seed)
        self._events: list[tuple[float, int, str, object]] = []
        self._number = 0
        self._prompts: deque[Stream] = deque()
        self._waiting: deque[Stream] = deque()  # prefilled, and no decode worker has room
        self._charged_s = 0.0
        for pool in pools:
            for _ in range(pool.workers):
                self._start(pool.name, 0.0).status = READY
        for request in trace:
            self.at(request.arrival_s, "arrival", request)

    # ---- time

    def at(self, time_s: float, kind: str, subject: object = None) -> None:
        """Let something happen then."""
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, kind, subject))

    def next(self) -> tuple[str, object]:
        """The next event; the time is now its time."""
        time_s, _, kind, subject = heapq.heappop(self._events)
        self.now_s = max(self.now_s, time_s)
        return kind, subject

    def charge(self) -> None:
        """GPU time up to now; called before the number of workers changes."""
        gpus = self.num_gpus()
        self.result.gpu_s += gpus * (self.now_s - self._charged_s)
        self._charged_s = self.now_s

    def num_gpus(self) -> int:
        """Of workers that exist, in whatever state."""
        return sum(self.pools[worker.home].gpus_per_worker for worker in self.workers)

    # ---- workers

    def _start(self, pool: str, startup_s: float) -> Worker:
        self.charge()
        self._number += 1
        worker = Worker(f"{pool}-{self._number}", pool, pool, self._number)
        self.workers.append(worker)
        self.result.most_gpus = max(self.result.most_gpus, self.num_gpus())
        if startup_s:
            self.at(self.now_s + startup_s, "ready", worker)
        return worker

    def become_ready(self, worker: Worker) -> None:
        """A start is over, unless the worker was ended before."""
        if worker in self.workers and worker.status == STARTING:
            worker.status, worker.ready_at_s = READY, self.now_s
            self.serve()

    def _end(self, worker: Worker) -> None:
        """What it has under way goes on elsewhere; with none left, nobody notices."""
        self.charge()
        self.workers.remove(worker)
        self.result.num_killed_streams += self._move_requests(worker)

    def _move_requests(self, worker: Worker) -> int:
        """All that a worker has under way waits for another one; returns how many requests that were."""
        prompt, worker.prompt = worker.prompt, None
        if prompt is not None:
            self._prompts.appendleft(prompt)
        self._decoded(worker)
        moved = [stream for _, _, stream in worker.streams]
        for ends_at, _, stream in worker.streams:
            stream.num_done = stream.request.num_output_tokens - (ends_at - worker.steps_done)
        self._waiting.extend(moved)
        worker.streams, worker.context, worker.version = [], 0.0, worker.version + 1
        return len(moved) + (prompt is not None)

    def _order(self) -> list[Worker]:
        """In which Serve ends workers."""
        return sorted(self.workers, key=lambda w: (w.status != STARTING, -w.number))

    def progress(self) -> Progress:
        """What the rollout sees. Workers that have drained, or should have by now, count as drained."""
        for worker in self.workers:
            if worker.status == DRAINING:
                if self.now_s - worker.draining_since_s > self.pools[worker.pool].drain_timeout_s:
                    self.result.num_moved_streams += self._move_requests(worker)
                if worker.prompt is None and not worker.streams:
                    worker.status = DRAINED
        seen = tuple(
            WorkerProgress(worker_id=w.worker_id, home_pool=w.home, pool=w.pool, status=w.status, epoch=w.epoch)
            for w in self._order()
        )
        return Progress(seen, dict(self.replicas))

    def act(self, actions: Sequence[Action]) -> None:
        """Carry out what the rollout asks for."""
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
        """One more request."""
        self._meter.arrived(request)
        self._prompts.append(Stream(request))
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
            self._meter.stepped(worker, self.now_s, step_s, tokens / steps, 0, 0)
            self.at(self.now_s + steps * step_s, "prefilled", (worker, stream))
        while self._waiting and self._decode(self._waiting[0]):
            self._waiting.popleft()

    def prefilled(self, worker: Worker, stream: Stream) -> None:
        """A prompt is computed, and its first token is out."""
        if worker.prompt is not stream:
            return  # it ended before
        worker.prompt = None
        stream.first_token_s = self.now_s
        self._waiting.append(stream)
        self.serve()

    def _decode(self, stream: Stream) -> bool:
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

    def _step_s(self, worker: Worker) -> float:
        return self.pools[worker.pool].cost.step_s(0, len(worker.streams), worker.context)

    def _decoded(self, worker: Worker) -> None:
        """Bring a worker's steps up to now."""
        if worker.streams:
            steps = (self.now_s - worker.at_s) / self._step_s(worker)
            worker.steps_done += steps
            worker.context += steps * len(worker.streams)
        worker.at_s = self.now_s

    def _expect_end(self, worker: Worker) -> None:
        worker.version += 1
        if worker.streams:
            left = max(0.0, worker.streams[0][0] - worker.steps_done)
            self.at(self.now_s + left * self._step_s(worker), "decoded", (worker, worker.version))

    def decoded(self, worker: Worker, version: int) -> None:
        """Streams of a worker end now, unless its batch has changed since this was expected."""
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

    def num_under_way(self) -> int:
        """Requests that have arrived and have not ended."""
        held = sum((worker.prompt is not None) + len(worker.streams) for worker in self.workers)
        return len(self._prompts) + len(self._waiting) + held

    # ---- what is observed

    def observe(self, counted: Mapping[str, WorkerCounts]) -> Observation:
        """As production would from its metrics."""
        for worker in self.workers:
            if worker.streams and worker.status == READY:
                self._decoded(worker)
                self._expect_end(worker)
                step_s = self._step_s(worker)
                self._meter.stepped(worker, self.now_s, step_s, 0, len(worker.streams), worker.context)
        interval = self._meter.interval(self.now_s, self.result)
        return Observation(tuple(self._observe(pool, counted, interval) for pool in self.pools.values()))

    def _observe(self, pool: FleetPool, counted: Mapping[str, WorkerCounts], interval: Interval) -> PoolObservation:
        queue = self._prompts if pool.role == "prefill" else self._waiting
        tokens = [stream.request.num_prompt_tokens for stream in queue]
        serving = [worker for worker in self.workers if worker.pool == pool.name]
        return observe_pool(pool, serving, tokens, counted[pool.name], interval)
