"""What every adapter registry does, asked of a process's memory, of a file and of a real Redis."""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from kvstore.connect import open_adapter_registry
from kvstore.control.adapter_registry import AdapterRecord, AdapterRegistry, RegistryUnavailable
from kvstore.control.redis_adapter_registry import PREFIX
from tests.processes import RedisServer, free_port

CLUSTER = "adapters-test"
SQL = AdapterRecord("sql-lora", "/adapters/sql", "aa" * 16, "base")
LAW = AdapterRecord("law/ünïcode", "/adapters/law", "", "base", loading_until_s=1234.5)


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=pytest.mark.redis)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return "memory://"
    if request.param == "file":
        return f"file://{tmp_path}/deeper/adapters.sqlite"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url


@pytest.fixture
def registry(url: str, request: pytest.FixtureRequest) -> Iterator[AdapterRegistry]:
    made = open_adapter_registry(url, f"{CLUSTER}-{request.node.name}")
    yield made
    made.close()


def test_what_was_put_is_found_and_listed_by_name(registry: AdapterRegistry) -> None:
    assert registry.records() == []
    assert registry.find(SQL.name) is None
    assert registry.replace(SQL.name, None, SQL)
    assert registry.replace(LAW.name, None, LAW)
    assert registry.find(SQL.name) == SQL
    assert registry.find(LAW.name) == LAW
    assert registry.records() == [LAW, SQL]


def test_a_name_is_taken_once(registry: AdapterRegistry) -> None:
    assert registry.replace(SQL.name, None, SQL)
    assert not registry.replace(SQL.name, None, replace(SQL, digest="bb" * 16))
    assert registry.find(SQL.name) == SQL


def test_only_what_is_there_is_replaced_or_removed(registry: AdapterRegistry) -> None:
    newer = replace(SQL, digest="bb" * 16)
    assert not registry.replace(SQL.name, SQL, newer)
    assert registry.records() == []
    registry.replace(SQL.name, None, SQL)
    assert registry.replace(SQL.name, SQL, newer)
    assert not registry.replace(SQL.name, SQL, None)
    assert registry.find(SQL.name) == newer
    assert registry.replace(SQL.name, newer, None)
    assert registry.find(SQL.name) is None
    assert registry.replace(SQL.name, None, None)


def test_of_many_that_want_a_name_one_wins(registry: AdapterRegistry) -> None:
    wins: list[int] = []

    def want(number: int) -> None:
        if registry.replace("wanted", None, replace(SQL, name="wanted", path=f"/adapters/{number}")):
            wins.append(number)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = registry.find("wanted")
    assert found is not None
    assert [f"/adapters/{number}" for number in wins] == [found.path]


def test_others_of_the_cluster_see_it_and_other_clusters_do_not(registry: AdapterRegistry, url: str) -> None:
    if url == "memory://":
        pytest.skip("of one process, which no other sees")
    registry.replace(SQL.name, None, SQL)
    others = {}
    for name in ("", "another"):
        other = open_adapter_registry(url, name)
        others[name] = other.records()
        other.close()
    is_file = url.startswith("file://")  # the path is the cluster's own
    assert others == {"": [SQL] if is_file else [], "another": [SQL] if is_file else []}


def test_a_file_outlives_who_opened_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/adapters.sqlite"
    first = open_adapter_registry(url, "")
    first.replace(SQL.name, None, SQL)
    first.close()
    second = open_adapter_registry(url, "")
    assert second.records() == [SQL]
    second.close()


DAMAGED = [
    "",
    "{",
    "[]",
    "{}",
    '{"name": "x"}',
    SQL.packed().replace('"aa', '"zz'),
    SQL.packed().replace('"base"', "7"),
]


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("kind", ["file", pytest.param("redis", marks=pytest.mark.redis)])
def test_a_damaged_record_is_passed_over_and_its_name_is_free(
    kind: str, text: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "adapters.sqlite"
    if kind == "file":
        registry = open_adapter_registry(f"file://{path}", "")
        with sqlite3.connect(path) as database:
            database.execute("insert into adapters values (?, ?)", (SQL.name, text))
        database.close()
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        registry = open_adapter_registry(server.url, request.node.name)
        client = redis.Redis.from_url(server.url)
        client.hset(PREFIX + request.node.name, SQL.name, text)
        client.close()
    registry.replace(LAW.name, None, LAW)
    assert registry.records() == [LAW]
    assert registry.find(SQL.name) is None
    assert not registry.replace(SQL.name, LAW, SQL)
    assert registry.replace(SQL.name, None, SQL)
    assert registry.records() == [LAW, SQL]
    registry.close()


def test_a_file_that_is_no_registry_is_said_to_be_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "adapters.sqlite"
    path.write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(RegistryUnavailable, match=r"adapters\.sqlite"):
        open_adapter_registry(f"file://{path}", "")


@pytest.mark.redis
def test_a_redis_that_is_away_is_said_to_be_unavailable() -> None:
    registry = open_adapter_registry(f"redis://127.0.0.1:{free_port()}", "")
    for call in (registry.records, lambda: registry.find("a"), lambda: registry.replace("a", None, SQL)):
        with pytest.raises(RegistryUnavailable, match="adapter registry at"):
            call()
    registry.close()


@pytest.mark.parametrize("url", ["file://relative", "http://host", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^adapters: "):
        open_adapter_registry(url, "")
