"""What is particular to the host tier: slots, pressure, and a node process that goes and comes back."""

import uuid
from collections.abc import Iterator

import pytest
from switchyard.v1 import kvnode_pb2

from kvstore.config import CALLS_SUFFIX
from kvstore.format.fragment import Fragment, Rejected
from kvstore.names import FRAGMENT_KEY_BYTES
from kvstore.network.quick_calls import CallRefused
from kvstore.tiers.host import host_tier
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.host.slot_calls import SlotCalls
from tests.kvstore.fragments import keys_of, make_fragments
from tests.processes import KVNode, wait_until


@pytest.fixture(scope="module")
def node() -> Iterator[KVNode]:
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", slot_bytes=4096, num_slots=16)
    yield node
    node.close()


@pytest.fixture
def tier(node: KVNode) -> Iterator[HostTier]:
    tier = HostTier(node.host_address)
    yield tier
    tier.close()


@pytest.fixture
def calls(node: KVNode) -> Iterator[SlotCalls]:
    calls = SlotCalls(node.host_address + CALLS_SUFFIX)
    yield calls
    calls.close()


def test_knows_its_node(tier: HostTier, node: KVNode) -> None:
    assert tier.node_id == node.node_id
    assert (tier.name, tier.is_up) == ("host", True)


def test_two_workers_share_what_one_of_them_wrote(tier: HostTier, node: KVNode) -> None:
    fragments = make_fragments(4)
    other = HostTier(node.host_address)
    tier.store(fragments)
    assert list(other.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    other.close()


def test_under_pressure_the_oldest_go_and_nothing_wrong_is_read(tier: HostTier, node: KVNode) -> None:
    batches = [make_fragments(6) for _ in range(4)]
    for batch in batches:
        assert tier.store(batch) == [True] * 6
    assert list(tier.load(keys_of(batches[3]))) == [fragment.payload for fragment in batches[3]]
    assert list(tier.load(keys_of(batches[0]))) == [None] * 6
    for fragment, got in zip(batches[1], tier.load(keys_of(batches[1])), strict=True):
        assert got is None or got == fragment.payload


def test_a_batch_larger_than_the_arena_keeps_what_fits(tier: HostTier, node: KVNode) -> None:
    fragments = make_fragments(node.num_slots + 4)
    stored = tier.store(fragments)
    assert stored == [True] * node.num_slots + [False] * 4
    got = list(tier.load(keys_of(fragments)))
    assert got == [f.payload if is_stored else None for f, is_stored in zip(fragments, stored, strict=True)]


def test_a_fragment_larger_than_a_slot_is_not_kept(tier: HostTier, node: KVNode) -> None:
    (large,), (small,) = make_fragments(1, node.slot_bytes + 1), make_fragments(1, node.slot_bytes)
    assert tier.store([large, small]) == [False, True]
    assert list(tier.load([large.key, small.key])) == [None, small.payload]


def test_what_was_prepared_is_put_with_one_reservation(tier: HostTier, node: KVNode) -> None:
    fragments = make_fragments(node.num_slots // 2)
    tier.prepare(keys_of(fragments))
    assert len(tier._prepared) == 1
    assert tier.store(fragments) == [True] * len(fragments)
    assert len(tier._prepared) == 0
    others = make_fragments(node.num_slots // 2)
    assert tier.store(others) == [True] * len(others)  # nothing had to go for a second reservation
    assert list(tier.load(keys_of(fragments + others))) == [fragment.payload for fragment in fragments + others]


def test_more_is_prepared_than_is_remembered(tier: HostTier, node: KVNode) -> None:
    """Each is reserved once: the arena has slots for all of them, and for nothing else."""
    fragments = make_fragments(node.num_slots)
    for fragment in fragments:
        tier.prepare([fragment.key])
    assert len(tier._prepared) == 8
    assert [tier.store([fragment]) for fragment in fragments] == [[True]] * node.num_slots
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]


def test_what_is_there_already_when_it_is_prepared_is_not_written_again(tier: HostTier) -> None:
    old, new = make_fragments(2), make_fragments(2)
    tier.store(old)
    tier.prepare(keys_of([*old, *new]))
    assert tier.store([*old, *new]) == [True] * 4
    assert list(tier.load(keys_of([*old, *new]))) == [fragment.payload for fragment in [*old, *new]]


def test_what_was_there_when_it_was_prepared_and_has_gone_is_written(tier: HostTier, node: KVNode) -> None:
    old = make_fragments(2)
    tier.store(old)
    tier.prepare(keys_of(old))
    assert list(tier.load(keys_of(old))) == [fragment.payload for fragment in old]  # the node has answered by now
    tier.store(make_fragments(node.num_slots))
    assert list(tier.load(keys_of(old))) == [None, None]
    assert tier.store(old) == [True, True]
    assert list(tier.load(keys_of(old))) == [fragment.payload for fragment in old]


def test_a_slot_that_was_given_to_another_writer_is_not_written_to(
    tier: HostTier, calls: SlotCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when this process stood still for longer than a reservation lasts."""
    (kept,) = make_fragments(1)
    assert tier.store([kept]) == [True]
    found = calls.lookup(kvnode_pb2.LookupRequest(keys=[kept.key]))
    monkeypatch.setattr(tier, "_reserve", lambda arena, keys: [(found.slots[0], found.generations[0] - 1)])
    assert tier.store(make_fragments(1)) == [False]
    assert list(tier.load([kept.key])) == [kept.payload]


def test_good_bytes_that_do_not_fit_the_buffer_are_rejected_and_stay(tier: HostTier) -> None:
    (fragment,) = make_fragments(1)
    tier.store([fragment])
    assert list(tier.load_into([fragment.key], [memoryview(bytearray(999))])) == [Rejected("layout")]
    assert list(tier.load([fragment.key])) == [fragment.payload]


def test_what_was_prepared_and_never_put_is_forgotten(tier: HostTier, node: KVNode) -> None:
    node.kill()  # the reservations of this test hold half of the slots until they expire
    node.start()
    wait_until(lambda: tier.is_up and tier.store(make_fragments(1)) == [True], "the new arena takes fragments")
    for _ in range(10):
        tier.prepare(keys_of(make_fragments(1)))
    assert len(tier._prepared) == 8
    fragments = make_fragments(2)
    assert tier.store(fragments) == [True, True]
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    node.kill()
    node.start()


def test_a_preparation_that_is_too_old_is_not_used(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    fragments = make_fragments(3)
    tier.prepare(keys_of(fragments))
    monkeypatch.setattr(host_tier, "_PREPARED_S", 0.0)
    assert tier.store(fragments) == [True] * 3
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    assert not tier._prepared


def test_a_node_that_was_replaced_after_it_was_asked(tier: HostTier, node: KVNode) -> None:
    fragments = make_fragments(3)
    tier.prepare(keys_of(fragments))
    node.kill()
    assert tier.store(fragments) == [False] * 3
    tier.prepare(keys_of(fragments))  # the node is away
    node.start()
    wait_until(lambda: tier.store(fragments) == [True] * 3, "fragments are in the new arena")
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]


def test_a_key_of_another_length_is_the_callers_error(tier: HostTier) -> None:
    with pytest.raises(ValueError, match="22 bytes"):
        tier.load([b"short"])
    with pytest.raises(ValueError, match="22 bytes"):
        tier.store([Fragment(b"short", memoryview(b"x"))])


def test_a_slot_given_to_another_fragment_is_stale_for_its_former_reader(tier: HostTier, calls: SlotCalls) -> None:
    (fragment,) = make_fragments(1)
    tier.store([fragment])
    found = calls.lookup(kvnode_pb2.LookupRequest(keys=[fragment.key]))
    for _ in range(3):
        tier.store(make_fragments(16))
    arena = tier._arena
    assert arena is not None
    assert arena.read(found.slots[0], fragment.key, found.generations[0]) == Rejected("stale")


def test_a_reservation_in_progress_is_not_readable(tier: HostTier, calls: SlotCalls) -> None:
    (fragment,) = make_fragments(1)
    reserved = calls.reserve(kvnode_pb2.ReserveRequest(keys=[fragment.key]))
    assert list(tier.load([fragment.key])) == [None]
    assert tier.store([fragment]) == [True]  # another writer does not wait for it
    assert list(tier.load([fragment.key])) == [fragment.payload]
    calls.seal(
        kvnode_pb2.SealRequest(keys=[fragment.key], slots=reserved.slots, generations=reserved.generations)
    )  # late and empty-handed: changes nothing
    assert list(tier.load([fragment.key])) == [fragment.payload]


def test_a_seal_without_a_reservation_makes_nothing_readable(calls: SlotCalls) -> None:
    (fragment,) = make_fragments(1)
    reply = calls.seal(kvnode_pb2.SealRequest(keys=[fragment.key], slots=[0], generations=[1]))
    assert reply.num_sealed == 0
    assert list(calls.lookup(kvnode_pb2.LookupRequest(keys=[fragment.key])).slots) == [-1]


def test_a_fragment_that_was_sealed_but_never_written_is_refused(tier: HostTier, calls: SlotCalls) -> None:
    (fragment,) = make_fragments(1)
    reserved = calls.reserve(kvnode_pb2.ReserveRequest(keys=[fragment.key]))
    calls.seal(kvnode_pb2.SealRequest(keys=[fragment.key], slots=reserved.slots, generations=reserved.generations))
    (got,) = tier.load([fragment.key])
    assert isinstance(got, Rejected)
    assert list(tier.load([fragment.key])) == [None]


def test_bad_slot_calls_are_refused(calls: SlotCalls) -> None:
    with pytest.raises(CallRefused, match="keys: must have 22 bytes each"):
        calls.reserve(kvnode_pb2.ReserveRequest(keys=[b"short"]))
    with pytest.raises(CallRefused, match="1 keys with 0 values"):
        calls.seal(kvnode_pb2.SealRequest(keys=[bytes(FRAGMENT_KEY_BYTES)]))
    with pytest.raises(CallRefused, match="1 keys with 0 values"):
        calls.drop(kvnode_pb2.DropRequest(keys=[bytes(FRAGMENT_KEY_BYTES)]))
    assert list(calls.lookup(kvnode_pb2.LookupRequest(keys=[bytes(FRAGMENT_KEY_BYTES)])).slots) == [-1]
    calls.close()


def test_survives_kill_and_restart_of_the_node(kv_node: KVNode) -> None:
    tier = HostTier(kv_node.host_address)
    fragments = make_fragments(4)
    assert tier.store(fragments) == [True] * 4
    kv_node.kill()
    assert tier.store(fragments) == [False] * 4
    assert list(tier.load(keys_of(fragments))) == [None] * 4
    assert not tier.is_up
    kv_node.start()
    wait_until(lambda: tier.is_up, "the tier is up again")
    assert list(tier.load(keys_of(fragments))) == [None] * 4  # a new arena
    assert tier.store(fragments) == [True] * 4
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    tier.close()


def test_a_restart_between_two_calls_goes_unnoticed(kv_node: KVNode) -> None:
    tier = HostTier(kv_node.host_address)
    old, new = make_fragments(4), make_fragments(4)
    tier.store(old)
    former = tier._arena
    kv_node.restart()
    tier._arena = former  # as if the check that runs every second had not been made yet
    wait_until(lambda: tier.store(new) == [True] * 4, "fragments are in the new arena")
    assert tier._arena is not former
    assert list(tier.load(keys_of(old) + keys_of(new))) == [None] * 4 + [fragment.payload for fragment in new]
    tier.close()


def test_a_reader_with_the_former_arena_maps_the_new_one(kv_node: KVNode) -> None:
    reader, writer = HostTier(kv_node.host_address), HostTier(kv_node.host_address)
    fragments = make_fragments(4)
    former = reader._arena
    kv_node.restart()
    wait_until(lambda: writer.store(fragments) == [True] * 4, "the other worker wrote to the new arena")
    wait_until(lambda: reader.is_up, "the reader is connected")
    reader._arena = former
    assert list(reader.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    reader.close()
    writer.close()


def test_starts_without_a_node_and_finds_it_later(kv_node: KVNode) -> None:
    kv_node.kill()
    tier = HostTier(kv_node.host_address)
    fragments = make_fragments(1)
    assert not tier.is_up
    assert tier.node_id == ""
    assert tier.store(fragments) == [False]
    kv_node.start()
    wait_until(lambda: tier.is_up, "the tier is up")
    assert tier.store(fragments) == [True]
    tier.close()


def test_a_node_that_dies_while_nobody_asks_is_noticed(kv_node: KVNode) -> None:
    tier = HostTier(kv_node.host_address)
    assert tier.is_up
    kv_node.kill()
    wait_until(lambda: not tier.is_up, "the tier is down")
    tier.close()
