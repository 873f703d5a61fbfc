"""Blocks are brought into the host tier ahead of their use: from Redis, peers and the disk, bounded, all counted."""

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.control.directory import MemoryDirectory
from kvstore.format.fragment import Fragment, Rejected
from kvstore.names import fragment_key
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.memory_tier import MemoryTier
from kvstore.tiers.peers.peer_tier import PeerTier
from kvstore.tiers.prefetch import Prefetcher, PrefetchStats
from kvstore.tiers.redis.redis_tier import RedisTier
from kvstore.tiers.tier import Tier
from tests.kvstore.fragments import REDIS_PREFIX, SECRET, keys_of
from tests.kvstore.node.test_node_disk import stats_of
from tests.processes import KVNode, RedisServer, wait_until

NUM_HEADS = 4
SLOTS = 64
PAYLOAD_BYTES = 1000


def keys_of_block(name: bytes) -> list[bytes]:
    return [fragment_key(name, 0, 2, head) for head in range(NUM_HEADS)]


def make_blocks(count: int) -> tuple[list[bytes], list[Fragment]]:
    names = [random.randbytes(16) for _ in range(count)]
    keys = [key for name in names for key in keys_of_block(name)]
    return names, [Fragment(key, memoryview(random.randbytes(PAYLOAD_BYTES))) for key in keys]


@pytest.fixture
def node() -> Iterator[KVNode]:
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", 4096, SLOTS)
    yield node
    node.close()


@pytest.fixture
def host(node: KVNode) -> Iterator[HostTier]:
    tier = HostTier(node.host_address)
    yield tier
    tier.close()


@pytest.fixture
def redis_tier(redis_server: RedisServer) -> Iterator[RedisTier]:
    tier = RedisTier(redis_server.url, SECRET, 60.0)
    yield tier
    tier.close()


Start = Callable[..., Prefetcher]


@pytest.fixture
def start(host: HostTier) -> Iterator[Start]:
    started: list[Prefetcher] = []

    def start(*slower: Tier) -> Prefetcher:
        started.append(Prefetcher(host, slower, keys_of_block))
        return started[-1]

    yield start
    for prefetcher in started:
        prefetcher.close()


def num_held(host: HostTier, fragments: Sequence[Fragment]) -> int:
    return sum(payload is not None for payload in host.load(keys_of(fragments)))


@pytest.mark.redis
def test_whole_blocks_come_from_redis_once(host: HostTier, redis_tier: RedisTier, start: Start) -> None:
    names, fragments = make_blocks(3)
    assert all(redis_tier.store(fragments))
    host.store(fragments[:NUM_HEADS])
    prefetcher = start(redis_tier)
    prefetcher.add("r", [*names, random.randbytes(16)])
    wait_until(lambda: num_held(host, fragments) == len(fragments), "all are in the host tier")
    wait_until(lambda: prefetcher.stats().num_fragments.get("redis", 0) == 8, "they are counted")
    assert prefetcher.stats() == PrefetchStats({"redis": 8}, {"redis": 8 * PAYLOAD_BYTES}, 0, {})
    assert list(host.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    prefetcher.release("r", is_used=True)
    assert prefetcher.stats().num_useless == 0


@pytest.mark.redis
def test_what_is_fetched_ahead_has_a_bound_until_requests_wait_no_more(
    host: HostTier, redis_tier: RedisTier, start: Start
) -> None:
    first, of_first = make_blocks(5 * SLOTS // NUM_HEADS)
    second, of_second = make_blocks(2)
    for begin in range(0, len(of_first), 64):
        assert all(redis_tier.store(of_first[begin : begin + 64]))
    assert all(redis_tier.store(of_second))
    prefetcher = start(redis_tier)
    prefetcher.add("first", first)
    prefetcher.add("second", second)
    wait_until(lambda: prefetcher.stats().num_fragments.get("redis", 0) >= SLOTS // 4, "the first share is there")
    time.sleep(0.2)  # to be seen not to go on
    num_fetched = prefetcher.stats().num_fragments["redis"]
    assert num_fetched < 2 * SLOTS // 4  # its share, and what a batch was over it
    assert num_held(host, of_second) == 0
    prefetcher.release("first", is_used=False)
    wait_until(lambda: num_held(host, of_second) == len(of_second), "there are slots for the second")
    assert prefetcher.stats().num_useless == num_fetched


@pytest.mark.redis
def test_bad_ones_are_counted_and_not_kept(
    host: HostTier, redis_tier: RedisTier, redis_server: RedisServer, start: Start
) -> None:
    names, fragments = make_blocks(1)
    redis_tier.store(fragments)
    with redis_server.client() as client:
        stored = bytearray(client.get(REDIS_PREFIX + fragments[1].key))  # type: ignore[arg-type]
        stored[100] ^= 1
        client.set(REDIS_PREFIX + fragments[1].key, bytes(stored))
    prefetcher = start(redis_tier)
    prefetcher.add("r", names)
    wait_until(lambda: prefetcher.stats().num_fragments.get("redis", 0) == NUM_HEADS - 1, "the good ones are there")
    assert prefetcher.stats().rejected == {"checksum": 1}
    assert num_held(host, fragments) == NUM_HEADS - 1


def test_peers_are_asked_first(node: KVNode, host: HostTier, peer_node: KVNode, start: Start) -> None:
    names, fragments = make_blocks(2)
    other = HostTier(peer_node.host_address)
    other.store(fragments)
    directory = MemoryDirectory(time.monotonic)
    directory.publish(names, f"peer:{other.peer_address}")
    peers = PeerTier(directory, SECRET, lambda: "")
    prefetcher = start(peers)
    prefetcher.add("r", names)
    wait_until(lambda: prefetcher.stats().num_fragments.get("peer", 0) == len(fragments), "all came")
    assert list(host.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    peers.close()
    other.close()


class HeldTier(MemoryTier):
    """Gives what it has only once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        self.is_asked.set()
        assert self.may_answer.wait(30)
        return super().load(keys)


def test_what_was_not_kept_is_not_useless(host: HostTier, start: Start) -> None:
    """A request is gone while a tier is asked for its blocks: these do not count, since they were never prefetched."""
    (gone, wanted), fragments = make_blocks(2)
    tier = HeldTier()
    tier.store(fragments)
    prefetcher = start(tier)
    prefetcher.add("gone", [gone])
    assert tier.is_asked.wait(30)
    prefetcher.release("gone", is_used=False)
    prefetcher.add("r", [wanted])
    tier.may_answer.set()
    wait_until(lambda: prefetcher.stats().num_fragments.get("memory", 0) == NUM_HEADS, "the other's are there")
    assert host.has(keys_of(fragments)) == [False] * NUM_HEADS + [True] * NUM_HEADS
    assert prefetcher.stats().num_useless == 0
    prefetcher.release("r", is_used=False)
    assert prefetcher.stats().num_useless == NUM_HEADS


StartNode = Callable[[int], tuple[KVNode, HostTier]]


@pytest.fixture
def start_with_disk(tmp_path: Path) -> Iterator[StartNode]:
    """A node with so many slots, and a disk that keeps all that was ever stored."""
    started: list[tuple[KVNode, HostTier]] = []

    def start_with_disk(num_slots: int) -> tuple[KVNode, HostTier]:
        options = {"kvstore": {"disk_dir": str(tmp_path / "disk"), "disk_bytes": 16 << 20, "disk_write": "through"}}
        node = KVNode(f"test-{uuid.uuid4().hex[:12]}", 4096, num_slots, options, SECRET)
        started.append((node, HostTier(node.host_address)))
        wait_until(lambda: stats_of(node).disk.is_up, "the disk tier is up")
        return started[-1]

    yield start_with_disk
    for node, host in started:
        host.close()
        node.close()


def put_on_disk(node: KVNode, host: HostTier, fragments: Sequence[Fragment]) -> None:
    """All of them; no slot holds one of the earlier ones when as many slots were written since."""
    before = stats_of(node).disk.num_written
    for i in range(0, len(fragments), 8):
        assert all(host.store(fragments[i : i + 8]))
        due = before + min(i + 8, len(fragments))
        wait_until(lambda due=due: stats_of(node).disk.num_written >= due, "they are on disk")  # type: ignore[misc]


def test_the_host_tier_says_what_it_has_and_takes_it_from_the_disk(start_with_disk: StartNode) -> None:
    node, host = start_with_disk(16)
    assert (host.num_slots, host.slot_bytes) == (16, 4096)
    old, new, never = make_blocks(1)[1], make_blocks(4)[1], make_blocks(1)[1]
    put_on_disk(node, host, old)
    put_on_disk(node, host, new)
    assert stats_of(node).num_promoted == 0
    assert host.has(keys_of([*old, *never])) == [True] * NUM_HEADS + [False] * NUM_HEADS
    assert stats_of(node).num_promoted == NUM_HEADS
    assert host.has([]) == []
    node.kill()
    assert host.has(keys_of(old)) == [False] * NUM_HEADS
    assert not host.is_up


def test_the_disk_gives_back_what_it_has(start_with_disk: StartNode) -> None:
    node, host = start_with_disk(32)
    names, fragments = make_blocks(2)
    put_on_disk(node, host, fragments)
    put_on_disk(node, host, make_blocks(8)[1])  # every slot is another's now
    prefetcher = Prefetcher(host, (), keys_of_block)
    prefetcher.add("r", names)
    wait_until(lambda: stats_of(node).num_promoted == len(fragments), "all are in slots again")
    assert prefetcher.stats() == PrefetchStats({}, {}, 0, {})
    prefetcher.close()


def test_what_the_disk_gives_counts_towards_the_bound(start_with_disk: StartNode) -> None:
    node, host = start_with_disk(SLOTS)
    first, of_first = make_blocks(SLOTS // NUM_HEADS)
    second, of_second = make_blocks(2)
    put_on_disk(node, host, [*of_first, *of_second])
    put_on_disk(node, host, make_blocks(SLOTS // NUM_HEADS)[1])  # every slot is another's now
    prefetcher = Prefetcher(host, (), keys_of_block)
    prefetcher.add("first", first)
    prefetcher.add("second", second)
    wait_until(lambda: stats_of(node).num_promoted >= SLOTS // 4, "the first share is there")
    time.sleep(0.2)  # to be seen not to go on
    num_promoted = stats_of(node).num_promoted
    assert num_promoted < 2 * SLOTS // 4  # its share, and what a batch was over it
    prefetcher.release("first", is_used=False)
    wait_until(lambda: stats_of(node).num_promoted >= num_promoted + len(of_second), "there are slots for the second")
    assert stats_of(node).num_promoted == num_promoted + len(of_second)
    assert all(host.has(keys_of(of_second)))
    assert prefetcher.stats() == PrefetchStats({}, {}, 0, {})
    prefetcher.close()


@pytest.mark.redis
def test_without_its_node_nothing_is_fetched_and_later_requests_are(
    node: KVNode, host: HostTier, redis_tier: RedisTier, start: Start
) -> None:
    names, fragments = make_blocks(2)
    redis_tier.store(fragments)
    prefetcher = start(redis_tier)
    node.kill()
    prefetcher.add("r", names)
    wait_until(lambda: not prefetcher._jobs["r"].names, "it was given up")
    assert prefetcher.stats().num_fragments == {}
    node.start()
    wait_until(lambda: all(host.store(make_blocks(1)[1])), "the host tier is back")
    prefetcher.add("again", names)
    wait_until(lambda: num_held(host, fragments) == len(fragments), "they are prefetched")
