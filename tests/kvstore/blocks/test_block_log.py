"""The log of a device's blocks: its followers know what the pool holds, however slow they are."""

from __future__ import annotations

import random

from kvstore.blocks.block_log import MAX_NAMES_AT_ONCE, BlockLog
from kvstore.blocks.block_pool import BlockPool


def name(number: int) -> bytes:
    return number.to_bytes(16)


class Follower:
    """What a router makes of a log."""

    def __init__(self, log: BlockLog) -> None:
        self.log = log
        self.position = -1
        self.names: set[bytes] = set()
        self.num_snapshots = 0

    def look(self) -> None:
        """One message."""
        changes = self.log.since(self.position)
        if changes is None:
            snapshot = self.log.snapshot()
            self.position, self.names = snapshot.sequence, set(snapshot.names)
            self.num_snapshots += 1
            return
        assert changes.after == self.position
        assert len(changes.stored) + len(changes.removed) <= MAX_NAMES_AT_ONCE
        assert not set(changes.stored) & set(changes.removed)
        self.names = (self.names - set(changes.removed)) | set(changes.stored)
        self.position = changes.sequence

    def catch_up(self) -> None:
        while self.position != self.log.sequence:
            self.look()


def test_a_follower_begins_with_a_snapshot_and_goes_on_with_changes() -> None:
    log = BlockLog()
    log.restart([name(1), name(2)])
    follower = Follower(log)
    follower.catch_up()
    log.append({name(3): True, name(1): False})
    log.append({name(3): False, name(4): True})
    changes = log.since(follower.position)
    assert changes is not None
    assert (changes.after, changes.sequence) == (log.sequence - 2, log.sequence)
    assert (set(changes.stored), set(changes.removed)) == ({name(4)}, {name(1), name(3)})
    follower.catch_up()
    assert follower.names == {name(2), name(4)}
    assert follower.num_snapshots == 1


def test_who_has_everything_gets_nothing() -> None:
    log = BlockLog()
    log.restart([name(1)])
    changes = log.since(log.sequence)
    assert changes is not None
    assert (changes.sequence, changes.stored, changes.removed) == (log.sequence, [], [])


def test_who_is_too_slow_needs_a_snapshot_and_nobody_else_does() -> None:
    log = BlockLog(max_names=10)
    log.restart([])
    quick, slow = Follower(log), Follower(log)
    slow.catch_up()
    for number in range(11):
        log.append({name(number): True})
        quick.catch_up()
    assert log.since(slow.position) is None
    slow.catch_up()
    assert slow.names == quick.names == {name(number) for number in range(11)}
    assert (quick.num_snapshots, slow.num_snapshots) == (1, 2)


def test_a_number_that_was_never_given_is_a_gap() -> None:
    log = BlockLog()
    log.restart([])
    assert log.since(log.sequence + 1) is None
    assert log.since(-1) is None


def test_a_restart_voids_what_was_said_before() -> None:
    log = BlockLog()
    log.restart([name(1)])
    follower = Follower(log)
    follower.catch_up()
    log.restart([name(2)])
    assert log.since(follower.position) is None
    follower.catch_up()
    assert follower.names == {name(2)}


def test_a_large_change_comes_in_parts() -> None:
    log = BlockLog()
    log.restart([])
    follower = Follower(log)
    follower.catch_up()
    log.append({name(number): True for number in range(5000)})
    follower.look()
    assert 0 < len(follower.names) <= MAX_NAMES_AT_ONCE
    follower.catch_up()
    assert follower.names == {name(number) for number in range(5000)}
    assert follower.num_snapshots == 1


def test_followers_know_what_a_pool_holds_whatever_happens_to_it() -> None:
    """A pool under random work, four followers that look at their own pace, a log that keeps little."""
    draw = random.Random(4)
    pool, log = BlockPool(12, 16), BlockLog(max_names=12)
    log.restart(pool.record_changes(True))
    followers = [Follower(log) for _ in range(4)]
    held: list[list[int]] = []
    for _ in range(2000):
        if held and (not pool.can_allocate(3) or draw.random() < 0.4):
            pool.release(held.pop(draw.randrange(len(held))))
        else:
            held.append(pool.allocate(draw.randrange(4)))
            for block_id in held[-1]:
                pool.register(block_id, name(draw.randrange(40)))
        if held and held[-1] and draw.random() < 0.1:
            pool.forget(held[-1][0])
        changes = pool.take_changes()
        if changes is not None:
            log.append(changes)
        truth = {n for block_id in range(12) if (n := pool.name_of(block_id)) is not None}
        assert set(log.snapshot().names) == truth
        for pace, follower in enumerate(followers, 1):
            if draw.random() < 1 / pace**2:
                follower.catch_up()
                assert follower.names == truth
    assert followers[0].num_snapshots == 1
    assert followers[-1].num_snapshots > 1


def test_a_pool_notes_nothing_that_nobody_asked_for() -> None:
    pool = BlockPool(4, 16)
    (block_id,) = pool.allocate(1)
    pool.register(block_id, name(1))
    assert pool.take_changes() is None
    assert pool.record_changes(True) == [name(1)]
    assert pool.take_changes() is None
    pool.register(block_id, name(2))
    assert pool.take_changes() == {name(1): False, name(2): True}
    assert pool.take_changes() is None
    pool.forget(block_id)
    pool.record_changes(False)
    assert pool.take_changes() is None


def test_what_a_pool_evicts_it_says() -> None:
    pool = BlockPool(2, 16)
    pool.record_changes(True)
    block_ids = pool.allocate(2)
    for block_id in block_ids:
        pool.register(block_id, name(block_id))
    pool.release(block_ids)
    pool.take_changes()
    pool.allocate(1)
    assert pool.take_changes() == {name(block_ids[1]): False}
