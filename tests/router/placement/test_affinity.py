"""The blocks that a router counts as a worker's: reported, sent and guessed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.placement.affinity import BlockChanges, HeldBlocks, SnapshotPart

A, B, C, D = (bytes([letter]) * 16 for letter in b"abcd")


def reported(*names: bytes, max_blocks: int = 100) -> HeldBlocks:
    """After a snapshot with the sequence number 10."""
    held = HeldBlocks(max_blocks)
    assert held.apply(SnapshotPart(10, 0, True, names))
    return held


def test_what_a_worker_said_counts_and_nothing_that_was_guessed_before() -> None:
    held = HeldBlocks(100)
    held.remember([A, B, C])
    assert held.match_prefix([A, B, C]) == 3
    assert held.num_reported is None
    for number in range(4):  # what ended before may still be on its way to the snapshot; not for long
        assert held.apply(SnapshotPart(10 + number, 0, True, [A]))
    assert held.num_reported == 1
    assert held.match_prefix([A, B, C]) == 1


def test_a_worker_that_evicted_a_head_has_nothing_of_the_prompt() -> None:
    held = reported(A, B, C)
    assert held.apply(BlockChanges(10, 11, [], [A]))
    assert held.match_prefix([A, B, C]) == 0
    assert held.apply(BlockChanges(11, 14, [A], [B]))
    assert held.match_prefix([A, B, C]) == 1


def test_what_was_sent_counts_at_once_and_until_the_stream_ends() -> None:
    held = reported()
    sent = held.send([A, B])
    assert held.match_prefix([A, B, C]) == 2
    for number in range(10, 20):
        assert held.apply(BlockChanges(number, number + 1, [D], []))
    assert held.match_prefix([A, B, C]) == 2, "it may wait in the worker's queue for long"
    held.let_go(sent)
    assert held.match_prefix([A, B]) == 2, "the worker's word may be on its way"
    assert held.apply(BlockChanges(20, 21, [], [D]))
    assert held.match_prefix([A, B]) == 2
    assert held.apply(BlockChanges(21, 22, [D], []))
    assert held.match_prefix([A, B]) == 0, "it had the time to say that it has them, and did not"


def test_what_two_streams_sent_counts_until_both_ended() -> None:
    held = reported()
    first, second = held.send([A]), held.send([A])
    held.let_go(first)
    for number in range(10, 14):
        assert held.apply(BlockChanges(number, number + 1, [D], []))
    assert held.match_prefix([A]) == 1
    held.let_go(second)
    for number in range(14, 18):
        assert held.apply(BlockChanges(number, number + 1, [D], []))
    assert held.match_prefix([A]) == 0


def test_what_was_confirmed_is_the_workers_to_evict() -> None:
    held = reported()
    sent = held.send([A, B])
    assert held.apply(BlockChanges(10, 11, [A, B], []))
    assert held.apply(BlockChanges(11, 12, [], [B]))
    assert held.match_prefix([A, B]) == 1
    held.let_go(sent)
    assert held.match_prefix([A, B]) == 1


def test_after_a_gap_the_guess_stands_in_until_the_next_snapshot() -> None:
    held = reported(A, B)
    held.let_go(held.send([C]))
    assert not held.apply(BlockChanges(11, 12, [D], []))
    assert held.num_reported is None
    assert (held.match_prefix([A]), held.match_prefix([C])) == (0, 1)
    assert not held.apply(BlockChanges(12, 13, [D], [])), "changes of what is not known"
    assert held.apply(SnapshotPart(20, 0, False, [A]))
    assert held.num_reported is None, "half a snapshot says nothing"
    assert held.apply(SnapshotPart(20, 1, True, [B]))
    assert held.num_reported == 2
    assert held.apply(BlockChanges(20, 21, [], [A]))


def test_parts_of_different_snapshots_do_not_mix() -> None:
    held = reported()
    assert held.apply(SnapshotPart(20, 0, False, [A]))
    assert not held.apply(SnapshotPart(21, 1, True, [B]))
    assert held.apply(SnapshotPart(22, 0, False, [A]))
    assert not held.apply(SnapshotPart(22, 2, True, [C]))
    assert not held.apply(SnapshotPart(22, 1, True, [C])), "the first part is void by now"
    assert held.apply(SnapshotPart(22, 0, True, [C]))
    assert held.num_reported == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["send", "let_go", "remember", "store", "evict", "snapshot"]), st.integers(0, 5))
    ),
    st.integers(1, 4),
)
def test_memory_is_bounded_and_the_worker_has_the_last_word(events: list[tuple[str, int]], max_blocks: int) -> None:
    held, truth, sequence = reported(max_blocks=max_blocks), set[bytes](), 10
    streams: list[object] = []
    for kind, number in events:
        name = bytes([number]) * 16
        if kind == "send":
            streams.append(held.send([name]))
        elif kind == "let_go" and streams:
            held.let_go(streams.pop(number % len(streams)))
        elif kind == "remember":
            held.remember([name])
        elif kind in ("store", "evict"):
            truth = truth | {name} if kind == "store" else truth - {name}
            event_args = ([name], []) if kind == "store" else ([], [name])
            assert held.apply(BlockChanges(sequence, sequence + 1, *event_args))
            sequence += 1
        elif kind == "snapshot":
            sequence += 5
            assert held.apply(SnapshotPart(sequence, 0, True, list(truth)))
        assert held.num_reported == len(truth)
        assert all(held.match_prefix([name]) == 1 for name in truth)
        assert len(held._sent) <= max_blocks
        assert len(held._fading) <= max_blocks
    for sent in streams:
        held.let_go(sent)
    for _ in range(2):
        assert held.apply(BlockChanges(sequence, sequence + 1, [], []))
        sequence += 1
    assert {number for number in range(6) if held.match_prefix([bytes([number]) * 16])} == {name[0] for name in truth}
