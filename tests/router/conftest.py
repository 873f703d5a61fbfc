"""A router on real ports in the test's own event loop, with fake workers in a directory in memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from switchyard.v1 import generation_pb2_grpc

from kvstore.control.adapter_registry import AdapterRegistry
from kvstore.control.directory import MemoryDirectory, WorkerRecord
from kvstore.control.journal import StreamJournal
from router.adapters.config import AdaptersConfig
from router.adapters.targets import AdapterTarget
from router.app import Router
from router.config import RouterConfig, RouterSpec
from tests.router.fake_worker import CONTEXT_TOKENS, VOCAB_SIZE, FakeWorker

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
MODEL = "tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'villain' %}{{ raise_exception('no villains') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"
)
DEADLINE_S = 20.0  # only a broken router reaches it

QUICK = RouterConfig(
    directory_poll_s=0.02, new_request_wait_s=5.0, replacement_wait_s=5.0, drain_s=1.0, worker_silence_s=5.0
)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must happen."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        await asyncio.sleep(0.005)


WEIGHTS = "digest-of-weights"


@dataclass(frozen=True)
class Adapters:
    """What a router knows of adapters; nothing by default."""

    config: AdaptersConfig = field(default_factory=AdaptersConfig)
    targets: tuple[AdapterTarget, ...] = ()
    registry: AdapterRegistry | None = None


class Cluster:
    """One router and its workers."""

    def __init__(
        self,
        model_dir: Path,
        config: RouterConfig,
        journal: StreamJournal | None,
        clock: Callable[[], float],
        generation_config: str,
        weights: str,
        adapters: Adapters,
    ) -> None:
        self.directory = MemoryDirectory(clock)
        self.workers: list[FakeWorker] = []
        self.spec = RouterSpec(
            router_id="router-0",
            model_dir=str(model_dir),
            model_name=MODEL,
            control="memory://",
            grpc_port=0,
            http_port=0,
            generation_config=generation_config,
            config=config,
            weights=weights,
            adapters=adapters.config,
            adapter_targets=adapters.targets,
        )
        self.router = Router(self.spec, journal, adapters.registry)
        self.grpc_address = ""
        self.http_url = ""

    async def add(self, *workers: FakeWorker) -> None:
        """Start workers and wait until the router has them all."""
        for worker in workers:
            await worker.start()
            self.workers.append(worker)
            self.lease(worker)
        await self.sees(*workers)

    def lease(self, worker: FakeWorker) -> int:
        return self.directory.keep_alive(
            WorkerRecord(worker.worker_id, worker.address, worker.pool, worker.role, node_id="node-0"), ttl_s=3600
        )

    async def sees(self, *workers: FakeWorker) -> None:
        ids = {worker.worker_id for worker in workers}
        await until(lambda: ids <= {state.worker_id for state in self.router.readiness().workers}, f"{ids} are up")

    async def loses(self, worker: FakeWorker) -> None:
        await until(
            lambda: worker.worker_id not in {state.worker_id for state in self.router.readiness().workers},
            f"{worker.worker_id} is out",
        )

    def stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        self._channel = grpc.aio.insecure_channel(self.grpc_address)
        return generation_pb2_grpc.GenerationServiceStub(self._channel)


ClusterFactory = Callable[..., "AsyncIterator[Cluster]"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as far as a router reads it: the demo model's tokenizer, and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    shutil.copy(DEMO / "tokenizer.json", directory / "tokenizer.json")
    config = {"max_position_embeddings": CONTEXT_TOKENS, "vocab_size": VOCAB_SIZE}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"eos_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


@asynccontextmanager
async def running_cluster(
    model_dir: Path,
    *workers: FakeWorker,
    config: RouterConfig = QUICK,
    journal: StreamJournal | None = None,
    clock: Callable[[], float] = time.monotonic,
    generation_config: str = "auto",
    weights: str = WEIGHTS,
    adapters: Adapters = Adapters(),
) -> AsyncIterator[Cluster]:
    """A started router with these workers; afterwards its books must balance. clock: of the directory."""
    cluster = Cluster(model_dir, config, journal, clock, generation_config, weights, adapters)
    addresses = await cluster.router.start(lambda: cluster.directory)
    cluster.grpc_address = addresses.grpc_address
    cluster.http_url = f"http://{addresses.http_address}"
    try:
        await cluster.add(*workers)
        yield cluster
        generation = cluster.router._generation
        await until(lambda: generation.admission.num_inflight == 0, "every request left")
        cluster.router._dispatcher.fleet.check()
        await until(lambda: all(worker.num_live == 0 for worker in cluster.workers), "no worker works on")
    finally:
        await cluster.router.stop()
        for worker in cluster.workers:
            await worker.kill()


def pair(number: int = 0, shared: set[tuple[int, ...]] | None = None) -> tuple[FakeWorker, FakeWorker]:
    """A prefill and a decode worker that share KV."""
    prefilled = set() if shared is None else shared
    return FakeWorker(f"prefill-{number}", "prefill", prefilled), FakeWorker(f"decode-{number}", "decode", prefilled)


def config_with(**changes: object) -> RouterConfig:
    """The tests' quick config with a few changes."""
    return replace(QUICK, **changes)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model directories by their chat template: see saying.write_model."""
    from tests.router.saying import write_model

    return lambda template: write_model(tmp_path_factory.mktemp("model"), template)
