"""What the autoscaler sees and keeps: Serve's order of ending, rates from counters, and its memory in a real Redis."""

from __future__ import annotations

import math

import pytest
from switchyard.v1 import worker_pb2

from deploy.autoscaling.memory import Memory, MemoryUnavailable
from deploy.autoscaling.observe import Observer, progress_of
from deploy.autoscaling.serve_api import RUNNING, STARTING, STOPPING, ServePool, ServeReplica, ServeState
from deploy.autoscaling.workers import WorkerReport
from deploy.config import ClusterConfig, PoolConfig
from kvstore.control.directory import LeasedWorker, WorkerRecord
from planner.scaling.actions import SILENT
from planner.scaling.config import AutoscalingConfig
from planner.scaling.decide import ScalingState, decide
from planner.scaling.observation import Observation, PoolObservation, why_unusable
from planner.scaling.record import DecisionRecord, Saved, Start, replay
from planner.scaling.rollout import RolloutState, WorkerCounts, adopt, count_workers
from tests.processes import RedisServer

CONFIG = ClusterConfig(
    name="c",
    pools={
        "prefill": PoolConfig(role="prefill", max_replicas=4),
        "decode": PoolConfig(role="decode", max_replicas=4, tp=2),
    },
)


def replica(name: str, start_s: float, node: str, state: str = RUNNING) -> ServeReplica:
    return ServeReplica(name, state, start_s, node)


def order(*replicas: ServeReplica, head: str = "head", others: tuple[ServeReplica, ...] = ()) -> list[str]:
    pools = {
        "other": ServePool("RUNNING", "", len(others), others),
        "decode": ServePool("RUNNING", "", len(replicas), replicas),
    }
    progress = progress_of(ServeState(pools, head), {})
    return [w.worker_id.removeprefix("decode-") for w in progress.workers if w.home_pool == "decode"]


def test_with_a_node_each_the_oldest_worker_ends_first() -> None:
    assert order(replica("a", 3, "n3"), replica("b", 1, "n1"), replica("c", 2, "n2")) == ["b", "c", "a"]


def test_on_one_node_the_newest_worker_ends_first() -> None:
    assert order(replica("a", 3, "n"), replica("b", 1, "n"), replica("c", 2, "n")) == ["a", "c", "b"]


def test_nodes_with_few_workers_are_emptied_first_and_the_head_last() -> None:
    others = (replica("x", 0, "n1"),)
    assert order(replica("a", 1, "n1"), replica("b", 2, "n2"), others=others) == ["b", "a"]
    assert order(replica("a", 1, "n1"), replica("b", 2, "n2"), head="n1") == ["b", "a"]


def test_workers_that_do_not_run_come_before_those_that_do() -> None:
    ending, starting = replica("e", 1, "n1", STOPPING), replica("s", 9, "", STARTING)
    assert order(replica("a", 2, "n2"), starting, ending) == ["e", "s", "a"]


def report(worker_id: str, pool: str, at_s: float, age_s: float, **load: float) -> WorkerReport:
    record = WorkerRecord(worker_id, "h:1", pool, pool, "n")
    said = worker_pb2.GetLoadResponse(
        worker=worker_pb2.WorkerHello(num_blocks=100, block_size=16, kv_fingerprint=b"f"),
        load=worker_pb2.WorkerLoad(**{"num_free_blocks": 60, **load}),
        status=worker_pb2.WorkerStatus(phase=worker_pb2.WORKER_PHASE_READY, pool=pool, age_seconds=age_s),
    )
    return WorkerReport(LeasedWorker(record, 1), said, at_s)


def observe(observer: Observer, *reports: WorkerReport, now_s: float) -> dict[str, PoolObservation]:
    counts = {"prefill": WorkerCounts(num_ready=1), "decode": WorkerCounts(num_ready=1)}
    seen = {s.leased.record.worker_id: s for s in reports}
    return {pool.name: pool for pool in observer.observe(seen, counts, {}, now_s).pools}


def test_rates_and_means_are_of_the_last_interval() -> None:
    observer = Observer(CONFIG)
    before = report("prefill-a", "prefill", 10.0, 100.0, num_requests=50, num_prompt_tokens=5000, num_ended_requests=50)
    observe(observer, before, now_s=10.0)
    after = report(
        "prefill-a",
        "prefill",
        20.0,
        110.0,
        num_requests=70,
        num_prompt_tokens=5000 + 20 * 300,
        num_ended_requests=60,
        num_ended_uncached_tokens=10 * 200,
        num_ended_output_tokens=10,
        num_computed_prompt_tokens=40 * 50,
        uncached_tokens_squared=10 * 50_000.0,
        num_steps=40,
        step_seconds=8.0,
        step_context_tokens=40 * 1000,
        num_queued_tokens=1234,
    )
    pool = observe(observer, after, now_s=21.5)["prefill"]
    assert pool.arrivals_per_s == pytest.approx(2.0)
    assert pool.context_tokens_mean == pytest.approx(300.0)
    assert (pool.uncached_tokens_mean, pool.uncached_tokens_square_mean) == pytest.approx((200.0, 50_000.0))
    assert (pool.output_tokens_mean, pool.num_queued_tokens) == (1.0, 1234.0)
    assert (pool.num_kv_blocks_used, pool.kv_blocks_per_worker) == (40.0, 100)
    assert pool.metrics_age_s == pytest.approx(1.5)
    (step,) = pool.step_samples
    assert (step.duration_s, step.num_prefill_tokens, step.num_context_tokens) == pytest.approx((0.2, 50.0, 1000.0))
    assert step.worker_age_s == pytest.approx(100.0)


def test_what_no_request_has_shown_yet_is_not_a_number_and_the_last_means_stay() -> None:
    observer = Observer(CONFIG)
    empty = observe(observer, now_s=0.0)["decode"]
    assert math.isnan(empty.output_tokens_mean)
    assert (empty.arrivals_per_s, empty.metrics_age_s, empty.gpus_per_worker) == (0.0, 0.0, 2)
    new = report("decode-a", "decode", 10.0, 5.0, num_requests=10, num_ended_requests=5, num_ended_output_tokens=500)
    assert observe(observer, new, now_s=10.0)["decode"].arrivals_per_s == pytest.approx(2.0), "since it started"
    later = report("decode-a", "decode", 20.0, 15.0, num_requests=10, num_ended_requests=5, num_ended_output_tokens=500)
    pool = observe(observer, later, now_s=20.0)["decode"]
    assert (pool.arrivals_per_s, pool.output_tokens_mean) == (0.0, 100.0)


def test_a_worker_counts_where_it_serves_now() -> None:
    observer = Observer(CONFIG)
    observe(observer, now_s=0.0)
    seen = observe(observer, report("prefill-a", "decode", 10.0, 5.0, num_requests=10), now_s=10.0)
    assert (seen["prefill"].arrivals_per_s, seen["decode"].arrivals_per_s) == (0.0, 2.0)


def test_an_interval_that_was_not_seen_whole_gives_no_rate() -> None:
    observer = Observer(CONFIG)
    old = report("decode-a", "decode", 10.0, 3600.0, num_requests=7200)
    first = observe(observer, old, now_s=10.0)["decode"]
    assert math.isnan(first.arrivals_per_s), "the rate of an hour is not that of now, and no rate is not zero"
    assert why_unusable(first, 60.0) == "arrivals_per_s is nan"
    # Another one was seen in the prefill pool until now: it did not get these requests here.
    flipped = [report("prefill-b", pool, at_s, at_s, num_requests=n) for pool, at_s, n in (
        ("prefill", 20.0, 50), ("decode", 30.0, 90))]  # fmt: skip
    calm = report("decode-a", "decode", 20.0, 3610.0, num_requests=7200)
    observe(observer, calm, flipped[0], now_s=20.0)
    after = report("decode-a", "decode", 30.0, 3620.0, num_requests=7230)
    seen = observe(observer, after, flipped[1], now_s=30.0)
    assert seen["decode"].arrivals_per_s == pytest.approx(6.0), "as if it got what the other one got"


def test_a_worker_that_drains_does_not_stand_for_those_that_were_not_heard() -> None:
    observer = Observer(CONFIG)
    observe(observer, report("decode-a", "decode", 10.0, 99.0), report("decode-b", "decode", 10.0, 99.0), now_s=10.0)
    draining = report("decode-a", "decode", 20.0, 109.0, num_requests=40)
    draining.answer.status.phase = worker_pb2.WORKER_PHASE_DRAINING
    unheard = report("decode-b", "decode", 10.0, 99.0)
    assert math.isnan(observe(observer, draining, unheard, now_s=20.0)["decode"].arrivals_per_s)
    observer = Observer(CONFIG)
    observe(observer, report("decode-a", "decode", 10.0, 99.0), report("decode-b", "decode", 10.0, 99.0), now_s=10.0)
    heard = report("decode-b", "decode", 20.0, 109.0, num_requests=60)
    assert observe(observer, draining, heard, now_s=20.0)["decode"].arrivals_per_s == pytest.approx(10.0)


def test_the_wait_for_kv_is_part_of_what_prefill_pools_are_sized_for() -> None:
    observer = Observer(CONFIG)
    observe(observer, report("decode-a", "decode", 10.0, 100.0), now_s=10.0)
    after = report("decode-a", "decode", 20.0, 110.0, num_kv_waits=10, kv_wait_seconds=2.5)
    seen = observe(observer, after, now_s=20.0)
    assert (seen["prefill"].handoff_s, seen["decode"].handoff_s) == pytest.approx((0.25, 0.0))


def test_a_worker_that_is_not_heard_for_a_round_is_neither_starting_nor_gone() -> None:
    observer = Observer(CONFIG)
    state = ServeState({"prefill": ServePool("", "", 1, (replica("a", 100.0, "n"),))}, "")
    flipped = {"prefill-a": report("prefill-a", "decode", 0.0, 1.0)}
    observer.note_starts(observer.progress(state, flipped), state, 130.0)
    (silent,) = observer.progress(state, {}).workers
    assert (silent.status, silent.pool) == (SILENT, "decode")
    observer.note_starts(observer.progress(state, {}), state, 5000.0)
    observer.note_starts(observer.progress(state, flipped), state, 5001.0)
    assert observer.startup_s == {}, "it started long ago"
    counts = count_workers(RolloutState(), observer.progress(state, {}))["decode"]
    assert counts == WorkerCounts(num_silent=1)


def test_starts_are_measured_from_the_request_to_the_first_readiness() -> None:
    observer = Observer(CONFIG)
    starting = ServeState({"decode": ServePool("", "", 1, (replica("a", 100.0, "", STARTING),))}, "")
    observer.note_starts(progress_of(starting, {}), starting, 105.0)
    running = ServeState({"decode": ServePool("", "", 1, (replica("a", 100.0, "n"),))}, "")
    ready = progress_of(running, {"decode-a": report("decode-a", "decode", 0.0, 1.0)})
    observer.note_starts(ready, running, 130.0)
    assert observe(observer, now_s=0.0)["decode"].startup_s == pytest.approx(30.0)


# ---- its memory


def decided(now_s: float, state: ScalingState) -> tuple[DecisionRecord, ScalingState]:
    observed = Observation((PoolObservation(name="m", role="mixed", num_ready=1, max_workers=3),))
    plan, after, explanation = decide(observed, state, now_s, AutoscalingConfig(mode="act"))
    return DecisionRecord(now_s, observed, plan, explanation), after


@pytest.mark.redis
def test_the_next_autoscaler_goes_on_where_the_last_one_was(redis_server: RedisServer) -> None:
    memory = Memory(redis_server.url, "c")
    assert memory.load() == Saved()
    record, state = decided(1.0, ScalingState())
    progress = progress_of(ServeState({}, ""), {})
    rollout = adopt(RolloutState(), record.plan)
    memory.save(Saved(state, rollout))
    found = Memory(redis_server.url, "c").load()
    assert found == Saved(state, rollout)
    assert count_workers(found.rollout, progress) == count_workers(rollout, progress)
    memory.save_startups({"decode": 6.5})
    assert Memory(redis_server.url, "c").startups() == {"decode": 6.5}
    assert Memory(redis_server.url, "another").load() == Saved()
    with redis_server.client() as client:
        client.set("switchyard:autoscaler1:c:saved", b"of a later version")
    assert memory.load() == Saved()


@pytest.mark.redis
def test_decisions_that_are_kept_can_be_made_again(redis_server: RedisServer) -> None:
    memory, state = Memory(redis_server.url, "c"), ScalingState()
    config = AutoscalingConfig(mode="act")
    for number in range(2300):  # more than are kept
        record, after = decided(float(number), state)
        memory.write(Start(config, state), record, after)
        state = after
    lines = memory.lines()
    assert 1800 < len(lines) <= 2000
    assert lines[0].startswith('{"start"')
    assert list(replay(lines)) == []


@pytest.mark.redis
def test_pins_are_kept_until_they_are_taken_back(redis_server: RedisServer) -> None:
    memory = Memory(redis_server.url, "c")
    memory.pin("decode", 3)
    memory.pin("prefill", 0)
    assert Memory(redis_server.url, "c").pins() == {"decode": 3, "prefill": 0}
    memory.pin("decode", None)
    assert memory.pins() == {"prefill": 0}


@pytest.mark.redis
def test_one_autoscaler_holds_the_lock(redis_server: RedisServer) -> None:
    first, second = Memory(redis_server.url, "c"), Memory(redis_server.url, "c")
    assert first.hold()
    assert first.hold()
    assert not second.hold()
    second.release()  # not its own
    assert not second.hold()
    first.release()
    assert second.hold()
    assert not first.hold()
    with redis_server.client() as client:
        assert 10_000 < client.pttl("switchyard:autoscaler1:c:lock") <= 15_000


@pytest.mark.redis
def test_a_redis_that_is_away_is_one_line(redis_server: RedisServer) -> None:
    memory = Memory(redis_server.url, "c")
    redis_server.kill()
    for call in (memory.load, memory.pins, memory.lines, lambda: memory.save(Saved())):
        with pytest.raises(MemoryUnavailable, match=r"127\.0\.0\.1"):
            call()
    assert not memory.hold()
    assert "127.0.0.1" in memory.problem
    memory.release()
