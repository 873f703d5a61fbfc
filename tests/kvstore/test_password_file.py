"""The password of a Redis comes from a file, as a mounted Secret has it, and stands in no URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import config
from deploy.errors import ConfigError
from deploy.preflight import check_password_files
from kvstore.config import KVStoreConfig
from kvstore.connect import open_directory, open_tiers
from kvstore.control.directory import DirectoryUnavailable
from kvstore.redis_client import connect
from tests.processes import RedisServer

PASSWORD = "with spaces, % and ü"


@pytest.fixture
def guarded(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A Redis that asks for PASSWORD."""
    with redis_server.client() as client:
        client.config_set("requirepass", PASSWORD)
        yield redis_server
        client.config_set("requirepass", "")


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "a folder & more" / "password"
    path.parent.mkdir()
    path.write_text(PASSWORD + "\n", encoding="utf-8")
    return path


@pytest.mark.redis
def test_directory_and_tier_log_in_with_the_files(guarded: RedisServer, password_file: Path) -> None:
    store = KVStoreConfig(
        control=guarded.url,
        tier=guarded.url,
        control_password_file=str(password_file),
        tier_password_file=str(password_file),
    )
    directory = open_directory(store.control_url, "c")
    assert list(directory.workers()) == []
    (tier,) = open_tiers("", store, secret="s" * 32)
    assert tier.is_up
    with pytest.raises(DirectoryUnavailable):
        open_directory(store.control, "c").workers()


@pytest.mark.redis
def test_other_parts_of_the_url_stay(guarded: RedisServer, password_file: Path) -> None:
    store = KVStoreConfig(control=f"{guarded.url}?health_check_interval=7", control_password_file=str(password_file))
    client = connect(store.control_url)
    assert client.ping()
    assert client.connection_pool.connection_kwargs["health_check_interval"] == 7
    assert PASSWORD not in store.control_url


def test_without_a_file_the_url_stays_as_it_is() -> None:
    assert KVStoreConfig(control="redis://h:1/0", tier="").control_url == "redis://h:1/0"
    assert KVStoreConfig().tier_url == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"control_password_file": "/x"}, "control_password_file: control must be the URL of a Redis, not 'memory://'"),
        ({"tier_password_file": "/x"}, "tier_password_file: tier must be the URL of a Redis, not ''"),
        (
            {"control": "redis://:secret@h", "control_password_file": "/x"},
            "control_password_file: the URL of control has a password too",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.parse({"kvstore": values})
    assert f"kvstore.{message}" == str(refused.value)


@pytest.mark.parametrize("key", ["control", "tier"])
def test_a_missing_file_is_one_error_that_names_the_key(tmp_path: Path, key: str) -> None:
    path = tmp_path / "password"
    store = KVStoreConfig(**{key: "redis://h:1/0", f"{key}_password_file": str(path)})
    with pytest.raises(ConfigError) as refused:
        check_password_files(store)
    assert str(refused.value) == f"kvstore.{key}_password_file: {path}: No such file or directory"
    assert refused.value.exit_code == 2
    path.touch()
    with pytest.raises(ConfigError, match="is empty"):
        check_password_files(store)
    path.write_text("x")
    check_password_files(store)
