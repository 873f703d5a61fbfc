"""What is particular to the Redis tier: time to live, a server that refuses, goes away, and comes back."""

import pytest

from kvstore.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.compression import compress
from kvstore.config import KVStoreConfig
from kvstore.redis_client import connect
from kvstore.redis_tier import RedisTier
from kvstore.sealing import HEADER_BYTES, seal
from kvstore.tiers import Rejected
from tests.kvstore.fragments import (
    REDIS_PREFIX,
    SECRET,
    keys_of,
    make_compressible,
    make_fragments,
    sealed_copy,
)
from tests.processes import RedisServer, free_port, wait_until

pytestmark = pytest.mark.redis


def test_values_carry_header_payload_and_a_time_to_live(redis_server: RedisServer) -> None:
    (fragment,) = make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET, ttl_s=100)
    tier.put([fragment])
    with redis_server.client() as client:
        assert client.keys() == [REDIS_PREFIX + fragment.key]
        assert client.get(REDIS_PREFIX + fragment.key)[HEADER_BYTES:-TAG_BYTES] == fragment.payload
        assert 0 < client.pttl(REDIS_PREFIX + fragment.key) <= 100_000
    tier.close()


def test_compressed_values_take_less_and_come_back_whole(redis_server: RedisServer) -> None:
    """To readers with either setting; what would not shrink stays as it is."""
    numbers, noise = make_compressible(20, 50_000), make_fragments(3, 50_000)
    tier, plain = RedisTier(redis_server.url, SECRET, compression="zstd"), RedisTier(redis_server.url, SECRET)
    assert tier.put([*numbers, *noise]) == [True] * 23
    with redis_server.client() as client:
        assert all(client.strlen(REDIS_PREFIX + fragment.key) < 0.75 * 50_000 for fragment in numbers)
        assert all(client.strlen(REDIS_PREFIX + fragment.key) > 50_000 for fragment in noise)
    for reader in (tier, plain):
        assert list(reader.get(keys_of([*numbers, *noise]))) == [fragment.payload for fragment in [*numbers, *noise]]
        reader.close()


@pytest.mark.parametrize("is_cluster_node", [False, True])
def test_a_health_check_in_the_url_does_not_read_our_replies(redis_server: RedisServer, is_cluster_node: bool) -> None:
    """Due at every command; several chunks."""
    fragments = make_fragments(40, 300_000)
    tier = RedisTier(f"{redis_server.url}?health_check_interval=-1", SECRET, is_cluster_node=is_cluster_node)
    assert tier.put(fragments) == [True] * 40
    for _ in range(2):  # by now the size of a value is known
        assert list(tier.get(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    tier.close()


def test_another_version_of_the_protocol_is_refused(redis_server: RedisServer) -> None:
    for url in ("redis://h:1/0?protocol=3", "rediss://:hush@h?ssl_cert_reqs=none&protocol=3"):
        with pytest.raises(ValueError, match="only version 2 of the Redis protocol is spoken here") as error:
            connect(url)
        assert "hush" not in str(error.value)
        with pytest.raises(ValueError, match="tier: only version 2"):
            KVStoreConfig(tier=url)
        with pytest.raises(ValueError, match="tier: only version 2"):
            KVStoreConfig(tier=url.replace("://", "+cluster://"))
        with pytest.raises(ValueError, match="control: only version 2"):
            KVStoreConfig(control=url)
    url = f"{redis_server.url}?protocol=2"
    assert KVStoreConfig(tier=url).tier == url
    with connect(url) as client:
        assert client.ping()


def test_a_bomb_of_somebody_without_the_secret_is_never_opened(redis_server: RedisServer) -> None:
    (fragment,) = make_compressible(1)
    bomb = memoryview(bytearray(compress(sealed_copy(fragment)) or b""))
    forged = bytes(bomb) + FragmentAuthenticator("a guess").tag(bomb)
    tier = RedisTier(redis_server.url, SECRET)
    with redis_server.client() as client:
        client.set(REDIS_PREFIX + fragment.key, forged)
        assert list(tier.get([fragment.key])) == [Rejected("forged")]
        client.set(REDIS_PREFIX + fragment.key, bytes(bomb) + FragmentAuthenticator(SECRET).tag(bomb))
        assert list(tier.get([fragment.key])) == [fragment.payload]
    tier.close()


def test_putting_again_renews_the_time_to_live(redis_server: RedisServer) -> None:
    (fragment,) = make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET, ttl_s=100)
    tier.put([fragment])
    with redis_server.client() as client:
        client.pexpire(REDIS_PREFIX + fragment.key, 10_000)
        tier.put([fragment])
        assert client.pttl(REDIS_PREFIX + fragment.key) > 10_000
    tier.close()


@pytest.mark.parametrize("num_bytes", [0, 10, HEADER_BYTES, HEADER_BYTES + 999])
def test_a_truncated_value_is_refused_and_dropped(redis_server: RedisServer, num_bytes: int) -> None:
    (fragment,) = make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET)
    tier.put([fragment])
    with redis_server.client() as client:
        client.set(REDIS_PREFIX + fragment.key, client.get(REDIS_PREFIX + fragment.key)[:num_bytes])
        assert list(tier.get([fragment.key])) == [Rejected("truncated")]
        assert client.keys() == []
    tier.close()


def test_another_value_under_the_key_is_refused(redis_server: RedisServer) -> None:
    (fragment,), (other,) = make_fragments(1), make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET)
    tier.put([fragment, other])
    with redis_server.client() as client:
        client.set(REDIS_PREFIX + fragment.key, client.get(REDIS_PREFIX + other.key))
    assert list(tier.get([fragment.key, other.key])) == [Rejected("stale"), other.payload]
    tier.close()


def test_other_bytes_with_a_right_checksum_are_refused(redis_server: RedisServer) -> None:
    """Whoever can write to Redis knows the format, and not the secret."""
    (fragment,), (wanted,) = make_fragments(1), make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET)
    tier.put([fragment])
    forged = seal(fragment.key, wanted.payload, 0) + bytes(wanted.payload)
    with redis_server.client() as client:
        tags = [client.get(REDIS_PREFIX + fragment.key)[-TAG_BYTES:], FragmentAuthenticator("a guess").tag(forged)]
        for tag in tags:
            client.set(REDIS_PREFIX + fragment.key, forged + tag)
            assert list(tier.get([fragment.key])) == [Rejected("forged")]
            assert list(tier.get([fragment.key])) == [None]
    tier.close()


def test_clusters_with_other_secrets_leave_each_others_fragments_alone(redis_server: RedisServer) -> None:
    (fragment,) = make_fragments(1)
    tier, other = RedisTier(redis_server.url, SECRET), RedisTier(redis_server.url, "another secret")
    tier.put([fragment])
    assert list(other.get([fragment.key])) == [None]
    assert list(tier.get([fragment.key])) == [fragment.payload]
    tier.close()
    other.close()


def test_a_tier_outside_the_host_needs_a_secret(redis_server: RedisServer) -> None:
    with pytest.raises(ValueError, match="tier_secret: must not be empty"):
        RedisTier(redis_server.url, "")


def test_a_redis_that_is_full_takes_nothing_and_stays_up(redis_server: RedisServer) -> None:
    there, refused = make_fragments(1), make_fragments(3)
    tier = RedisTier(redis_server.url, SECRET)
    tier.put(there)
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        try:
            assert tier.put(refused) == [False] * 3
            assert tier.is_up
            assert list(tier.get(keys_of(there))) == [there[0].payload]
        finally:
            client.config_set("maxmemory", "0")
    assert tier.put(refused) == [True] * 3
    tier.close()


def test_survives_kill_and_restart_of_redis(redis_server: RedisServer) -> None:
    fragments = make_fragments(4)
    tier = RedisTier(redis_server.url, SECRET)
    assert tier.put(fragments) == [True] * 4
    redis_server.kill()
    assert list(tier.get(keys_of(fragments))) == [None] * 4
    assert not tier.is_up
    assert tier.put(fragments) == [False] * 4
    redis_server.start()
    wait_until(lambda: tier.is_up, "the tier is up again")
    assert list(tier.get(keys_of(fragments))) == [None] * 4
    assert tier.put(fragments) == [True] * 4
    assert list(tier.get(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    tier.close()


def test_a_restart_between_two_calls_costs_what_was_stored_only(redis_server: RedisServer) -> None:
    fragments = make_fragments(4)
    tier = RedisTier(redis_server.url, SECRET)
    tier.put(fragments)
    redis_server.restart()
    wait_until(lambda: tier.put(fragments) == [True] * 4, "fragments are stored again")
    assert list(tier.get(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    tier.close()


def test_nobody_listens() -> None:
    tier = RedisTier(f"redis://127.0.0.1:{free_port()}/0", SECRET)
    fragments = make_fragments(2)
    assert not tier.is_up
    assert tier.put(fragments) == [False, False]
    assert list(tier.get(keys_of(fragments))) == [None, None]
    tier.close()


def test_a_password_is_never_logged(caplog: pytest.LogCaptureFixture, redis_server: RedisServer) -> None:
    tier = RedisTier(redis_server.url, SECRET.replace("redis://", "redis://:hush@"))  # the server wants none: an error
    list(tier.get(keys_of(make_fragments(1))))
    redis_server.kill()
    list(tier.get(keys_of(make_fragments(1))))
    wait_until(lambda: not tier.is_up, "the tier is down")
    tier.close()
    assert "hush" not in caplog.text
