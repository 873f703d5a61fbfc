"""What every tier does, asked of all: MemoryTier, HostTier with a real node process, RedisTier with a real Redis."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from kvstore.host_tier import HostTier
from kvstore.memory_tier import MemoryTier
from kvstore.redis_tier import RedisTier
from kvstore.sealing import HEADER_BYTES
from kvstore.tiers import Fragment, Rejected, Tier
from tests.kvstore.fragments import REDIS_PREFIX, SECRET, keys_of, make_fragments
from tests.processes import KVNode, RedisServer


@dataclass(frozen=True)
class TierUnderTest:
    """A tier, and a way to damage what it keeps: flip(fragment, offset in header + payload)."""

    tier: Tier
    flip: Callable[[Fragment, int], None]


def memory_tier() -> TierUnderTest:
    tier = MemoryTier()

    def flip(fragment: Fragment, offset: int) -> None:
        tier.stored[fragment.key][offset] ^= 1

    return TierUnderTest(tier, flip)


def host_tier(node: KVNode) -> TierUnderTest:
    def flip(fragment: Fragment, offset: int) -> None:
        position = node.arena.read_bytes().index(fragment.payload) - HEADER_BYTES + offset
        with open(node.arena, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))

    return TierUnderTest(HostTier(node.host_address), flip)


def redis_tier(server: RedisServer) -> TierUnderTest:
    def flip(fragment: Fragment, offset: int) -> None:
        with server.client() as client:
            value = bytearray(client.get(REDIS_PREFIX + fragment.key))
            value[offset] ^= 1
            client.set(REDIS_PREFIX + fragment.key, bytes(value))

    return TierUnderTest(RedisTier(server.url, SECRET), flip)


@pytest.fixture(params=["memory", "host", pytest.param("redis", marks=pytest.mark.redis)])
def under_test(request: pytest.FixtureRequest) -> Iterator[TierUnderTest]:
    if request.param == "memory":
        made = memory_tier()
    elif request.param == "host":
        made = host_tier(request.getfixturevalue("shared_kv_node"))
    else:
        made = redis_tier(request.getfixturevalue("redis_server"))
    yield made
    made.tier.close()


@pytest.fixture
def tier(under_test: TierUnderTest) -> Tier:
    return under_test.tier


def test_is_up_from_the_start_and_down_once_closed(tier: Tier) -> None:
    fragments = make_fragments(2)
    assert tier.is_up
    tier.close()
    assert not tier.is_up
    assert tier.put(fragments) == [False, False]
    assert tier.get(keys_of(fragments)) == [None, None]


@pytest.mark.parametrize("payload_bytes", [1, 63, 1000, 65536])
def test_what_was_put_is_got(tier: Tier, payload_bytes: int) -> None:
    fragments = make_fragments(5, payload_bytes)
    assert tier.put(fragments) == [True] * 5
    assert tier.get(keys_of(fragments)) == [fragment.payload for fragment in fragments]


def test_absent_fragments_are_none(tier: Tier) -> None:
    there, absent = make_fragments(2), make_fragments(2)
    tier.put(there)
    keys = [absent[0].key, there[1].key, absent[1].key, there[0].key]
    assert tier.get(keys) == [None, there[1].payload, None, there[0].payload]


def test_empty_batches(tier: Tier) -> None:
    assert tier.put([]) == []
    assert tier.get([]) == []


def test_putting_again_changes_nothing(tier: Tier) -> None:
    fragments = make_fragments(3)
    tier.put(fragments)
    assert tier.put(fragments) == [True] * 3
    assert tier.get(keys_of(fragments)) == [fragment.payload for fragment in fragments]


def test_one_fragment_twice_in_a_batch(tier: Tier) -> None:
    (fragment,) = make_fragments(1)
    assert tier.put([fragment, fragment]) == [True, True]
    first, second = tier.get([fragment.key, fragment.key])
    assert first == second == fragment.payload


def test_copies_are_private_and_writable(tier: Tier) -> None:
    fragments = make_fragments(1)
    tier.put(fragments)
    (first,) = tier.get(keys_of(fragments))
    assert isinstance(first, memoryview)
    first[:] = bytes(first.nbytes)
    (second,) = tier.get(keys_of(fragments))
    assert second == fragments[0].payload
    assert first == bytes(first.nbytes)


def test_payloads_of_other_formats_are_stored_as_their_bytes(tier: Tier) -> None:
    (fragment,) = make_fragments(1, 64)
    shaped = fragment.payload.cast("H").cast("B").cast("H", (4, 8))
    assert tier.put([Fragment(fragment.key, shaped)]) == [True]
    assert tier.get([fragment.key]) == [fragment.payload]


@pytest.mark.parametrize("offset", [0, 24, 32, 42, HEADER_BYTES, HEADER_BYTES + 999])
def test_a_flipped_byte_is_refused_once_and_can_be_replaced(under_test: TierUnderTest, offset: int) -> None:
    tier = under_test.tier
    good, bad = make_fragments(2)
    tier.put([good, bad])
    under_test.flip(bad, offset)
    got = tier.get([good.key, bad.key])
    assert got[0] == good.payload
    assert isinstance(got[1], Rejected)
    if offset >= HEADER_BYTES:
        assert got[1] == Rejected("checksum")
    assert tier.get([bad.key]) == [None]
    assert tier.put([bad]) == [True]
    assert tier.get([bad.key]) == [bad.payload]


def test_another_fragments_bytes_are_refused(under_test: TierUnderTest) -> None:
    (fragment,) = make_fragments(1)
    under_test.tier.put([fragment])
    under_test.flip(fragment, HEADER_BYTES - 22)  # first byte of the key
    assert under_test.tier.get([fragment.key]) == [Rejected("stale")]


def test_a_length_that_does_not_fit_is_refused(under_test: TierUnderTest) -> None:
    (fragment,) = make_fragments(1)
    under_test.tier.put([fragment])
    under_test.flip(fragment, 16)  # low byte of the payload's length
    (got,) = under_test.tier.get([fragment.key])
    assert isinstance(got, Rejected)
    assert got.reason in ("truncated", "checksum")  # an arena has bytes behind the payload, a value has not


def test_batches_larger_than_a_chunk(tier: Tier) -> None:
    fragments = make_fragments(100, 60_000)  # 6 MB
    assert tier.put(fragments) == [True] * 100
    assert tier.get(keys_of(fragments)) == [fragment.payload for fragment in fragments]
