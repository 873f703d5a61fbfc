"""A Ray actor around one rank of a worker: gives it its host's addresses, then leaves it alone.

Brings torch in only when it is made, so that drivers and replicas can name the class for free.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import psutil
import ray

from deploy.actors.kv_nodes import KVNodeSettings, describe, kv_node_on
from deploy.host import free_port
from kvstore.network.addresses import join_host_port
from workers.config import WorkerSpec, resolve_model

if TYPE_CHECKING:
    from workers.runtime.rank import Rank


class RankActor:
    """One rank. Calls come from the replica: `connect` on all ranks at once, then `serve` on all."""

    def __init__(self, spec: WorkerSpec, kv_nodes: KVNodeSettings, rank: int) -> None:
        """Does nothing that may fail: of an error here, Ray would pass on the text and not the type."""
        self._name = f"{spec.worker_id} rank {rank}"
        self._spec, self._kv_nodes, self._number = spec, kv_nodes, rank

    def _make_rank(self) -> Rank:
        spec, kv_nodes = self._spec, self._kv_nodes
        node = ray.get(describe(kv_node_on(ray.get_runtime_context().get_node_id(), kv_nodes)))
        engine = dataclasses.replace(spec.engine, model_dir=str(resolve_model(spec.engine.model_dir)))
        if draft := engine.speculative.model:
            speculative = dataclasses.replace(engine.speculative, model=str(resolve_model(draft)))
            engine = dataclasses.replace(engine, speculative=speculative)
        spec = dataclasses.replace(
            spec,
            engine=engine,
            node_id=node.node_id,
            host_address=node.host_address,
            listen_host=ray.util.get_node_ip_address(),
        )
        from workers.runtime.rank import Rank

        return Rank(spec, self._number)

    def __repr__(self) -> str:
        """What logs and the dashboard call it."""
        return self._name

    def rendezvous(self) -> str:
        """Where the ranks meet: on rank 0's host."""
        host = ray.util.get_node_ip_address()
        return f"tcp://{join_host_port(host, free_port(host))}"

    def connect(self, init_method: str) -> None:
        """Join the other ranks and load the shard. Raises ModelError, and StartError when the host has no KV node."""
        self._rank = self._make_rank()
        self._rank.connect(init_method, interface_of(ray.util.get_node_ip_address()))

    def serve(self) -> str:
        """HOST:PORT of the worker on rank 0, "" on the others."""
        return self._rank.serve()

    def metrics(self) -> dict[str, Any]:
        """Load and counters; rank 0 only."""
        return self._rank.metrics()

    def wait_failed(self) -> str:
        """Returns when the shard can no longer serve, and says why."""
        error = self._rank.failure.result()
        return f"{type(error).__name__}: {error}"

    def pid(self) -> int:
        """The process."""
        return os.getpid()

    def host(self) -> str:
        """Ray's name of the host that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def retire(self) -> None:
        """Leave the directory; what is running runs on. Rank 0 only."""
        self._rank.retire()

    def stop(self) -> None:
        """Leave the cluster and close."""
        self._rank.stop()


def interface_of(ip: str) -> str:
    """Name of this host's network interface with an address; "" when none has it.

    gloo asks for a name, and takes what the host's name resolves to when it gets none: often 127.0.0.1.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == ip.partition("%")[0] for address in addresses):
            return str(name)
    return ""
