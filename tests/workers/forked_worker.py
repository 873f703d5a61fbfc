"""Workers as processes that a test talks to. They are forked, as those of whole clusters are: see tests.prefork.

tests/workers/runtime has tests of workers that `python -m workers` starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from kvstore.config import KVStoreConfig
from tests.forked import Prefork, Server
from tests.workers.worker_client import WorkerClient
from workers.config import EngineConfig, WorkerSpec

BLOCK_SIZE = 16
ALWAYS = KVStoreConfig(prefix_fetch="always")


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def spec_for(checkpoint: Path, role: str, node, **options) -> WorkerSpec:
    engine = EngineConfig(
        str(checkpoint), tp=options.pop("tp", 1), pp=options.pop("pp", 1), block_size=BLOCK_SIZE, num_blocks=40,
        max_num_batched_tokens=options.pop("chunk", 20), device="cpu",
    )  # fmt: skip
    options = {"host_address": node.host_address, "control": node.control_url, "layers_per_fragment": 1, **options}
    return WorkerSpec(worker_id=f"{role}-0", pool=role, role=role, engine=engine, node_id=node.node_id, **options)


@cache
def _prefork() -> Prefork:
    """It ends with the test's process."""
    return Prefork()


def start(spec: WorkerSpec, folder: Path) -> Server:
    """One that the test ends itself; `ready["address"]` is where it serves. folder: for its files."""
    server = Server(_prefork(), "worker", f"{spec.worker_id}-{spec.node_id}", folder)
    server.start(asdict(spec))
    try:
        server.wait_ready()
    except AssertionError:
        server.kill()
        raise
    return server


@contextmanager
def worker(spec: WorkerSpec) -> Iterator[WorkerClient]:
    """A worker, and a connection to it."""
    with tempfile.TemporaryDirectory() as folder:
        server = start(spec, Path(folder))
        try:
            with WorkerClient(server.ready["address"]) as client:
                yield client
            assert server.is_running, f"the worker ended: {server.errors.read_text()}"
        finally:
            server.terminate()
