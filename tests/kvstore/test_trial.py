"""Tiers and control that cannot do what they will be asked to: found before the start, and whose fault it is."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kvstore.format.fragment import Fragment
from kvstore.tiers.redis.redis_tier import RedisTier
from kvstore.trial import TierMisconfigured, try_control, try_disk, try_tier
from tests.kvstore.fragments import SECRET
from tests.processes import RedisServer, free_port, wait_until

pytestmark = pytest.mark.redis


@pytest.fixture
def users(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A Redis with users of fewer and fewer rights, all with the password "hush"."""
    rights = {
        "whole": ("+@all", "~*"),
        "reader": ("+@read", "+@connection", "~*"),
        "elsewhere": ("+@all", "~other:*"),
        "script": ("+@all", "-eval", "-evalsha", "~*"),
    }
    with redis_server.client() as client:
        for name, rules in rights.items():
            client.execute_command("ACL", "SETUSER", name, "reset", "on", ">hush", *rules)
        yield redis_server
        client.execute_command("ACL", "DELUSER", *rights)


def url_of(server: RedisServer, user: str, password: str = "hush") -> str:
    return server.url.replace("redis://", f"redis://{user}:{password}@")


def test_a_redis_that_does_it_all_is_left_as_it_was(users: RedisServer) -> None:
    for url in (users.url, url_of(users, "whole")):
        assert try_tier(url) == ""
        assert try_control(url, "c") == ""
    with users.client() as client:
        assert client.keys("*") == []


@pytest.mark.parametrize("option", ["socket_timeout=soon", "colour=red"])
def test_options_that_the_client_does_not_know_are_mistakes(redis_server: RedisServer, option: str) -> None:
    for trial in (try_tier, lambda url: try_control(url, "c")):
        with pytest.raises(TierMisconfigured, match=option.partition("=")[0]):
            trial(f"{redis_server.url}?{option}")


@pytest.mark.parametrize(
    ("user", "password", "complaint"),
    [
        ("whole", "wrong", "invalid username-password"),
        ("reader", "hush", "permissions"),
        ("elsewhere", "hush", "ermission"),
    ],
)
def test_wrong_passwords_and_missing_rights_are_mistakes(
    users: RedisServer, user: str, password: str, complaint: str
) -> None:
    for trial in (try_tier, lambda url: try_control(url, "c")):
        with pytest.raises(TierMisconfigured, match=complaint) as refused:
            trial(url_of(users, user, password))
        assert str(refused.value).startswith("Redis at 127.0.0.1:")
        assert password not in str(refused.value)


def test_control_needs_scripts(users: RedisServer) -> None:
    assert try_tier(url_of(users, "script")) == ""
    with pytest.raises(TierMisconfigured, match="permissions"):
        try_control(url_of(users, "script"), "c")


def test_a_server_that_is_away_or_full_is_no_mistake(redis_server: RedisServer) -> None:
    assert "refused" in try_tier(f"redis://127.0.0.1:{free_port()}/0")
    with redis_server.client() as client:
        client.config_set("maxmemory", 1)
        try:
            assert "OOM" in try_tier(redis_server.url) or "memory" in try_tier(redis_server.url)
        finally:
            client.config_set("maxmemory", 0)


def test_tls_to_a_plain_port_is_a_mistake(redis_server: RedisServer) -> None:
    with pytest.raises(TierMisconfigured, match=r"Redis at 127\.0\.0\.1:\d+: does not speak TLS"):
        try_tier(redis_server.url.replace("redis://", "rediss://"))


@pytest.fixture
def tls_port(tmp_path: Path) -> Iterator[int]:
    """A port of a server that speaks TLS."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "both.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.recv(1)
            except OSError:
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_plain_to_a_tls_port_is_a_mistake(tls_port: int) -> None:
    with pytest.raises(TierMisconfigured, match="speaks TLS: its URL begins with rediss://"):
        try_tier(f"redis://127.0.0.1:{tls_port}/0")


def test_a_tier_says_that_it_takes_nothing_and_when_it_does_again(users: RedisServer) -> None:
    """It was up, kept nothing, and reported no problem."""
    tier = RedisTier(url_of(users, "reader"), SECRET)
    try:
        assert tier.is_up  # what is there can be had
        assert "permissions" in tier.problem
        with users.client() as client:
            client.execute_command("ACL", "SETUSER", "reader", "+@all")
        wait_until(lambda: tier.problem == "", "the right was given")
        assert tier.store([Fragment(bytes(22), memoryview(bytearray(8)))]) == [True]
    finally:
        tier.close()


def test_disks(tmp_path: Path) -> None:
    assert try_disk(tmp_path / "new" / "disk") == ""
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TierMisconfigured, match=r"file(/below)?: (file exists|not a directory)"):
            try_disk(path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "lock").touch()
    try_disk(tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["lock"]
    with pytest.raises(TierMisconfigured, match=r"/proc/self/disk: (no such file|permission denied|operation not)"):
        try_disk(Path("/proc/self/disk"))
