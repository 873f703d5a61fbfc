"""One router process, put together: reads the model's files, finds workers, opens both APIs, stops gracefully.

Knows the constructors of all parts, and nothing of their insides.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from checkpoint.identity import ServedModel
from kvstore.config import is_redis
from kvstore.connect import open_adapter_registry, open_directory, open_journal
from kvstore.control.adapter_registry import AdapterRegistry, MemoryAdapterRegistry, RegistryUnavailable
from kvstore.control.directory import Directory
from kvstore.control.journal import JournalUnavailable, StreamJournal
from kvstore.control.redis_decision_log import RedisDecisionLog
from router.adapters.catalog import AdapterCatalog
from router.api.grpc_api import GrpcApi
from router.api.http_api import HttpApi, HttpParts
from router.api.status_api import StatusServicer
from router.config import RouterSpec
from router.errors import ConfigError, StartupError
from router.fleet.fleet import Fleet
from router.fleet.identity import ServedIdentity
from router.fleet.membership import Membership
from router.fleet.worker_connection import ConnectionOptions, end_task
from router.metrics import Metrics
from router.model_files import ModelFiles
from router.placement.policy import POLICIES, Rates
from router.placement.residency import AdapterCosts
from router.service.dispatch import Dispatcher
from router.service.generation import Generation
from router.service.journal import JournalWriter
from router.service.readiness import ControlState, Readiness, readiness

_FLUSH_S = 0.5  # for the last messages of streams that the end of the drain cut off


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a router listens."""

    grpc_address: str
    http_address: str


class Router:
    """start(), then stop(). Everything runs in the event loop of start()."""

    def __init__(
        self, spec: RouterSpec, journal: StreamJournal | None = None, registry: AdapterRegistry | None = None
    ) -> None:
        config = spec.config
        self._spec = spec
        files = ModelFiles.load(
            spec.model_dir, spec.model_name, spec.generation_config, spec.ignore_keys, spec.model_limits
        )
        self._metrics = Metrics()
        rates = Rates(config.prefill_ms_per_token, config.decode_ms_per_step, config.transfer_ms_per_block)
        fleet = Fleet(POLICIES[config.policy], rates, AdapterCosts(spec.adapters.load_ms, spec.adapters.copy_ms))
        self._dispatcher = Dispatcher(fleet, config, time.monotonic, self._metrics)
        self._journal = JournalWriter(journal)
        served = ServedModel(spec.cluster, spec.model_name, spec.weights, files.tokenizer)
        self._served = ServedIdentity(served, config.replacement_wait_s, time.monotonic)
        self._adapters = AdapterCatalog(
            files.name, registry or MemoryAdapterRegistry(), spec.adapters, spec.adapter_targets, self._metrics
        )
        self._dispatcher.is_loadable = self._adapters.is_loadable
        self._generation = Generation(
            files, self._served, config, self._dispatcher, self._journal, self._metrics, self._adapters
        )
        self._dispatcher.weights = lambda: self._served.now.weights
        self._membership: Membership | None = None
        self._metrics.watch(
            self._dispatcher,
            lambda: self._generation.admission.num_inflight,
            lambda: self._directory_is_up,
            lambda: self._journal.is_up,
            self._adapters,
        )
        self._decisions = RedisDecisionLog(spec.control, spec.cluster) if is_redis(spec.control) else None
        admission = self._generation.admission
        status = StatusServicer(self.readiness, self._dispatcher, lambda: admission.num_inflight, self._decisions)
        self._grpc = GrpcApi(self._generation, self._metrics, status, config.max_message_bytes)
        self._http = HttpApi(
            HttpParts(self._generation, self._metrics, self.readiness, config.max_message_bytes, config.cors_origins)
        )
        self._changed = asyncio.Event()
        self._dispatcher.on_fleet_change = self._changed.set
        self._tasks: list[asyncio.Task[None]] = []

    def readiness(self) -> Readiness:
        """Whether it can serve, and what is missing."""
        return readiness(
            self._served.now,
            self._dispatcher,
            ControlState(self._directory_is_up, self._journal.is_up, self._journal.is_missing),
            self._membership.refusals if self._membership is not None else (),
            self._generation.admission.is_stopping,
        )

    @property
    def _directory_is_up(self) -> bool:
        return self._membership is not None and self._membership.directory_is_up

    async def start(self, directory: Callable[[], Directory]) -> Addresses:
        """Listen, then open the directory and look for workers. Raises StartupError, and then holds nothing."""
        try:
            http_address = self._http.bind(self._spec.http_host, self._spec.http_port)
            grpc_address = await self._grpc.start(self._spec.grpc_host, self._spec.grpc_port)
            self._membership = self._join(directory())
        except StartupError:
            self._http.close()
            await self._grpc.stop(0)
            raise
        self._tasks = [
            asyncio.create_task(self._membership.run(), name="membership"),
            asyncio.create_task(self._http.serve(self._spec.config.drain_s + _FLUSH_S), name="http"),
            asyncio.create_task(self._tell_health(), name="health"),
            asyncio.create_task(self._journal.run(), name="journal"),
            asyncio.create_task(self._adapters.run(self._spec.config.directory_poll_s), name="adapters"),
            asyncio.create_task(self._pin(), name="pins"),
        ]
        return Addresses(grpc_address, http_address)

    async def stop(self) -> None:
        """Refuse what is new, give running streams drain_s to end, then fail them and let go of everything."""
        self._generation.admission.is_stopping = True
        self._changed.set()
        self._http.stop()
        membership, http, health, journal, *others = self._tasks
        drain_s = self._spec.config.drain_s
        parting = asyncio.get_running_loop().call_later(drain_s, self._generation.end_streams)
        await asyncio.gather(self._grpc.stop(drain_s + _FLUSH_S), http)
        parting.cancel()
        for task in (health, membership, journal, *others):
            await end_task(task)
        await self._journal.stop()
        self._generation.close()
        await asyncio.get_running_loop().run_in_executor(None, self._adapters.close)
        if self._decisions is not None:
            self._decisions.close()

    def _join(self, directory: Directory) -> Membership:
        config = self._spec.config
        options = ConnectionOptions(
            self._spec.router_id, _epochs(), self._served, config.worker_silence_s, config.max_message_bytes
        )
        return Membership(directory, self._dispatcher.fleet, self._dispatcher, options, config.directory_poll_s)

    async def _pin(self) -> None:
        """Workers forget what a router pinned when its connection ends, and homes change with the workers."""
        while self._adapters.is_enabled:
            self._dispatcher.pin(self._adapters.pinned)
            await asyncio.sleep(self._spec.config.directory_poll_s)

    async def _tell_health(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._grpc.set_serving(self.readiness().is_ready)


async def run(spec: RouterSpec, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Says where it listens as one line of JSON."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with contextlib.ExitStack() as at_end:

        def directory() -> Directory:
            try:
                return at_end.enter_context(contextlib.closing(open_directory(spec.control, spec.cluster)))
            except ValueError as error:
                raise ConfigError(str(error)) from None

        router = Router(spec, _open_journal(spec.journal, spec.cluster), _open_registry(spec))
        addresses = await router.start(directory)
        announce(json.dumps({"grpc_address": addresses.grpc_address, "http_address": addresses.http_address}))
        await stop.wait()
        await router.stop()


def _open_journal(url: str, cluster: str) -> StreamJournal | None:
    try:
        return open_journal(url, cluster) if url else None
    except (ValueError, JournalUnavailable) as error:
        raise ConfigError(f"journal: {error}" if isinstance(error, JournalUnavailable) else str(error)) from None


def _open_registry(spec: RouterSpec) -> AdapterRegistry | None:
    try:
        return open_adapter_registry(spec.adapter_registry, spec.cluster) if spec.adapters.enabled else None
    except (ValueError, RegistryUnavailable) as error:
        raise ConfigError(f"adapter_registry: {error}") from None


def _epochs() -> Callable[[], int]:
    # A restarted router keeps its id, so its epochs must go on from where they were: the wall clock does.
    last = 0

    def next_epoch() -> int:
        nonlocal last
        last = max(last + 1, time.time_ns() // 1_000_000)
        return last

    return next_epoch
