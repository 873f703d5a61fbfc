"""What is particular to the Redis tier: time to live, a server that refuses, goes away, and comes back."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvstore.config import KVStoreConfig
from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.compression import compress
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import HEADER_BYTES, seal
from kvstore.redis_client import REDIS_ERRORS, connect
from kvstore.tiers.redis.redis_bulk import ValueBuffers, get_values, set_values
from kvstore.tiers.redis.redis_tier import RedisTier
from tests.kvstore.fragments import (
    REDIS_PREFIX,
    SECRET,
    keys_of,
    make_compressible,
    make_fragments,
    sealed_copy,
)
from tests.processes import RedisServer, free_port, redis_executable, wait_until

pytestmark = pytest.mark.redis


def test_values_carry_header_payload_and_a_time_to_live(redis_server: RedisServer) -> None:
    (fragment,) = make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET, ttl_s=100)
    tier.store([fragment])
    with redis_server.client() as client:
        assert client.keys() == [REDIS_PREFIX + fragment.key]
        assert client.get(REDIS_PREFIX + fragment.key)[HEADER_BYTES:-TAG_BYTES] == fragment.payload
        assert 0 < client.pttl(REDIS_PREFIX + fragment.key) <= 100_000
    tier.close()


def test_compressed_values_take_less_and_come_back_whole(redis_server: RedisServer) -> None:
    """To readers with either setting; what would not shrink stays as it is."""
    numbers, noise = make_compressible(20, 50_000), make_fragments(3, 50_000)
    tier, plain = RedisTier(redis_server.url, SECRET, compression="zstd"), RedisTier(redis_server.url, SECRET)
    assert tier.store([*numbers, *noise]) == [True] * 23
    with redis_server.client() as client:
        assert all(client.strlen(REDIS_PREFIX + fragment.key) < 0.75 * 50_000 for fragment in numbers)
        assert all(client.strlen(REDIS_PREFIX + fragment.key) > 50_000 for fragment in noise)
    for reader in (tier, plain):
        assert list(reader.load(keys_of([*numbers, *noise]))) == [fragment.payload for fragment in [*numbers, *noise]]
        reader.close()


@pytest.mark.parametrize("is_cluster_node", [False, True])
def test_a_health_check_in_the_url_does_not_read_our_replies(redis_server: RedisServer, is_cluster_node: bool) -> None:
    """Due at every command; several chunks."""
    fragments = make_fragments(40, 300_000)
    tier = RedisTier(f"{redis_server.url}?health_check_interval=-1", SECRET, is_cluster_node=is_cluster_node)
    assert tier.store(fragments) == [True] * 40
    for _ in range(2):  # by now the size of a value is known
        assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
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
        assert list(tier.load([fragment.key])) == [Rejected("forged")]
        client.set(REDIS_PREFIX + fragment.key, bytes(bomb) + FragmentAuthenticator(SECRET).tag(bomb))
        assert list(tier.load([fragment.key])) == [fragment.payload]
    tier.close()


def test_a_refused_key_costs_that_key_alone(redis_server: RedisServer) -> None:
    """Another client has written another kind of value there."""
    fragments = make_fragments(3)
    tier = RedisTier(redis_server.url, SECRET)
    tier.store([fragments[0], fragments[2]])
    with redis_server.client() as client:
        client.lpush(REDIS_PREFIX + fragments[1].key, "a list")
    assert list(tier.load(keys_of(fragments))) == [fragments[0].payload, None, fragments[2].payload]
    assert tier.is_up
    tier.close()


@pytest.mark.parametrize("payload_bytes", [1, 1000, 70_000, 2_000_000])
def test_batches_of_every_size_are_whole_and_in_order(redis_server: RedisServer, payload_bytes: int) -> None:
    """Fewer than one writer's part and more than a window; some are there, some are not."""
    tier = RedisTier(redis_server.url, SECRET)
    for count in (1, 3, 4, 9, 33):
        fragments, absent = make_fragments(count, payload_bytes), make_fragments(count)
        assert tier.store(fragments[::2]) == [True] * len(fragments[::2])
        assert tier.store(fragments) == [True] * count
        keys = [key for pair in zip(keys_of(fragments), keys_of(absent), strict=True) for key in pair]
        assert list(tier.load(keys)) == [item for fragment in fragments for item in (fragment.payload, None)]
    tier.close()


def test_a_reader_that_takes_what_it_asked_for_and_no_more(redis_server: RedisServer) -> None:
    """As kvstore.store does: what is bad is dropped, and the connection is used again."""
    fragments = make_fragments(5)
    tier = RedisTier(redis_server.url, SECRET)
    with redis_server.client() as client:
        before = client.info("stats")["total_connections_received"]
        for _ in range(10):
            tier.store(fragments)
            client.setrange(REDIS_PREFIX + fragments[4].key, 200, b"another byte or more")
            found = tier.load(keys_of(fragments))
            got = [next(found) for _ in fragments]
            del found
            assert got == [*(fragment.payload for fragment in fragments[:4]), Rejected("checksum")]
            assert not client.exists(REDIS_PREFIX + fragments[4].key)
        assert client.info("stats")["total_connections_received"] < before + 5  # and not two for each round
    tier.close()


def test_several_threads_share_a_tier(redis_server: RedisServer) -> None:
    """More stores at once than there are helpers."""
    tier = RedisTier(redis_server.url, SECRET)
    batches = [make_fragments(12, 100_000) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(tier.store, batches)) == [[True] * 12] * 8
        got = list(threads.map(lambda batch: list(tier.load(keys_of(batch))), batches))
    assert got == [[fragment.payload for fragment in batch] for batch in batches]
    tier.close()


def test_a_redis_that_hangs_is_given_up(redis_server: RedisServer) -> None:
    """In the middle of values that no socket takes whole, and before an answer; the kernel keeps the time."""
    values = [memoryview(bytes(8_000_000))] * 4
    with connect(f"{redis_server.url}?socket_timeout=0.2") as client, redis_server.client() as other:
        for ask in (
            lambda: set_values(client, ((b"%d" % i, value) for i, value in enumerate(values)), 60_000),
            lambda: list(get_values(client, [b"0", b"1"], ValueBuffers(), 8_000_000)),
        ):
            assert ask()  # and so there is a connection
            other.client_pause(2500)
            with pytest.raises(REDIS_ERRORS):
                ask()
            other.ping()  # when the pause is over
            assert ask()


def test_over_tls(tmp_path: Path) -> None:
    executable = redis_executable()
    if executable is None:
        pytest.skip("no redis-server")
    port, files = free_port(), make_certificate(tmp_path)
    command = [executable, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--tls-cert-file", files.certificate, "--tls-key-file", files.key, "--tls-auth-clients", "no"]
    process = subprocess.Popen([*command, "--tls-ca-cert-file", files.certificate], stdout=subprocess.DEVNULL)
    tier = RedisTier(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={files.certificate}", SECRET)
    try:
        wait_until(lambda: tier.is_up or process.poll() is not None, "the tier is up")
        if process.poll() is not None:
            pytest.skip("this redis-server was made without TLS")
        fragments = make_fragments(9, 300_000)
        assert tier.store(fragments) == [True] * 9
        assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    finally:
        tier.close()
        process.kill()
        process.wait()


@dataclass(frozen=True)
class CertificateFiles:
    """Of a server at 127.0.0.1 that vouches for itself."""

    certificate: str
    key: str


def make_certificate(folder: Path) -> CertificateFiles:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of the tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return CertificateFiles(str(folder / "certificate.pem"), str(folder / "key.pem"))


def test_putting_again_renews_the_time_to_live(redis_server: RedisServer) -> None:
    (fragment,) = make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET, ttl_s=100)
    tier.store([fragment])
    with redis_server.client() as client:
        client.pexpire(REDIS_PREFIX + fragment.key, 10_000)
        tier.store([fragment])
        assert client.pttl(REDIS_PREFIX + fragment.key) > 10_000
    tier.close()


@pytest.mark.parametrize("num_bytes", [0, 10, HEADER_BYTES, HEADER_BYTES + 999])
def test_a_truncated_value_is_refused_and_dropped(redis_server: RedisServer, num_bytes: int) -> None:
    (fragment,) = make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET)
    tier.store([fragment])
    with redis_server.client() as client:
        client.set(REDIS_PREFIX + fragment.key, client.get(REDIS_PREFIX + fragment.key)[:num_bytes])
        assert list(tier.load([fragment.key])) == [Rejected("truncated")]
        assert client.keys() == []
    tier.close()


def test_another_value_under_the_key_is_refused(redis_server: RedisServer) -> None:
    (fragment,), (other,) = make_fragments(1), make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET)
    tier.store([fragment, other])
    with redis_server.client() as client:
        client.set(REDIS_PREFIX + fragment.key, client.get(REDIS_PREFIX + other.key))
    assert list(tier.load([fragment.key, other.key])) == [Rejected("stale"), other.payload]
    tier.close()


def test_other_bytes_with_a_right_checksum_are_refused(redis_server: RedisServer) -> None:
    """Whoever can write to Redis knows the format, and not the secret."""
    (fragment,), (wanted,) = make_fragments(1), make_fragments(1)
    tier = RedisTier(redis_server.url, SECRET)
    tier.store([fragment])
    forged = seal(fragment.key, wanted.payload, 0) + bytes(wanted.payload)
    with redis_server.client() as client:
        tags = [client.get(REDIS_PREFIX + fragment.key)[-TAG_BYTES:], FragmentAuthenticator("a guess").tag(forged)]
        for tag in tags:
            client.set(REDIS_PREFIX + fragment.key, forged + tag)
            assert list(tier.load([fragment.key])) == [Rejected("forged")]
            assert list(tier.load([fragment.key])) == [None]
    tier.close()


def test_clusters_with_other_secrets_leave_each_others_fragments_alone(redis_server: RedisServer) -> None:
    (fragment,) = make_fragments(1)
    tier, other = RedisTier(redis_server.url, SECRET), RedisTier(redis_server.url, "another secret")
    tier.store([fragment])
    assert list(other.load([fragment.key])) == [None]
    assert list(tier.load([fragment.key])) == [fragment.payload]
    tier.close()
    other.close()


def test_a_tier_outside_the_host_needs_a_secret(redis_server: RedisServer) -> None:
    with pytest.raises(ValueError, match="tier_secret: must not be empty"):
        RedisTier(redis_server.url, "")


def test_a_redis_that_is_full_takes_nothing_and_stays_up(redis_server: RedisServer) -> None:
    there, refused = make_fragments(1), make_fragments(3)
    tier = RedisTier(redis_server.url, SECRET)
    tier.store(there)
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        try:
            assert tier.store(refused) == [False] * 3
            assert tier.is_up
            assert list(tier.load(keys_of(there))) == [there[0].payload]
        finally:
            client.config_set("maxmemory", "0")
    assert tier.store(refused) == [True] * 3
    tier.close()


def test_survives_kill_and_restart_of_redis(redis_server: RedisServer) -> None:
    fragments = make_fragments(4)
    tier = RedisTier(redis_server.url, SECRET)
    assert tier.store(fragments) == [True] * 4
    redis_server.kill()
    assert list(tier.load(keys_of(fragments))) == [None] * 4
    assert not tier.is_up
    assert tier.store(fragments) == [False] * 4
    redis_server.start()
    wait_until(lambda: tier.is_up, "the tier is up again")
    assert list(tier.load(keys_of(fragments))) == [None] * 4
    assert tier.store(fragments) == [True] * 4
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    tier.close()


def test_a_restart_between_two_calls_costs_what_was_stored_only(redis_server: RedisServer) -> None:
    fragments = make_fragments(4)
    tier = RedisTier(redis_server.url, SECRET)
    tier.store(fragments)
    redis_server.restart()
    wait_until(lambda: tier.store(fragments) == [True] * 4, "fragments are stored again")
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    tier.close()


def test_nobody_listens() -> None:
    tier = RedisTier(f"redis://127.0.0.1:{free_port()}/0", SECRET)
    fragments = make_fragments(2)
    assert not tier.is_up
    assert tier.store(fragments) == [False, False]
    assert list(tier.load(keys_of(fragments))) == [None, None]
    tier.close()


def test_a_password_is_never_logged(caplog: pytest.LogCaptureFixture, redis_server: RedisServer) -> None:
    tier = RedisTier(redis_server.url, SECRET.replace("redis://", "redis://:hush@"))  # the server wants none: an error
    list(tier.load(keys_of(make_fragments(1))))
    redis_server.kill()
    list(tier.load(keys_of(make_fragments(1))))
    wait_until(lambda: not tier.is_up, "the tier is down")
    tier.close()
    assert "hush" not in caplog.text
