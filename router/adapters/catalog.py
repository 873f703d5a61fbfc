"""Which adapters this router serves, kept in step with the registry that all routers of the cluster share.

A load is checked and digested here, then announced; a name that one router is reading belongs to it until then. Other
routers see changes when they poll, and ask at once for a name that they do not know. Knows nothing of workers: they
read an adapter when a request with it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from kvstore.control.adapter_registry import AdapterRecord, AdapterRegistry, RegistryUnavailable
from router.adapters.config import AdaptersConfig
from router.adapters.files import below, read_fitting
from router.adapters.targets import AdapterTarget
from router.errors import (
    AdapterAway,
    AdapterConfigured,
    AdapterExists,
    AdaptersOff,
    InvalidRequest,
    RouterError,
    UnknownModel,
)
from router.events import AdapterRef

log = logging.getLogger(__name__)

MAX_NAME_CHARACTERS = 256
_CLAIM_S = 300.0  # a router that dies while it reads an adapter holds the name for so long
_LOOK_S = 0.1
_T = TypeVar("_T")


class LoadObserver(Protocol):
    """Who counts."""

    def adapter_loaded(self, outcome: str) -> None:
        """outcome: loaded, or the code of the error."""


class AdapterCatalog:
    """The adapters of one model. run() in a task keeps it up to date."""

    def __init__(
        self,
        base: str,
        registry: AdapterRegistry,
        config: AdaptersConfig,
        targets: Sequence[AdapterTarget],
        observer: LoadObserver,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """base: name of the model; targets: its linear modules. The registry is closed by close()."""
        self._base = base
        self._registry = registry
        self._config = config
        self._targets = targets
        self._observer = observer
        self._clock = wall_clock
        self._records: dict[str, AdapterRecord] = {}
        self._to_register = dict(config.modules)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="adapters")  # that ask the registry
        # Apart from those: a mount that hangs must not keep requests from the registry.
        self._resolver = ThreadPoolExecutor(2, thread_name_prefix="adapter paths")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read adapters")  # one at a time: it is in memory whole
        self.is_up = True  # until a poll shows otherwise

    # -- what is served

    @property
    def is_enabled(self) -> bool:
        """Whether requests may name adapters."""
        return self._config.enabled

    @property
    def served(self) -> list[AdapterRecord]:
        """Those that requests may name now, by name."""
        return [record for _, record in sorted(self._records.items()) if self._is_served(record)]

    @property
    def pinned(self) -> list[AdapterRef]:
        """Those that stay on devices while nobody uses them, by name."""
        return [_ref(record) for record in self.served if record.is_pinned]

    async def find(self, name: str) -> AdapterRef:
        """The adapter of that name. Waits while it is being loaded. Raises UnknownModel, AdapterAway."""
        give_up_s = time.monotonic() + self._config.load_timeout_s
        while True:
            record = self._records.get(name)
            if record is None or not self._is_served(record):
                record = await self._look_up(name)
            if record is not None and self._is_served(record):
                return _ref(record)
            if name not in self._to_register and (record is None or not self._is_loading(record)):
                raise self._unknown(name)
            if time.monotonic() >= give_up_s:
                raise AdapterAway(f"model: adapter {name!r} is still being loaded", param="model", retry_after_s=1.0)
            await asyncio.sleep(_LOOK_S)

    def is_loadable(self, ref: AdapterRef) -> bool:
        """Whether a worker that does not hold the adapter can still read it: not where other bytes are served from the
        same directory now."""
        return all(
            record.digest == ref.digest.hex()
            for record in self._records.values()
            if record.path == ref.path and self._is_served(record)
        )

    # -- changes

    async def load(
        self,
        name: str,
        path: str,
        in_place: bool = False,
        is_pinned: bool = False,
        params: tuple[str, str] = ("name", "path"),
    ) -> AdapterRecord:
        """Serve the adapter of a directory below the root. params: what name and path are called where they came in.

        in_place: instead of the one that has the name. is_pinned: its homes keep it on their devices. Raises
        InvalidRequest of several kinds, or AdapterAway.
        """
        try:
            record = await self._load(AdapterRecord(name, path, "", self._base, is_pinned=is_pinned), in_place, params)
        except RouterError as error:
            self._observer.adapter_loaded(error.code)
            raise
        self._observer.adapter_loaded("loaded")
        return record

    async def _load(self, asked: AdapterRecord, in_place: bool, params: tuple[str, str]) -> AdapterRecord:
        name, path = asked.name, asked.path
        self._check_root()
        self._check_name(name, params[0])
        directory = await self._resolve(path, params[1], below, self._config.root, path, params[1])
        configured = self._config.modules.get(name)
        if configured and await self._resolve(configured, params[1], Path(configured).resolve) != directory:
            raise AdapterExists(f"{params[0]}: {name!r} is one of adapters.modules, with another path", param=params[0])
        asked = dataclasses.replace(asked, path=str(directory))
        there = await self._ask(self._registry.find, name)
        if there is not None and self._is_loading(there):
            raise AdapterExists(f"{params[0]}: {name!r} is being loaded", param=params[0])
        if there is not None and self._is_served(there):
            if not in_place:
                raise AdapterExists(f"{params[0]}: {name!r} is loaded (load_inplace replaces it)", param=params[0])
            # It is served on until the new one is read.
            return await self._announce(there, asked, params)
        claim = dataclasses.replace(asked, loading_until_s=self._clock() + _CLAIM_S)
        await self._replace(there, claim, params[0])
        try:
            return await self._announce(claim, claim, params)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the router stops: the claim ends by itself
                self._threads.submit(self._give_up, claim)
            raise

    async def unload(self, name: str, param: str = "name") -> None:
        """Serve it no longer; streams that run go on. Raises InvalidRequest of several kinds, or AdapterAway.

        One of the configuration stays: a router that starts would serve it again, on all routers.
        """
        self._check_root()
        if name in self._config.modules:
            message = f"{param}: {name!r} is one of adapters.modules; take it out of the configuration and restart"
            raise AdapterConfigured(message, param=param)
        there = await self._ask(self._registry.find, name)
        if there is not None and self._is_loading(there):
            raise AdapterExists(f"{param}: {name!r} is being loaded", param=param)
        if there is None or not self._is_served(there):
            raise UnknownModel(f"{param}: no adapter {name!r} is loaded", param=param)
        if not await self._ask(self._registry.replace, name, there, None):
            raise AdapterExists(f"{param}: {name!r} was changed by another call meanwhile", param=param)
        self._records.pop(name, None)
        log.info("adapter %s is not served any more", name)

    # -- in step with the others

    async def run(self, poll_s: float) -> None:
        """Announce the adapters of the configuration, and follow what other routers announce; until cancelled."""
        if self._config.enabled:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._register_all(poll_s))  # apart: a mount that hangs must not stop the other
                tasks.create_task(self._follow(poll_s))

    async def _follow(self, poll_s: float) -> None:
        while True:
            try:
                records = await self._ask(self._registry.records)
                self._records = {record.name: record for record in records}
                self._set_up(True)
            except AdapterAway as error:
                if self.is_up:
                    log.warning("registry unavailable; serving the adapters known so far: %s", error.message)
                self._set_up(False)
            except Exception:  # whatever it is: the next poll may do
                log.exception("the adapter registry was not read")
            await asyncio.sleep(poll_s)

    async def _register_all(self, poll_s: float) -> None:
        while self._to_register:
            for name, path in list(self._to_register.items()):
                try:
                    await self._register(name, path)
                except AdapterAway:
                    break  # the registry, which _follow speaks of, or the mount: later
                except Exception:
                    log.exception("adapter %s is not served yet", name)
            await asyncio.sleep(poll_s)

    def close(self) -> None:
        """Give up threads and registry. After run() was cancelled."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._resolver.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=True)
        self._registry.close()

    async def _register(self, name: str, path: str) -> None:
        """Raises AdapterAway."""
        key, is_pinned = f"adapters.modules.{name}", name in self._config.pinned
        there = await self._ask(self._registry.find, name)  # before it is read: the registry may be away
        directory = await self._resolve(path, key, Path(path).resolve)
        try:
            self._check_name(name, key)
            wanted = await self._read(AdapterRecord(name, str(directory), "", self._base, is_pinned=is_pinned), key)
        except InvalidRequest as error:
            log.error("adapter %s is not served: %s", name, error.message)
            del self._to_register[name]
            return
        # Another router that starts at the same time puts the same record there.
        if there == wanted or await self._ask(self._registry.replace, name, there, wanted):
            self._records[name] = wanted
            del self._to_register[name]

    # -- steps

    def _is_served(self, record: AdapterRecord) -> bool:
        return bool(record.digest) and record.parent == self._base and self._config.enabled

    def _is_loading(self, record: AdapterRecord) -> bool:
        return not record.digest and record.parent == self._base and record.loading_until_s > self._clock()

    def _check_root(self) -> None:
        if not self._config.enabled:
            raise AdaptersOff("adapters are switched off here: adapters.enabled=true (--enable-lora) switches them on")
        if not self._config.root:
            raise AdaptersOff(
                "no adapters are loaded while this cluster runs: adapters.root names where to load them from"
            )

    def _check_name(self, name: str, param: str) -> None:
        if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            message = f"{param}: must be 1 to {MAX_NAME_CHARACTERS} printable characters, not {name[:100]!r}"
            raise InvalidRequest(message, param=param)
        if name == self._base:
            raise AdapterExists(f"{param}: {name!r} is the name of the model itself", param=param)

    async def _announce(self, there: AdapterRecord, wanted: AdapterRecord, params: tuple[str, str]) -> AdapterRecord:
        record = await self._read(wanted, params[1])
        if record != there:
            await self._replace(there, record, params[0])
        self._records[record.name] = record
        log.info("adapter %s is served from %s, digest %s", record.name, record.path, record.digest[:16])
        return record

    async def _read(self, record: AdapterRecord, param: str) -> AdapterRecord:
        arguments = (Path(record.path), self._targets, self._config.max_lora_rank, param)
        adapter = await asyncio.get_running_loop().run_in_executor(self._reader, read_fitting, *arguments)
        return dataclasses.replace(record, digest=adapter.digest.hex(), loading_until_s=0.0)

    async def _replace(self, old: AdapterRecord | None, new: AdapterRecord, param: str) -> None:
        if not await self._ask(self._registry.replace, new.name, old, new):
            raise AdapterExists(f"{param}: {new.name!r} was changed by another call meanwhile", param=param)

    def _give_up(self, claim: AdapterRecord) -> None:
        try:
            self._registry.replace(claim.name, claim, None)
        except RegistryUnavailable as error:
            log.warning("the name %s stays taken for some minutes: %s", claim.name, error)

    async def _look_up(self, name: str) -> AdapterRecord | None:
        if not self._config.enabled or len(name) > MAX_NAME_CHARACTERS:
            return None
        record = await self._ask(self._registry.find, name)
        if record is None:
            self._records.pop(name, None)
        else:
            self._records[name] = record
        return record

    def _unknown(self, name: str) -> UnknownModel:
        others = f", with {len(self.served)} adapters" if self.served else ""
        return UnknownModel(f"model: {name!r} is not served here; {self._base!r} is{others}", param="model")

    async def _ask(self, question: Callable[..., _T], *arguments: object) -> _T:
        away = "which adapters are served is not known now"
        try:
            return await self._bounded(self._threads, question, *arguments)
        except RegistryUnavailable as error:
            raise AdapterAway(f"{away} ({error})", retry_after_s=1.0) from None
        except TimeoutError:
            waited = f"no answer of the adapter registry within {self._config.load_timeout_s:g} s"
            raise AdapterAway(f"{away} ({waited})", retry_after_s=1.0) from None

    async def _resolve(self, path: str, param: str, call: Callable[..., Path], *arguments: object) -> Path:
        try:
            return await self._bounded(self._resolver, call, *arguments)
        except TimeoutError:
            waited = f"was not resolved within {self._config.load_timeout_s:g} s: its mount may hang"
            raise AdapterAway(f"{param}: {path[:100]!r} {waited}", param=param, retry_after_s=1.0) from None

    async def _bounded(self, threads: ThreadPoolExecutor, call: Callable[..., _T], *arguments: object) -> _T:
        async with asyncio.timeout(self._config.load_timeout_s):
            return await asyncio.get_running_loop().run_in_executor(threads, call, *arguments)

    def _set_up(self, is_up: bool) -> None:
        if is_up and not self.is_up:
            log.info("the registry of adapters is back")
        self.is_up = is_up


def _ref(record: AdapterRecord) -> AdapterRef:
    return AdapterRef(record.name, bytes.fromhex(record.digest), record.path)
