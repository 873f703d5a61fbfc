"""Routers of one cluster agree about adapters: who loads, who waits, and what is left when something fails."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

import router.adapters.catalog
from kvstore.connect import open_adapter_registry
from kvstore.control.adapter_registry import AdapterRecord, AdapterRegistry, MemoryAdapterRegistry, RegistryUnavailable
from router.adapters.catalog import AdapterCatalog
from router.adapters.config import AdaptersConfig
from router.adapters.files import below, read_fitting
from router.errors import AdapterAway, AdapterConfigured, AdapterExists, AdapterRefused, UnknownModel
from router.events import AdapterRef
from tests.router.adapters.lora_files import TARGETS, write_adapter

BASE = "base"


class Counts:
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def adapter_loaded(self, outcome: str) -> None:
        self.outcomes.append(outcome)


class Cutable(MemoryAdapterRegistry):
    """A registry that can be away."""

    is_cut = False

    def records(self) -> list[AdapterRecord]:
        self._check()
        return super().records()

    def find(self, name: str) -> AdapterRecord | None:
        self._check()
        return super().find(name)

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        self._check()
        return super().replace(name, old, new)

    def _check(self) -> None:
        if self.is_cut:
            raise RegistryUnavailable("cut")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("sql", "law")):
        write_adapter(tmp_path / "root" / name, seed)
    return tmp_path / "root"


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., AdapterCatalog]]:
    made: list[AdapterCatalog] = []

    def catalog(registry: AdapterRegistry, base: str = BASE, **changes: object) -> AdapterCatalog:
        config = dataclasses.replace(AdaptersConfig(enabled=True, root=str(root), load_timeout_s=5.0), **changes)
        made.append(AdapterCatalog(base, registry, config, TARGETS, Counts()))
        return made[-1]

    yield catalog
    for one in made:
        one.close()


class Reading:
    """Holds back what reads adapters, so that a test decides when a load goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        monkeypatch.setattr(router.adapters.catalog, "read_fitting", self._read)

    def _read(self, *arguments: object) -> object:
        self.began.set()
        assert self.may_end.wait(20)
        return read_fitting(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    held = Reading(monkeypatch)
    yield held
    held.may_end.set()


async def test_another_router_finds_it_without_a_poll(make: Callable[..., AdapterCatalog], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/adapters.registry"
    one, other = make(open_adapter_registry(url, "")), make(open_adapter_registry(url, ""))
    record = await one.load("a", "sql")
    assert await other.find("a") == AdapterRef("a", bytes.fromhex(record.digest), record.path)
    with pytest.raises(UnknownModel):
        await other.find("b")


async def test_a_request_waits_for_an_adapter_that_another_router_reads(
    make: Callable[..., AdapterCatalog], reading: Reading
) -> None:
    registry = MemoryAdapterRegistry()
    one, other = make(registry), make(registry)
    loading = asyncio.create_task(one.load("a", "sql"))
    assert await asyncio.to_thread(reading.began.wait, 20)
    waiting = [asyncio.create_task(catalog.find("a")) for catalog in (one, other)]
    done, _ = await asyncio.wait(waiting, timeout=0.3)
    assert not done
    assert one.served == []
    for catalog in (one, other):
        with pytest.raises(AdapterExists, match="is being loaded"):
            await catalog.load("a", "law", in_place=True)
        with pytest.raises(AdapterExists, match="is being loaded"):
            await catalog.unload("a")
    reading.may_end.set()
    record = await loading
    assert {(await ref).digest for ref in waiting} == {bytes.fromhex(record.digest)}


async def test_a_request_waits_for_a_bounded_time(make: Callable[..., AdapterCatalog], reading: Reading) -> None:
    catalog = make(MemoryAdapterRegistry(), load_timeout_s=0.05)
    loading = asyncio.create_task(catalog.load("a", "sql"))
    assert await asyncio.to_thread(reading.began.wait, 20)
    with pytest.raises(AdapterAway, match="'a' is still being loaded") as away:
        await catalog.find("a")
    assert away.value.retry_after_s
    reading.may_end.set()
    await loading
    await catalog.find("a")


async def test_a_load_that_fails_or_is_cancelled_frees_the_name(
    make: Callable[..., AdapterCatalog], reading: Reading
) -> None:
    registry = MemoryAdapterRegistry()
    catalog = make(registry)
    loading = asyncio.create_task(catalog.load("a", "sql"))
    assert await asyncio.to_thread(reading.began.wait, 20)
    waiting = asyncio.create_task(catalog.find("a"))
    loading.cancel()
    with suppress(asyncio.CancelledError):
        await loading
    with pytest.raises(UnknownModel):
        await waiting
    reading.may_end.set()
    with pytest.raises(AdapterRefused):
        await catalog.load("b", "none")
    while registry.records():  # another thread gives them up
        await asyncio.sleep(0.01)


async def test_a_router_that_died_while_it_read_holds_the_name_for_some_minutes_only(
    make: Callable[..., AdapterCatalog], root: Path
) -> None:
    registry = MemoryAdapterRegistry()
    registry.replace("a", None, AdapterRecord("a", str(root / "sql"), "", BASE, loading_until_s=1.0))
    catalog = make(registry)
    with pytest.raises(UnknownModel):
        await catalog.find("a")
    await catalog.load("a", "law")
    assert (await catalog.find("a")).path == str(root / "law")


async def test_of_two_that_load_one_name_one_wins(make: Callable[..., AdapterCatalog]) -> None:
    registry = MemoryAdapterRegistry()
    catalogs = [make(registry) for _ in range(2)]
    paths = ("sql", "law")
    loads = [catalog.load("a", path) for catalog, path in zip(catalogs, paths, strict=True)]
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert sorted(type(result) for result in results if not isinstance(result, AdapterRecord)) == [AdapterExists]
    (won,) = (result for result in results if isinstance(result, AdapterRecord))
    assert registry.records() == [won]


async def test_known_adapters_are_served_while_the_registry_is_away(make: Callable[..., AdapterCatalog]) -> None:
    registry = Cutable()
    catalog = make(registry)
    await catalog.load("a", "sql")
    registry.is_cut = True
    following = asyncio.create_task(catalog.run(0.005))
    while catalog.is_up:  # its own loop finds out
        await asyncio.sleep(0.005)
    assert (await catalog.find("a")).name == "a"
    with pytest.raises(AdapterAway, match="not known now"):
        await catalog.find("b")
    with pytest.raises(AdapterAway):
        await catalog.load("b", "law")
    registry.is_cut = False
    while not catalog.is_up:
        await asyncio.sleep(0.005)
    await catalog.load("b", "law")
    following.cancel()


async def test_the_configuration_is_registered_once_the_registry_is_there(
    make: Callable[..., AdapterCatalog], root: Path
) -> None:
    registry = Cutable()
    registry.is_cut = True
    catalogs = [make(registry, modules={"a": str(root / "sql")}) for _ in range(2)]
    following = [asyncio.create_task(catalog.run(0.005)) for catalog in catalogs]
    with pytest.raises(AdapterAway):
        await catalogs[0].find("a")
    registry.is_cut = False
    refs = [await catalog.find("a") for catalog in catalogs]
    assert refs[0] == refs[1]
    for task in following:
        task.cancel()


async def test_what_is_configured_cannot_be_unloaded(make: Callable[..., AdapterCatalog], root: Path) -> None:
    catalog = make(MemoryAdapterRegistry(), modules={"a": str(root / "sql")})
    following = asyncio.create_task(catalog.run(0.005))
    served = await catalog.find("a")
    with pytest.raises(AdapterConfigured, match=r"^lora_name: 'a' is one of adapters\.modules") as refused:
        await catalog.unload("a", "lora_name")
    assert refused.value.param == "lora_name"
    assert await catalog.find("a") == served
    following.cancel()


async def test_a_mount_that_hangs_keeps_nobody_from_the_registry(
    make: Callable[..., AdapterCatalog], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = threading.Event()

    def hanging(*arguments: str) -> Path:
        if arguments[1] == "hung":
            mount.wait()
        return below(*arguments)

    monkeypatch.setattr(router.adapters.catalog, "below", hanging)
    catalog = make(MemoryAdapterRegistry(), load_timeout_s=0.2)
    await catalog.load("a", "sql")
    loads = [asyncio.create_task(catalog.load(f"hung-{number}", "hung")) for number in range(8)]
    await asyncio.sleep(0)
    assert (await catalog.find("a")).name == "a"
    with pytest.raises(UnknownModel):
        await catalog.find("b")
    for load in loads:
        with pytest.raises(AdapterAway, match=r"^path: 'hung' was not resolved within 0\.2 s"):
            await load
    mount.set()


async def test_a_hanging_configured_adapter_does_not_stop_the_others_news(
    make: Callable[..., AdapterCatalog], root: Path, reading: Reading
) -> None:
    registry = MemoryAdapterRegistry()
    catalog = make(registry, modules={"a": str(root / "sql")})
    following = asyncio.create_task(catalog.run(0.005))
    assert await asyncio.to_thread(reading.began.wait, 20)
    registry.replace("b", None, AdapterRecord("b", str(root / "law"), "aa" * 32, BASE))
    while [record.name for record in catalog.served] != ["b"]:
        await asyncio.sleep(0.005)
    reading.may_end.set()
    assert (await catalog.find("a")).name == "a"
    following.cancel()


class Failing(MemoryAdapterRegistry):
    """A registry with an error that nobody thought of."""

    error: Exception | None = KeyError("digest")

    def records(self) -> list[AdapterRecord]:
        if self.error is not None:
            raise self.error
        return super().records()

    def find(self, name: str) -> AdapterRecord | None:
        if self.error is not None:
            raise self.error
        return super().find(name)


async def test_an_error_of_no_known_kind_does_not_end_the_task(
    make: Callable[..., AdapterCatalog], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Failing()
    catalog = make(registry, modules={"a": str(root / "sql")})
    following = asyncio.create_task(catalog.run(0.005))
    while len([line for line in caplog.messages if "was not read" in line]) < 3:
        await asyncio.sleep(0.005)
    registry.error = None
    while not catalog.served:
        await asyncio.sleep(0.005)
    assert not following.done()
    following.cancel()


async def test_a_damaged_record_hides_no_other_and_its_name_can_be_loaded(
    make: Callable[..., AdapterCatalog], tmp_path: Path
) -> None:
    path = tmp_path / "adapters.registry"
    catalog = make(open_adapter_registry(f"file://{path}", ""))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("insert into adapters values ('broken', '{')")
    await make(open_adapter_registry(f"file://{path}", "")).load("a", "sql")
    following = asyncio.create_task(catalog.run(0.005))
    while [record.name for record in catalog.served] != ["a"]:
        await asyncio.sleep(0.005)
    with pytest.raises(UnknownModel):
        await catalog.find("broken")
    await catalog.load("broken", "law")
    assert (await catalog.find("broken")).name == "broken"
    following.cancel()


async def test_adapters_of_another_model_are_not_served_and_their_names_are_free(
    make: Callable[..., AdapterCatalog],
) -> None:
    registry = MemoryAdapterRegistry()
    before, now = make(registry, base="an older model"), make(registry)
    await before.load("a", "sql")
    with pytest.raises(UnknownModel):
        await now.find("a")
    with pytest.raises(UnknownModel):
        await now.unload("a")
    record = await now.load("a", "law")
    assert record.parent == BASE


async def test_only_bytes_that_are_there_can_be_loaded(make: Callable[..., AdapterCatalog], root: Path) -> None:
    catalog = make(MemoryAdapterRegistry())
    await catalog.load("a", "sql")
    old = await catalog.find("a")
    assert catalog.is_loadable(old)
    write_adapter(root / "sql", seed=5)
    await catalog.load("a", "sql", in_place=True)
    assert not catalog.is_loadable(old)
    assert catalog.is_loadable(await catalog.find("a"))
    await catalog.unload("a")
    assert catalog.is_loadable(old)  # nothing is known of the files: the worker looks
