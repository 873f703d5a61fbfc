"""The autoscaler's loop in virtual time: who acts, what is remembered, and what does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from deploy.autoscaling.autoscaler import Autoscaler
from deploy.autoscaling.memory import Memory
from deploy.autoscaling.metrics import AutoscalerMetrics
from deploy.autoscaling.serve_api import RUNNING, STARTING, ServePool, ServeReplica, ServeState, ServeUnavailable
from deploy.autoscaling.workers import WorkerReport
from deploy.config import ClusterConfig, PoolConfig
from kvstore.control.directory import LeasedWorker, WorkerRecord
from planner.scaling import actions
from planner.scaling.config import AutoscalingConfig
from planner.scaling.record import DecisionLog, Saved, replay
from planner.scaling.rollout import RolloutState, Transition
from tests.planner.scaling.fakes import FakeCluster, FakeWorker
from tests.processes import RedisServer

pytestmark = pytest.mark.redis

PHASES = {
    actions.READY: worker_pb2.WORKER_PHASE_READY,
    actions.DRAINING: worker_pb2.WORKER_PHASE_DRAINING,
    actions.DRAINED: worker_pb2.WORKER_PHASE_DRAINED,
    actions.SWITCHED: worker_pb2.WORKER_PHASE_SWITCHED,
}


class Serve:
    """As ServeApi, over a fake cluster."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster
        self.is_away = False

    def state(self) -> ServeState:
        if self.is_away:
            raise ServeUnavailable("the dashboard is away")
        pools = {
            name: ServePool(
                "RUNNING",
                "",
                count,
                tuple(
                    ServeReplica(
                        w.worker_id.removeprefix(f"{name}-"),
                        STARTING if w.status == actions.STARTING else RUNNING,
                        float(w.number),
                        "node",
                    )
                    for w in self._cluster.workers
                    if w.home == name
                ),
            )
            for name, count in self._cluster.replicas.items()
        }
        return ServeState(pools, "head")

    def set_replicas(self, pool: str, num_replicas: int) -> None:
        self._cluster.act([actions.SetReplicas(pool, num_replicas)])


class Watch:
    """As WorkerWatch, over a fake cluster. drains: timeouts, by worker."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster
        self.problem = ""
        self.drains: dict[str, float] = {}

    def poll(self) -> dict[str, WorkerReport]:
        return {w.worker_id: self._report(w) for w in self._cluster.workers if w.status in PHASES}

    def _report(self, worker: FakeWorker) -> WorkerReport:
        record = WorkerRecord(worker.worker_id, "h:1", worker.pool, worker.pool, "n")
        answer = worker_pb2.GetLoadResponse(
            worker=worker_pb2.WorkerHello(num_blocks=100, block_size=16, kv_fingerprint=b"f"),
            load=worker_pb2.WorkerLoad(num_free_blocks=100),
            status=worker_pb2.WorkerStatus(phase=PHASES[worker.status], pool=worker.pool, age_seconds=1e6),
        )
        return WorkerReport(LeasedWorker(record, worker.epoch), answer, self._cluster.now_s)

    def drain(self, worker_id: str, timeout_s: float) -> None:
        self.drains[worker_id] = timeout_s
        self._cluster.act([actions.Drain(worker_id)])

    def switch(self, worker_id: str, pool: str, role: str) -> None:
        self._cluster.act([actions.SwitchRole(worker_id, pool, 2)])

    def announce(self, worker_id: str) -> None:
        self._cluster.act([actions.Announce(worker_id, 3)])


@dataclass
class Lock:
    """Held for so many calls."""

    num_calls: int = 10**9
    problem: str = ""

    def hold(self) -> bool:
        self.num_calls -= 1
        return self.num_calls >= 0

    def release(self) -> None:
        self.num_calls = 0


@dataclass
class World:
    """An autoscaler over a fake cluster of two pools that can change roles."""

    memory: Memory
    cluster: FakeCluster
    lock: Lock = field(default_factory=Lock)
    metrics: AutoscalerMetrics = field(default_factory=AutoscalerMetrics)

    def __post_init__(self) -> None:
        self.serve, self.watch = Serve(self.cluster), Watch(self.cluster)

    def autoscaler(
        self, mode: str = "act", log: DecisionLog | None = None, pools: tuple[str, ...] = ("a", "b"), **replicas: int
    ) -> Autoscaler:
        config = ClusterConfig(
            name="c",
            pools={
                name: PoolConfig(
                    role={"a": "prefill", "b": "decode"}.get(name, "mixed"),
                    replicas=replicas.get(name, 1),
                    min_replicas=1,
                    max_replicas=4,
                    drain_timeout_s={"a": 11.0, "b": 22.0}.get(name, 33.0),
                )
                for name in pools
            },
            autoscaling=AutoscalingConfig(
                mode=mode,
                policy="fixed",
                interval_s=1.0,
                up_delay_s=0.0,
                down_delay_s=0.0,
                flip_delay_s=0.0,
                shrink_share=1.0,
            ),
        )
        clock: Callable[[], float] = lambda: self.cluster.now_s  # noqa: E731
        return Autoscaler(config, self.serve, self.watch, self.memory, self.lock, self.metrics, None, log, clock, clock)  # type: ignore[arg-type]

    def run(self, autoscaler: Autoscaler, seconds: float) -> None:
        end_s = self.cluster.now_s + seconds
        while self.cluster.now_s < end_s:
            autoscaler.tick()
            self.cluster.pass_time(0.5)

    def problems(self, part: str) -> float:
        name = "switchyard_autoscaler_problems_total"
        return self.metrics.registry.get_sample_value(name, {"part": part}) or 0.0

    def ready(self) -> dict[str, int]:
        return {pool: self.cluster.ready(pool) for pool in self.cluster.replicas}


@pytest.fixture
def world(redis_server: RedisServer) -> Iterator[World]:
    memory = Memory(redis_server.url, "c")
    cluster = FakeCluster({"a": 1, "b": 1, "old": 1}, startup_s=5.0, drain_s=1.0)
    yield World(memory, cluster.start_with({"a": 1, "b": 1}))
    memory.close()


def test_pools_become_what_the_plan_wants(world: World) -> None:
    world.run(world.autoscaler(a=2, b=3), 20.0)
    assert world.ready() == {"a": 2, "b": 3}
    world.run(world.autoscaler(a=2, b=1), 20.0)
    assert world.ready() == {"a": 2, "b": 1}
    assert world.cluster.ended_while_serving == []


def test_mode_off_makes_no_plan(world: World) -> None:
    world.run(world.autoscaler("off", a=3), 5.0)
    assert (world.ready(), world.memory.lines()) == ({"a": 1, "b": 1}, [])
    assert world.metrics.registry.get_sample_value("switchyard_autoscaler_workers", {"pool": "a", "status": "ready"})


def test_a_lock_that_is_lost_between_two_actions_ends_the_round(world: World) -> None:
    autoscaler = world.autoscaler(a=3, b=3)
    autoscaler.tick()  # there is no rate before the second observation
    world.cluster.pass_time(1.0)
    world.lock.num_calls = 2  # one for the round, one for its first action
    autoscaler.tick()
    assert world.cluster.history == ["SetReplicas(pool='a', num_replicas=3)"]
    world.lock.num_calls = 10**9
    world.run(world.autoscaler(a=3, b=3), 20.0)
    assert world.ready() == {"a": 3, "b": 3}


def test_why_a_lock_cannot_be_held_is_counted(world: World) -> None:
    world.lock.num_calls, world.lock.problem = 0, "leases is forbidden"
    world.autoscaler().tick()
    assert world.problems("lease") == 1


def test_a_pool_that_left_the_configuration_is_forgotten(world: World) -> None:
    """What an autoscaler of an earlier configuration left behind."""
    old = RolloutState(None, {"a-1": Transition(to_pool="old")}, {"a": 1, "b": 1, "old": 2})
    world.memory.save(Saved(rollout=old))
    world.run(world.autoscaler(a=1, b=2), 20.0)
    assert world.ready() == {"a": 1, "b": 2}
    assert set(world.memory.load().rollout.replicas) == {"a", "b"}


def test_a_worker_that_served_in_such_a_pool_comes_home(world: World) -> None:
    world.cluster.workers[0].pool = "old"
    world.run(world.autoscaler(a=1, b=1), 20.0)
    assert world.ready() == {"a": 1, "b": 1}
    assert len(world.cluster.workers) == 2, "without a start"


def test_nothing_is_moved_to_such_a_pool(world: World) -> None:
    """Serve would end the worker that serves there first, and its home has one too many."""
    world.cluster.start_with({"a": 3})
    world.cluster.replicas["a"] = 4
    world.cluster.workers[-1].pool = "old"
    world.memory.pin("a", 1)
    world.run(world.autoscaler(a=1, b=1), 60.0)
    assert world.ready() == {"a": 1, "b": 1}
    assert not any("'old'" in action for action in world.cluster.history)
    assert world.cluster.ended_while_serving == []


def test_a_drain_lasts_as_long_as_the_streams_of_its_pool_may_take(world: World) -> None:
    (away, _) = world.cluster.workers
    away.pool = "b"
    world.memory.save(Saved(rollout=RolloutState(None, {away.worker_id: Transition(to_pool="a")}, {"a": 1, "b": 1})))
    world.run(world.autoscaler(a=1, b=1), 20.0)
    assert world.ready() == {"a": 1, "b": 1}
    assert world.watch.drains == {away.worker_id: 22.0}


def test_what_does_not_answer_changes_nothing(world: World) -> None:
    autoscaler = world.autoscaler(a=3)
    world.serve.is_away = True
    world.run(autoscaler, 3.0)
    assert (world.problems("serve"), world.ready()) == (6, {"a": 1, "b": 1})
    world.serve.is_away = False
    world.run(autoscaler, 20.0)
    assert world.ready() == {"a": 3, "b": 1}


def test_a_file_of_decisions_replays_over_a_restart_and_its_loss_ends_nothing(world: World, tmp_path: Path) -> None:
    path = tmp_path / "decisions" / "log.jsonl"
    path.parent.mkdir()
    for counts in ({"a": 2}, {"a": 1}, {"b": 2}):
        world.run(world.autoscaler(log=DecisionLog(path), **counts), 10.0)
    lines = path.read_text().splitlines()
    assert sum(line.startswith('{"start"') for line in lines) == 3
    assert list(replay(lines)) == []
    log = DecisionLog(path)
    path.unlink()
    path.parent.rmdir()
    world.run(world.autoscaler(log=log, b=3), 20.0)
    assert world.ready() == {"a": 1, "b": 3}
    assert world.problems("record") >= 1
