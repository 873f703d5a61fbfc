"""Several tiers as one: order, counters, and what happens when one of them is away or has bad bytes."""

import threading
from collections.abc import Sequence

import pytest

from kvstore.format.copying import Bytes, copy
from kvstore.format.fragment import Rejected
from kvstore.store import FragmentStore
from kvstore.tiers.memory_tier import MemoryTier
from kvstore.tiers.redis.redis_tier import RedisTier
from tests.kvstore.fragments import SECRET, keys_of, make_fragments
from tests.processes import RedisServer, wait_until


class NamedTier(MemoryTier):
    """A memory tier under another name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def pulled(store: FragmentStore, keys: Sequence[bytes]) -> list[memoryview | None]:
    buffers = [memoryview(bytearray(1000)) for _ in keys]
    return [buffer if has_come else None for buffer, has_come in zip(buffers, store.load(keys, buffers), strict=True)]


@pytest.fixture
def near() -> NamedTier:
    return NamedTier("near")


@pytest.fixture
def far() -> NamedTier:
    return NamedTier("far")


def test_every_tier_is_written_and_the_first_is_read(near: NamedTier, far: NamedTier) -> None:
    store = FragmentStore([near, far])
    fragments = make_fragments(3)
    assert store.store(fragments) == [True] * 3
    assert set(near.stored) == set(far.stored) == set(keys_of(fragments))
    assert pulled(store, keys_of(fragments)) == [fragment.payload for fragment in fragments]
    stats = store.stats()
    assert stats.published_bytes == {"near": 3000, "far": 3000}
    assert stats.pulled_bytes == {"near": 3000}
    assert stats.rejected == {}


class HostMemory(NamedTier):
    """A memory tier that copies payloads into the given buffers, and records the keys it had to prepare."""

    def __init__(self) -> None:
        super().__init__("near")
        self.prepared: list[Sequence[bytes]] = []

    @property
    def problems_behind(self) -> dict[str, str]:
        return {"behind": "it is away"}

    def prepare(self, keys: Sequence[bytes]) -> None:
        self.prepared.append(keys)

    def load_into(self, keys: Sequence[bytes], buffers: Sequence[Bytes]) -> list[bool | Rejected]:
        results: list[bool | Rejected] = []
        for buffer, payload in zip(buffers, self.load(keys), strict=True):
            if isinstance(payload, memoryview):
                copy(buffer, payload)
            results.append(payload if isinstance(payload, Rejected) else payload is not None)
        return results


def test_a_host_memory_tier_fills_the_buffers_and_prepares_for_a_store(far: NamedTier) -> None:
    near, fragments = HostMemory(), make_fragments(3)
    store = FragmentStore([near, far])
    store.prepare(keys_of(fragments))
    assert near.prepared == [keys_of(fragments)]
    stats = store.stats()
    assert stats.tier_is_up == {"near": True, "far": True, "behind": False}
    assert stats.tier_problems == {"behind": "it is away"}
    far.store(fragments)
    near.store(fragments[:2])
    near.stored[fragments[1].key][100] ^= 1
    assert pulled(store, keys_of(fragments)) == [fragment.payload for fragment in fragments]
    assert store.stats().pulled_bytes == {"near": 1000, "far": 2000}
    assert store.stats().rejected == {"checksum": 1}


def test_what_the_first_tier_lacks_comes_from_the_next(near: NamedTier, far: NamedTier) -> None:
    fragments = make_fragments(3)
    far.store(fragments)
    near.store(fragments[1:2])
    store = FragmentStore([near, far])
    assert pulled(store, keys_of(fragments)) == [fragment.payload for fragment in fragments]
    assert store.stats().pulled_bytes == {"near": 1000, "far": 2000}


def test_a_bad_copy_is_counted_and_the_next_tier_is_asked(near: NamedTier, far: NamedTier) -> None:
    store = FragmentStore([near, far])
    fragments = make_fragments(2)
    store.store(fragments)
    near.stored[fragments[0].key][100] ^= 1
    del near.stored[fragments[1].key][-1]
    assert pulled(store, keys_of(fragments)) == [fragment.payload for fragment in fragments]
    assert store.stats().rejected == {"checksum": 1, "truncated": 1}
    assert store.stats().pulled_bytes == {"near": 0, "far": 2000}


def test_bad_copies_everywhere_read_as_missing(near: NamedTier, far: NamedTier) -> None:
    store = FragmentStore([near, far])
    (fragment,) = make_fragments(1)
    store.store([fragment])
    near.stored[fragment.key][100] ^= 1
    far.stored[fragment.key][100] ^= 1
    assert pulled(store, [fragment.key]) == [None]
    assert store.stats().rejected == {"checksum": 2}
    assert pulled(store, [fragment.key]) == [None]
    assert store.stats().rejected == {"checksum": 2}  # they are gone: nothing is rejected twice


def test_goes_on_without_a_tier_that_is_down(near: NamedTier, far: NamedTier) -> None:
    store = FragmentStore([near, far])
    fragments = make_fragments(2)
    near.is_up = False
    assert store.store(fragments) == [True, True]
    assert pulled(store, keys_of(fragments)) == [fragment.payload for fragment in fragments]
    assert store.stats().tier_is_up == {"near": False, "far": True}
    assert store.stats().published_bytes == {"near": 0, "far": 2000}
    far.is_up = False
    assert store.store(fragments) == [False, False]
    assert pulled(store, keys_of(fragments)) == [None, None]


def test_without_tiers_nothing_is_kept() -> None:
    store = FragmentStore([])
    fragments = make_fragments(2)
    assert store.store(fragments) == [False, False]
    assert pulled(store, keys_of(fragments)) == [None, None]
    assert store.store([]) == pulled(store, []) == []


def test_counters_hold_under_threads(near: NamedTier) -> None:
    store = FragmentStore([near])
    batches = [make_fragments(10) for _ in range(8)]

    def work(index: int) -> None:
        for _ in range(20):
            store.store(batches[index])
            pulled(store, keys_of(batches[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.stats().pulled_bytes == {"near": 8 * 20 * 10_000}
    assert store.stats().published_bytes == {"near": 8 * 20 * 10_000}


def test_closing_closes_the_tiers(near: NamedTier, far: NamedTier) -> None:
    FragmentStore([near, far]).close()
    assert not near.is_up
    assert not far.is_up


@pytest.mark.redis
def test_keeps_serving_when_redis_is_lost(near: NamedTier, redis_server: RedisServer) -> None:
    redis_tier = RedisTier(redis_server.url, SECRET)
    store = FragmentStore([near, redis_tier])
    before, after = make_fragments(2), make_fragments(2)
    store.store(before)
    redis_server.kill()
    assert store.store(after) == [True, True]
    assert pulled(store, keys_of(before + after)) == [fragment.payload for fragment in before + after]
    assert store.stats().tier_is_up == {"near": True, "redis": False}
    redis_server.start()
    wait_until(lambda: store.stats().tier_is_up["redis"], "the Redis tier is up again")
    store.close()
