"""Whether a worker is the same as before, after it or the directory was away."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.control.directory import DirectoryUnavailable, MemoryDirectory, WorkerRecord
from workers.server.lease import Lease

RECORD = WorkerRecord("w1", "127.0.0.1:7", "mixed", "mixed", "n1")
TTL_S = 3.0


class World:
    """A clock, a worker's lease and the directory that it is in."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.directory = MemoryDirectory(self.clock, first_epoch=10)
        self.lease = Lease(TTL_S, self.clock)
        assert not self.lease.renew(self.directory, RECORD)

    def clock(self) -> float:
        return self.now_s

    def run(self, duration_s: float, during: Callable[[], None] = lambda: None) -> None:
        """The worker lives, pulse after pulse."""
        for _ in range(round(duration_s / 0.25)):
            self.now_s += 0.25
            self.lease.pulse()
            during()


def test_a_renewed_lease_is_the_same() -> None:
    world = World()
    for _ in range(10):
        world.run(1.0)
        assert not world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 10


def test_who_stopped_for_longer_than_its_lease_is_new() -> None:
    world = World()
    world.now_s += TTL_S
    assert world.directory.workers() == []
    assert world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 11
    world.run(1.0)
    assert not world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 11


def test_a_shorter_stop_may_have_cost_the_lease_too() -> None:
    world = World()
    world.run(1.0)
    world.now_s += 2.0
    world.lease.pulse()  # whoever notices first
    assert world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 11


def test_who_stopped_and_has_its_lease_still_is_the_same() -> None:
    world = World()
    world.now_s += TTL_S - 0.1
    assert not world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 10


def test_who_could_not_reach_the_directory_is_the_same() -> None:
    world = World()

    class Away(MemoryDirectory):
        def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
            raise DirectoryUnavailable("nobody there")

    def fail() -> None:
        with pytest.raises(DirectoryUnavailable):
            world.lease.renew(Away(world.clock), RECORD)

    world.run(20.0, fail)
    assert world.lease.epoch == 10
    assert world.directory.workers() == []
    assert not world.lease.renew(world.directory, RECORD)
    assert [worker.epoch for worker in world.directory.workers()] == [10]


def test_a_directory_that_forgot_gives_the_lease_back() -> None:
    world = World()
    world.run(1.0)
    empty = MemoryDirectory(world.clock, first_epoch=1000)
    assert not world.lease.renew(empty, RECORD)
    assert world.lease.epoch == 10


def test_who_stopped_while_the_directory_was_away_is_new() -> None:
    world = World()
    world.now_s += 10.0
    world.run(10.0)
    assert world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 11


def test_an_answer_from_before_a_stop_is_asked_for_again() -> None:
    world = World()

    class Stopping(MemoryDirectory):
        def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
            epoch = world.directory.keep_alive(record, ttl_s, held_epoch)
            world.now_s += 5.0
            return epoch

    world.run(1.0)
    assert not world.lease.renew(Stopping(world.clock), RECORD)
    world.run(0.75)
    assert world.lease.renew(world.directory, RECORD)
    assert world.lease.epoch == 11
