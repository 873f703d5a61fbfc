"""The kvstore branch refuses values that nothing can run with, and names the key."""

import pytest

from kvstore.config import KVStoreConfig


def test_defaults_are_valid() -> None:
    assert KVStoreConfig().control == "memory://"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_size", -1),
        ("layers_per_fragment", -1),
        ("host_bytes", 0),
        ("arena_dir", "relative/path"),
        ("disk_bytes", -1),
        ("disk_bytes", 1000),
        ("disk_dir", "relative/path"),
        ("disk_write", "sometimes"),
        ("kv_encoding", "int4"),
        ("disk_compression", "gzip"),
        ("tier_compression", "on"),
        ("tier", "memcached://host"),
        ("control", "http://host"),
        ("tier", "redis://127.0.0.1:99999/0"),
        ("tier", "redis://127.0.0.1:port/0"),
        ("tier", "redis://127.0.0.1:1/notadb"),
        ("tier", "redis://127.0.0.1:1/0?db=x"),
        ("control", "redis://127.0.0.1:99999/0"),
        ("control", "rediss://127.0.0.1:1/-1"),
        ("control", "redis://127.0.0.1:0/0"),
        ("block_size", 10**9),
        ("disk_bytes", 2**62),
        ("tier_ttl_s", 1e300),
        ("tier_ttl_s", 0.0),
        ("tier_ttl_s", float("nan")),
    ],
)
def test_bad_value_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key}: "):
        KVStoreConfig(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["redis://host:6379/1", "rediss://:secret@host/0"])
def test_redis_urls_are_taken(url: str) -> None:
    assert KVStoreConfig(tier=url, control=url).tier == url


def test_a_disk_tier_needs_its_folder() -> None:
    with pytest.raises(ValueError, match=r"^disk_dir: "):
        KVStoreConfig(disk_bytes=1 << 30)
    assert KVStoreConfig(disk_bytes=1 << 30, disk_dir="/var/lib/switchyard").disk_write == "back"
