"""What every directory does, asked of all of them: in memory, of a real node process, in a real Redis."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore.connect import open_directory
from kvstore.control.directory import Directory, DirectoryUnavailable, MemoryDirectory, WorkerRecord
from kvstore.control.redis_directory import PREFIX, RedisDirectory
from tests.processes import KVNode, RedisServer, free_port, wait_until

RECORD = WorkerRecord(worker_id="w1", address="127.0.0.1:7", pool="decode", role="decode", node_id="n1")
REAL = ["remote", pytest.param("redis", marks=pytest.mark.redis)]


def block_names(count: int) -> list[bytes]:
    return [random.randbytes(16) for _ in range(count)]


def record(worker_id: str) -> WorkerRecord:
    return replace(RECORD, worker_id=worker_id)


@pytest.fixture(params=["memory", *REAL])
def directory(request: pytest.FixtureRequest) -> Iterator[Directory]:
    made: Directory
    if request.param == "memory":
        made = MemoryDirectory(time.monotonic)
    elif request.param == "remote":
        made = open_directory(request.getfixturevalue("shared_kv_node").control_url, "")
    else:
        made = open_directory(request.getfixturevalue("redis_server").url, "")
    yield made
    for worker in made.workers():
        made.withdraw(worker.record.worker_id)
    made.close()


def test_a_registered_worker_is_listed_as_it_said(directory: Directory) -> None:
    epoch = directory.keep_alive(RECORD, 60)
    assert epoch > 0
    (worker,) = directory.workers()
    assert (worker.record, worker.epoch) == (RECORD, epoch)


def test_workers_are_listed_in_order(directory: Directory) -> None:
    for worker_id in ("b", "c", "a"):
        directory.keep_alive(record(worker_id), 60)
    assert [worker.record.worker_id for worker in directory.workers()] == ["a", "b", "c"]


def test_a_renewed_lease_keeps_its_epoch_and_takes_the_new_record(directory: Directory) -> None:
    epoch = directory.keep_alive(RECORD, 60)
    switched = replace(RECORD, role="mixed")
    assert directory.keep_alive(switched, 60) == epoch
    assert [worker.record for worker in directory.workers()] == [switched]


def test_every_registration_has_a_greater_epoch(directory: Directory) -> None:
    first = directory.keep_alive(record("a"), 60)
    second = directory.keep_alive(record("b"), 60)
    directory.withdraw("a")
    third = directory.keep_alive(record("a"), 60)
    assert first < second < third


def test_a_withdrawn_worker_is_gone_at_once(directory: Directory) -> None:
    directory.keep_alive(record("a"), 60)
    directory.keep_alive(record("b"), 60)
    directory.withdraw("a")
    assert [worker.record.worker_id for worker in directory.workers()] == ["b"]
    directory.withdraw("a")
    directory.withdraw("never there")


def test_a_lease_that_is_not_renewed_ends(directory: Directory) -> None:
    epoch = directory.keep_alive(RECORD, 0.2)
    wait_until(lambda: directory.workers() == [], "the lease ended")
    assert directory.keep_alive(RECORD, 60) > epoch


def test_a_lost_lease_is_given_back_to_who_held_on_to_it(directory: Directory) -> None:
    epoch = directory.keep_alive(RECORD, 60)
    directory.withdraw("w1")
    assert directory.keep_alive(RECORD, 60, held_epoch=epoch) == epoch
    assert [worker.epoch for worker in directory.workers()] == [epoch]
    assert directory.keep_alive(record("w2"), 60) > epoch


def test_no_epoch_is_given_twice_though_the_directory_forgot_it(directory: Directory) -> None:
    ahead = directory.keep_alive(record("a"), 60) + 1_000_000_000
    assert directory.keep_alive(record("b"), 60, held_epoch=ahead) == ahead
    assert directory.keep_alive(record("c"), 60) > ahead


def test_a_live_lease_keeps_its_epoch_whatever_is_asked_for(directory: Directory) -> None:
    epoch = directory.keep_alive(RECORD, 60)
    assert directory.keep_alive(RECORD, 60, held_epoch=epoch + 5) == epoch
    assert directory.keep_alive(RECORD, 60, held_epoch=epoch - 1) == epoch


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lease_needs_a_finite_time(directory: Directory, ttl_s: float) -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        directory.keep_alive(RECORD, ttl_s)


def test_a_lease_needs_a_worker_id(directory: Directory) -> None:
    with pytest.raises(ValueError, match="worker_id"):
        directory.keep_alive(record(""), 60)


def test_published_blocks_are_located(directory: Directory) -> None:
    names = block_names(3)
    directory.publish(names[:2], "host:n1")
    directory.publish(names[1:], "redis")
    assert directory.locate(names) == [
        frozenset({"host:n1"}),
        frozenset({"host:n1", "redis"}),
        frozenset({"redis"}),
    ]


def test_publishing_again_changes_nothing(directory: Directory) -> None:
    names = block_names(2)
    directory.publish(names, "redis")
    directory.publish(names, "redis")
    assert directory.locate(names) == [frozenset({"redis"})] * 2


def test_unknown_blocks_are_nowhere(directory: Directory) -> None:
    known, unknown = block_names(1), block_names(2)
    directory.publish(known, "redis")
    assert directory.locate([unknown[0], known[0], unknown[1]]) == [frozenset(), frozenset({"redis"}), frozenset()]
    assert directory.locate([]) == []
    directory.publish([], "redis")


def test_many_blocks_at_once(directory: Directory) -> None:
    names = block_names(2000)
    directory.publish(names, "host:n1")
    assert directory.locate(names) == [frozenset({"host:n1"})] * 2000


def test_threads_may_share_it(directory: Directory) -> None:
    epochs: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            epochs.append(directory.keep_alive(record(f"w{index}"), 60))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(epochs) == 20
    assert len(set(epochs)) == 4
    assert len(directory.workers()) == 4


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_memory_leases_end_at_their_deadline() -> None:
    clock = Clock()
    directory = MemoryDirectory(clock, first_epoch=7)
    assert directory.keep_alive(RECORD, 10) == 7
    clock.now_s = 9.9
    assert directory.keep_alive(RECORD, 10) == 7
    clock.now_s = 19.8
    assert len(directory.workers()) == 1
    clock.now_s = 19.9
    assert directory.workers() == []
    assert directory.keep_alive(RECORD, 10) == 8


def test_memory_blocks_are_bounded_in_number() -> None:
    directory = MemoryDirectory(Clock(), max_blocks=3)
    names = block_names(4)
    directory.publish(names[:3], "redis")
    directory.locate(names[:1])  # a use
    directory.publish(names[3:], "redis")
    assert [bool(locations) for locations in directory.locate(names)] == [True, False, True, True]


def test_memory_blocks_are_bounded_in_age() -> None:
    clock = Clock()
    directory = MemoryDirectory(clock, block_ttl_s=10)
    names = block_names(1)
    directory.publish(names, "host:n1")
    clock.now_s = 5
    directory.publish(names, "redis")
    assert directory.locate(names) == [frozenset({"host:n1", "redis"})]
    clock.now_s = 12
    assert directory.locate(names) == [frozenset({"redis"})]
    clock.now_s = 15
    assert directory.locate(names) == [frozenset()]


@pytest.mark.redis
def test_redis_blocks_are_bounded_in_number(redis_server: RedisServer) -> None:
    directory = RedisDirectory(redis_server.url, max_blocks=10)
    old, new = block_names(8), block_names(8)
    directory.publish(old, "redis")
    time.sleep(0.005)  # the order is by milliseconds of the server's clock
    directory.publish(new, "redis")
    assert all(directory.locate(new))
    assert sum(map(bool, directory.locate(old))) == 2
    with redis_server.client() as client:
        assert len(client.keys(PREFIX + b":block:*")) == client.zcard(PREFIX + b":blocks") == 10
    directory.close()


@pytest.mark.redis
def test_redis_blocks_are_bounded_in_age(redis_server: RedisServer) -> None:
    directory = RedisDirectory(redis_server.url, block_ttl_s=0.1)
    names = block_names(2)
    directory.publish(names, "redis")
    wait_until(lambda: not any(directory.locate(names)), "the blocks are forgotten")
    directory.publish(block_names(1), "redis")
    with redis_server.client() as client:
        assert client.zcard(PREFIX + b":blocks") == 1
    directory.close()


@pytest.mark.redis
def test_redis_leases_are_keys_with_a_time_to_live(redis_server: RedisServer) -> None:
    directory = RedisDirectory(redis_server.url)
    directory.keep_alive(RECORD, 60)
    with redis_server.client() as client:
        assert 0 < client.pttl(PREFIX + b":worker:w1") <= 60_000
    directory.close()


@pytest.mark.redis
def test_redis_epochs_grow_though_the_counter_was_lost(redis_server: RedisServer) -> None:
    directory = RedisDirectory(redis_server.url)
    before = directory.keep_alive(RECORD, 60)
    redis_server.restart()
    assert directory.keep_alive(RECORD, 60) > before
    directory.close()


@pytest.mark.redis
def test_redis_lost_and_back(redis_server: RedisServer) -> None:
    directory = RedisDirectory(redis_server.url)
    names = block_names(1)
    directory.keep_alive(RECORD, 60)
    redis_server.kill()
    calls = [
        lambda: directory.keep_alive(RECORD, 60),
        lambda: directory.withdraw("w1"),
        directory.workers,
        lambda: directory.publish(names, "redis"),
        lambda: directory.locate(names),
    ]
    for call in calls:
        with pytest.raises(DirectoryUnavailable, match=r"directory at 127\.0\.0\.1"):
            call()
    redis_server.start()
    directory.keep_alive(RECORD, 60)
    assert len(directory.workers()) == 1
    directory.close()


def test_remote_lost_and_back(kv_node: KVNode) -> None:
    directory = open_directory(kv_node.control_url, "")
    names = block_names(1)
    before = directory.keep_alive(RECORD, 60)
    kv_node.kill()
    calls = [
        lambda: directory.keep_alive(RECORD, 60),
        lambda: directory.withdraw("w1"),
        directory.workers,
        lambda: directory.publish(names, "redis"),
        lambda: directory.locate(names),
    ]
    for call in calls:
        with pytest.raises(DirectoryUnavailable, match="directory at"):
            call()
    kv_node.start()

    def is_back() -> bool:
        try:
            return directory.workers() == []
        except DirectoryUnavailable:
            return False

    wait_until(is_back, "the directory answers again")
    assert directory.keep_alive(RECORD, 60) > before  # epochs grow across the node's lives
    directory.close()


def test_a_closed_remote_directory_is_unavailable(shared_kv_node: KVNode) -> None:
    directory = open_directory(shared_kv_node.control_url, "")
    directory.close()
    with pytest.raises(DirectoryUnavailable, match="does not answer"):
        directory.workers()


@pytest.mark.parametrize("url", ["memory://127.0.0.1:{port}", "redis://127.0.0.1:{port}/0"])
def test_nobody_listens(url: str) -> None:
    directory = open_directory(url.format(port=free_port()), "")
    with pytest.raises(DirectoryUnavailable):
        directory.workers()
    directory.close()
