"""What every tier does, asked of all: in memory, of a real node process, on disk, over TCP, in a real Redis."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvstore.control.directory import MemoryDirectory
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import HEADER_BYTES
from kvstore.tiers.disk.disk import DiskTier
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.memory_tier import MemoryTier
from kvstore.tiers.peers.peer_tier import PeerTier
from kvstore.tiers.redis.redis_tier import RedisTier
from kvstore.tiers.tier import Tier
from tests.kvstore.fragments import REDIS_PREFIX, SECRET, damage_segments, keys_of, make_fragments, sealed_copy
from tests.processes import KVNode, RedisServer, wait_until


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


def flip_in_arena(node: KVNode) -> Callable[[Fragment, int], None]:
    def flip(fragment: Fragment, offset: int) -> None:
        position = node.arena.read_bytes().index(fragment.payload) - HEADER_BYTES + offset
        with open(node.arena, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))

    return flip


def host_tier(node: KVNode) -> TierUnderTest:
    return TierUnderTest(HostTier(node.host_address), flip_in_arena(node))


class IntoBuffers:
    """The host tier as a store uses it: what is loaded comes into buffers of the sizes that were stored."""

    name = "host"

    def __init__(self, node_address: str) -> None:
        self.host = HostTier(node_address)
        self.num_bytes: dict[bytes, int] = {}

    @property
    def is_up(self) -> bool:
        return self.host.is_up

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        self.num_bytes |= {fragment.key: fragment.num_bytes for fragment in fragments}
        return self.host.store(fragments)

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        buffers = [memoryview(bytearray(self.num_bytes.get(key, 1000))) for key in keys]
        results = self.host.load_into(keys, buffers)
        return [
            result if isinstance(result, Rejected) else buffer if result else None
            for buffer, result in zip(buffers, results, strict=True)
        ]

    def close(self) -> None:
        self.host.close()


def host_tier_into_buffers(node: KVNode) -> TierUnderTest:
    return TierUnderTest(IntoBuffers(node.host_address), flip_in_arena(node))


def redis_tier(server: RedisServer) -> TierUnderTest:
    def flip(fragment: Fragment, offset: int) -> None:
        with server.client() as client:
            value = bytearray(client.get(REDIS_PREFIX + fragment.key))
            value[offset] ^= 1
            client.set(REDIS_PREFIX + fragment.key, bytes(value))

    return TierUnderTest(RedisTier(server.url, SECRET), flip)


class DiskAsTier:
    """The disk tier as a worker would see it if it were not behind the host tier."""

    name = "disk"

    def __init__(self, folder: Path) -> None:
        self.disk = DiskTier(folder, 64 << 20, 65536, SECRET, time.monotonic)
        wait_until(lambda: self.disk.is_up, "the disk tier is up")

    @property
    def is_up(self) -> bool:
        return self.disk.is_up

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        self.disk.write([sealed_copy(fragment) for fragment in fragments])
        return [self.is_up and self.disk.has(fragment.key) for fragment in fragments]

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        read = [self.disk.read(key) for key in keys]
        return [sealed[HEADER_BYTES:] if isinstance(sealed, memoryview) else sealed for sealed in read]

    def close(self) -> None:
        self.disk.close()


def disk_tier(folder: Path) -> TierUnderTest:
    def flip(fragment: Fragment, offset: int) -> None:
        damage_segments(
            folder, fragment, lambda stored: stored[:offset] + bytes([stored[offset] ^ 1]) + stored[offset + 1 :]
        )

    return TierUnderTest(DiskAsTier(folder), flip)


class OverPeer:
    """Stores into the other end's host tier, loads from the peer tier."""

    name = "peer"

    def __init__(self, node: KVNode) -> None:
        self.host = HostTier(node.host_address)
        self.directory = MemoryDirectory(time.monotonic)
        self.peer = PeerTier(self.directory, SECRET, lambda: "")

    @property
    def is_up(self) -> bool:
        return self.peer.is_up

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        assert self.peer.store(fragments) == [False] * len(fragments)
        self.directory.publish([fragment.key[:16] for fragment in fragments], f"peer:{self.host.peer_address}")
        return self.host.store(fragments)

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        return self.peer.load(keys)

    def close(self) -> None:
        self.peer.close()
        self.host.close()


def peer_tier(node: KVNode) -> TierUnderTest:
    return TierUnderTest(OverPeer(node), flip_in_arena(node))


@pytest.fixture(params=["memory", "host", "buffers", "disk", "peer", pytest.param("redis", marks=pytest.mark.redis)])
def under_test(request: pytest.FixtureRequest) -> Iterator[TierUnderTest]:
    if request.param == "memory":
        made = memory_tier()
    elif request.param == "host":
        made = host_tier(request.getfixturevalue("shared_kv_node"))
    elif request.param == "buffers":
        made = host_tier_into_buffers(request.getfixturevalue("shared_kv_node"))
    elif request.param == "peer":
        made = peer_tier(request.getfixturevalue("peer_node"))
    elif request.param == "disk":
        made = disk_tier(request.getfixturevalue("tmp_path") / "disk")
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
    assert tier.store(fragments) == [False, False]
    assert list(tier.load(keys_of(fragments))) == [None, None]


@pytest.mark.parametrize("payload_bytes", [1, 63, 1000, 65536])
def test_what_was_put_is_got(tier: Tier, payload_bytes: int) -> None:
    fragments = make_fragments(5, payload_bytes)
    assert tier.store(fragments) == [True] * 5
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]


def test_absent_fragments_are_none(tier: Tier) -> None:
    there, absent = make_fragments(2), make_fragments(2)
    tier.store(there)
    keys = [absent[0].key, there[1].key, absent[1].key, there[0].key]
    assert list(tier.load(keys)) == [None, there[1].payload, None, there[0].payload]


def test_empty_batches(tier: Tier) -> None:
    assert tier.store([]) == []
    assert list(tier.load([])) == []


def test_putting_again_changes_nothing(tier: Tier) -> None:
    fragments = make_fragments(3)
    tier.store(fragments)
    assert tier.store(fragments) == [True] * 3
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]


def test_one_fragment_twice_in_a_batch(tier: Tier) -> None:
    (fragment,) = make_fragments(1)
    assert tier.store([fragment, fragment]) == [True, True]
    first, second = tier.load([fragment.key, fragment.key])
    assert first == second == fragment.payload


def test_copies_are_private_and_writable(tier: Tier) -> None:
    fragments = make_fragments(1)
    tier.store(fragments)
    (first,) = tier.load(keys_of(fragments))
    assert isinstance(first, memoryview)
    first[:] = bytes(first.nbytes)
    (second,) = tier.load(keys_of(fragments))
    assert second == fragments[0].payload
    assert first == bytes(first.nbytes)


def test_payloads_of_other_formats_are_stored_as_their_bytes(tier: Tier) -> None:
    (fragment,) = make_fragments(1, 64)
    shaped = fragment.payload.cast("H").cast("B").cast("H", (4, 8))
    assert tier.store([Fragment(fragment.key, shaped)]) == [True]
    assert list(tier.load([fragment.key])) == [fragment.payload]


def test_a_part_of_a_cache_is_stored_as_its_bytes(tier: Tier) -> None:
    (fragment,) = make_fragments(1, 4 * 3 * 2 * 128)
    cache = np.frombuffer(fragment.payload, np.uint8).reshape(4, 3, 2, 128)
    lies = cache[:, 1, :, :100]
    assert tier.store([Fragment(fragment.key, lies)]) == [True]
    assert list(tier.load([fragment.key])) == [lies.tobytes()]


@pytest.mark.parametrize("offset", [0, 24, 32, 42, HEADER_BYTES, HEADER_BYTES + 999])
def test_a_flipped_byte_is_refused_once_and_can_be_replaced(under_test: TierUnderTest, offset: int) -> None:
    tier = under_test.tier
    good, bad = make_fragments(2)
    tier.store([good, bad])
    under_test.flip(bad, offset)
    got = list(tier.load([good.key, bad.key]))
    assert got[0] == good.payload
    assert isinstance(got[1], Rejected)
    if offset >= HEADER_BYTES:
        assert got[1] == Rejected("checksum")
    assert list(tier.load([bad.key])) == [None]
    assert tier.store([bad]) == [True]
    assert list(tier.load([bad.key])) == [bad.payload]


def test_another_fragments_bytes_are_refused(under_test: TierUnderTest) -> None:
    (fragment,) = make_fragments(1)
    under_test.tier.store([fragment])
    under_test.flip(fragment, HEADER_BYTES - 22)  # first byte of the key
    assert list(under_test.tier.load([fragment.key])) == [Rejected("stale")]


def test_a_length_that_does_not_fit_is_refused(under_test: TierUnderTest) -> None:
    (fragment,) = make_fragments(1)
    under_test.tier.store([fragment])
    under_test.flip(fragment, 16)  # low byte of the payload's length
    (got,) = under_test.tier.load([fragment.key])
    assert isinstance(got, Rejected)
    if isinstance(under_test.tier, IntoBuffers):
        assert got.reason == "layout"
    else:
        assert got.reason in ("truncated", "checksum")  # an arena has bytes behind the payload, a value has not


def test_batches_larger_than_a_chunk(tier: Tier) -> None:
    fragments = make_fragments(100, 60_000)  # 6 MB
    assert tier.store(fragments) == [True] * 100
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
