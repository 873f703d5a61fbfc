"""The shared tier in a Redis cluster of three nodes: shared out by hash slot, one node lost, slots that move."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import redis

from kvstore.config import KVStoreConfig, redis_cluster_nodes
from kvstore.connect import locations_of, open_tiers
from kvstore.format.fragment import Fragment, Rejected
from kvstore.redis_client import Redirection, hash_slot, redirection
from kvstore.tiers.redis.redis_cluster import RedisClusterTier
from kvstore.tiers.redis.redis_tier import RedisTier
from tests.kvstore.fragments import REDIS_PREFIX, SECRET, keys_of, make_fragments
from tests.processes import free_port, redis_executable, wait_until
from tests.redis_cluster import PASSWORD, RedisClusterServers

pytestmark = [pytest.mark.redis, pytest.mark.xdist_group("redis cluster")]


@pytest.fixture(scope="module")
def servers() -> Iterator[RedisClusterServers]:
    """For tests that leave all nodes running."""
    executable = redis_executable()
    if executable is None:
        pytest.skip("no redis-server")
    servers = RedisClusterServers(executable)
    yield servers
    servers.close()


@pytest.fixture
def own_servers() -> Iterator[RedisClusterServers]:
    """For a test that changes them for good."""
    executable = redis_executable()
    if executable is None:
        pytest.skip("no redis-server")
    servers = RedisClusterServers(executable)
    yield servers
    servers.close()


@pytest.fixture
def tier(servers: RedisClusterServers) -> Iterator[RedisClusterTier]:
    tier = RedisClusterTier(servers.url, SECRET)
    yield tier
    tier.close()


def owner_of(fragment: Fragment) -> int:
    return hash_slot(REDIS_PREFIX + fragment.key) * 3 // 16384


def payloads_of(fragments: list[Fragment]) -> list[memoryview]:
    return [fragment.payload for fragment in fragments]


def test_fragments_are_shared_out_by_hash_slot(servers: RedisClusterServers, tier: RedisClusterTier) -> None:
    fragments = make_fragments(60)
    assert tier.store(fragments) == [True] * 60
    assert tier.store(fragments) == [True] * 60  # once more: renewed
    assert tier.load(keys_of(fragments)) == payloads_of(fragments)
    assert {owner_of(fragment) for fragment in fragments} == {0, 1, 2}
    for fragment in fragments:
        assert 0 < servers.clients[owner_of(fragment)].pttl(REDIS_PREFIX + fragment.key) <= 3_600_000
    absent = make_fragments(5)
    assert tier.load(keys_of([*absent, *fragments[:3]])) == [None] * 5 + payloads_of(fragments[:3])


def test_large_batches_of_large_values(tier: RedisClusterTier) -> None:
    """More than one chunk a node, from several threads at once."""
    batches = [make_fragments(40, 300_000) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tier.store, batches)) == [[True] * 40] * 4
        got = list(threads.map(lambda batch: tier.load(keys_of(batch)), batches))
    assert got == [payloads_of(batch) for batch in batches]


def test_any_one_node_is_enough_to_find_the_others(servers: RedisClusterServers) -> None:
    for port in servers.ports:
        tier = RedisClusterTier(f"redis+cluster://:{PASSWORD}@127.0.0.1:{free_port()},127.0.0.1:{port}", SECRET)
        fragments = make_fragments(30)
        assert tier.store(fragments) == [True] * 30
        assert tier.load(keys_of(fragments)) == payloads_of(fragments)
        tier.close()


def test_a_damaged_value_is_refused_and_dropped(servers: RedisClusterServers, tier: RedisClusterTier) -> None:
    fragments = make_fragments(30)
    tier.store(fragments)
    for fragment in fragments[:10]:
        client = servers.clients[owner_of(fragment)]
        client.setrange(REDIS_PREFIX + fragment.key, 200, b"another byte or more")
    got = tier.load(keys_of(fragments))
    assert got == [Rejected("checksum")] * 10 + payloads_of(fragments[10:])
    assert tier.load(keys_of(fragments[:10])) == [None] * 10
    assert tier.store(fragments[:10]) == [True] * 10


def test_a_slot_that_moved_is_followed(
    servers: RedisClusterServers, tier: RedisClusterTier, caplog: pytest.LogCaptureFixture
) -> None:
    """The node that had it says MOVED, to reads and to writes; the tier asks again and follows the redirect."""
    fragments, others = make_fragments(1), make_fragments(20)
    tier.store([*fragments, *others])
    slot, source = hash_slot(REDIS_PREFIX + fragments[0].key), owner_of(fragments[0])
    target = (source + 1) % 3
    servers.move_slot(slot, source, target)
    with pytest.raises(redis.ResponseError, match=f"{slot} 127.0.0.1:{servers.ports[target]}"):
        servers.clients[source].get(REDIS_PREFIX + fragments[0].key)
    assert tier.load(keys_of([*fragments, *others])) == payloads_of([*fragments, *others])
    servers.move_slot(slot, target, source)
    assert tier.store([*fragments, *others]) == [True] * 21
    servers.move_slot(slot, source, target)
    servers.clients[target].delete(REDIS_PREFIX + fragments[0].key)
    assert tier.store(fragments) == [True]
    assert servers.clients[target].exists(REDIS_PREFIX + fragments[0].key)
    servers.move_slot(slot, target, source)
    assert tier.load(keys_of(fragments)) == payloads_of(fragments)
    assert tier.is_up
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_while_a_slot_moves_its_fragments_are_misses_at_most(
    servers: RedisClusterServers, tier: RedisClusterTier
) -> None:
    """A node that is giving a slot away answers ASK for what it no longer has."""
    (fragment,), others = make_fragments(1), make_fragments(20)
    tier.store(others)
    slot, source = hash_slot(REDIS_PREFIX + fragment.key), owner_of(fragment)
    target = (source + 1) % 3
    ids = [client.execute_command("CLUSTER MYID").decode() for client in servers.clients]
    servers.clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
    servers.clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    try:
        assert tier.store([fragment]) == [False]
        assert tier.load([fragment.key, *keys_of(others)]) == [None, *payloads_of(others)]
    finally:
        for number in (source, target):
            servers.clients[number].execute_command("CLUSTER SETSLOT", slot, "STABLE")
    assert tier.store([fragment]) == [True]


def test_a_lost_node_costs_its_fragments_alone(own_servers: RedisClusterServers) -> None:
    servers = own_servers
    tier = RedisClusterTier(servers.url, SECRET)
    try:
        fragments = make_fragments(60)
        assert tier.store(fragments) == [True] * 60
        servers.kill(1)
        for _ in range(3):  # while it is found out, and then
            got = tier.load(keys_of(fragments))
            assert got == [None if owner_of(f) == 1 else f.payload for f in fragments]
        more = make_fragments(60)
        assert tier.store(more) == [owner_of(fragment) != 1 for fragment in more]
        assert tier.load(keys_of(more)) == [None if owner_of(f) == 1 else f.payload for f in more]
        assert tier.is_up
        for number in (0, 2):
            servers.kill(number)
        assert tier.load(keys_of(more)) == [None] * 60
        wait_until(lambda: not tier.is_up, "the tier is down")
        assert tier.store(more) == [False] * 60
    finally:
        tier.close()


class StuckServer:
    """Takes connections and begins an answer that does not end before it is released: no timeout cuts it short."""

    def __init__(self, host: str, port: int) -> None:
        self._listener = socket.create_server((host, port))
        self.is_asked = threading.Event()
        self._is_released = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    self.is_asked.set()
                    connection.sendall(b"+")
                    while not self._is_released.wait(0.1):
                        connection.sendall(b".")

    def release(self) -> None:
        self._is_released.set()

    def close(self) -> None:
        self.release()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def test_nobody_waits_while_a_node_that_does_not_answer_is_asked(own_servers: RedisClusterServers) -> None:
    """Not even who follows a slot that has moved. And a node that has gone is not kept for questions."""
    servers = own_servers
    leaver, source, target = sorted(range(3), key=lambda number: str(servers.ports[number]))  # as they are asked
    stuck = StuckServer("127.0.0.2", servers.ports[leaver])
    tier = RedisClusterTier(f"redis+cluster://:{PASSWORD}@127.0.0.1:{servers.ports[target]}", SECRET)
    fragments = make_fragments(60)
    fragment = next(fragment for fragment in fragments if owner_of(fragment) == source)
    slot = hash_slot(REDIS_PREFIX + fragment.key)
    leaver_address = f"127.0.0.1:{servers.ports[leaver]}"
    try:
        with ThreadPoolExecutor(1) as threads:
            try:
                assert tier.store(fragments) == [True] * 60
                wait_until(lambda: leaver_address in tier._clients, "the first node was asked who owns what")
                servers.clients[leaver].config_set("cluster-announce-ip", "127.0.0.2")
                assert stuck.is_asked.wait(60)
                servers.move_slot(slot, source, target)
                assert threads.submit(tier.load, keys_of(fragments)).result(60) == payloads_of(fragments)
                assert leaver_address in tier._nodes  # what was asked meanwhile has not come
            finally:
                stuck.release()
        wait_until(lambda: leaver_address not in tier._clients, "the node that has gone is asked no more")
        assert leaver_address not in tier._nodes
        got = tier.load(keys_of(fragments))
        assert got == [None if owner_of(f) == leaver else f.payload for f in fragments]
    finally:
        tier.close()
        stuck.close()


def test_an_owner_is_named_by_an_ipv6_address(own_servers: RedisClusterServers) -> None:
    """Nobody is there, which costs what it has alone."""
    fragments = make_fragments(30)
    slots = [hash_slot(REDIS_PREFIX + f.key) for f in fragments if owner_of(f) == 1]
    before = RedisClusterTier(own_servers.url, SECRET)
    assert before.store(fragments) == [True] * 30
    before.close()
    own_servers.clients[1].config_set("cluster-announce-ip", "2001:db8::5")
    (first, *_) = (fragment.key for fragment in fragments if owner_of(fragment) == 1)
    refused = f"{slots[0]} 2001:db8::5:{own_servers.ports[1]}"

    def answer() -> str:
        try:
            return str(own_servers.clients[0].get(REDIS_PREFIX + first))
        except redis.ResponseError as error:
            return str(error)

    wait_until(lambda: answer().endswith(refused), "the other node knows of it")
    node = RedisTier(f"redis://:{PASSWORD}@127.0.0.1:{own_servers.ports[0]}/0", SECRET, is_cluster_node=True)
    assert list(node.load([f.key for f in fragments if owner_of(f) == 1])) == [None] * len(slots)
    assert node.take_redirections() == dict.fromkeys(slots, f"[2001:db8::5]:{own_servers.ports[1]}")
    assert node.take_redirections() == {}
    node.close()
    tier = RedisClusterTier(own_servers.url, SECRET)
    assert tier.load(keys_of(fragments)) == [None if owner_of(f) == 1 else f.payload for f in fragments]
    assert tier.is_up
    tier.close()


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ("MOVED 3999 10.0.0.5:7001", Redirection(3999, "10.0.0.5:7001")),
        ("MOVED 3999 node-5.redis_cache.svc:7001", Redirection(3999, "node-5.redis_cache.svc:7001")),
        ("MOVED 3999 2001:db8::5:7001", Redirection(3999, "[2001:db8::5]:7001")),
        ("MOVED 3999 [2001:db8::5]:7001", Redirection(3999, "[2001:db8::5]:7001")),
        ("MOVED 3999 ::1:7001", Redirection(3999, "[::1]:7001")),
        ("MOVED 3999 :7001", Redirection(3999, "")),
        ("MOVED 3999 ?:7001", Redirection(3999, "")),
        ("MOVED 3999 2001:db8::xyz:7001", Redirection(3999, "")),
        ("MOVED 3999 fe80::1%a#b:7001", Redirection(3999, "")),
        ("MOVED 3999 user@host:7001", Redirection(3999, "")),
        ("MOVED 3999 host:70010", Redirection(3999, "")),
        ("MOVED 3999 host", Redirection(3999, "")),
        ("MOVED 3999", Redirection(3999, "")),
        ("ASK 3999 10.0.0.5:7001", Redirection(3999, "")),
        ("MOVED 16384 10.0.0.5:7001", None),
        ("MOVED somewhere 10.0.0.5:7001", None),
        ("OOM command not allowed", None),
    ],
)
def test_what_a_node_says_of_a_slot_that_is_not_its_own(refusal: str, expected: Redirection | None) -> None:
    assert redirection(redis.ResponseError(refusal)) == expected
    if refusal.startswith("MOVED ") and expected is not None and ":" in refusal:  # as the client library gives it
        assert redirection(redis.exceptions.MovedError(refusal.removeprefix("MOVED "))) == expected


def test_nobody_listens() -> None:
    tier = RedisClusterTier(f"redis+cluster://127.0.0.1:{free_port()}", SECRET)
    fragments = make_fragments(2)
    assert not tier.is_up
    assert tier.store(fragments) == [False, False]
    assert tier.load(keys_of(fragments)) == [None, None]
    tier.close()


def test_a_redis_that_is_no_cluster_is_down_and_not_an_error(redis_server) -> None:
    tier = RedisClusterTier(redis_server.url.replace("redis://", "redis+cluster://"), SECRET)
    assert not tier.is_up
    assert tier.store(make_fragments(1)) == [False]
    tier.close()


def test_a_wrong_password_is_never_logged(servers: RedisClusterServers, caplog: pytest.LogCaptureFixture) -> None:
    tier = RedisClusterTier(servers.url.replace(PASSWORD, "open-sesame"), SECRET)
    assert not tier.is_up
    tier.close()
    assert "sesame" not in caplog.text


def test_opened_by_its_url(servers: RedisClusterServers) -> None:
    (tier,) = open_tiers("", KVStoreConfig(tier=servers.url), SECRET)
    assert isinstance(tier, RedisClusterTier)
    assert locations_of(tier, "here") == ["redis"]
    tier.close()


@pytest.mark.parametrize(
    ("url", "addresses", "first"),
    [
        ("redis+cluster://h:1", ["h:1"], "redis://h:1/0"),
        ("redis+cluster://h", ["h:6379"], "redis://h:6379/0"),
        ("rediss+cluster://u:p@h:1,i:2/0", ["h:1", "i:2"], "rediss://u:p@h:1/0"),
        ("rediss+cluster://:p@h:1?ssl_cert_reqs=none", ["h:1"], "rediss://:p@h:1/0?ssl_cert_reqs=none"),
        ("redis+cluster://[::1]:1,[::2]", ["[::1]:1", "[::2]:6379"], "redis://[::1]:1/0"),
    ],
)
def test_urls(url: str, addresses: list[str], first: str) -> None:
    found, url_of = redis_cluster_nodes(url)
    assert found == addresses
    assert url_of(found[0]) == first
    assert KVStoreConfig(tier=url).tier == url


@pytest.mark.parametrize("url", ["", ":1", "h:x", "h:1,,i:2", "h:1/3", "h:99999"])
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="tier: a cluster's URL is"):
        KVStoreConfig(tier=f"redis+cluster://{url}")


def test_leases_and_directory_want_one_redis() -> None:
    with pytest.raises(ValueError, match="control: must be one Redis, not a cluster"):
        KVStoreConfig(control="redis+cluster://h:1")
