"""One KV node process per host, each watched over by a named Ray actor on that host.

Whoever needs the node of its host asks for it here; the first one to ask makes it. It outlives the workers: only
`stop_kv_nodes` ends it. Knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc

from deploy.actors.metrics import RayMetrics
from deploy.config import child_environment
from deploy.host import check_folder
from deploy.plan import ArenaPlan
from deploy.processes.leftovers import end_predecessor, hold_folder, leave_folder, record_arena, remove_leftovers
from deploy.processes.supervise import Ready, SupervisedProcess
from kvstore.config import KVStoreConfig, NodeSpec
from kvstore.network.addresses import join_host_port
from kvstore.network.channels import NODE_ERRORS, call, dial
from kvstore.tiers.host.arena import num_slots_for
from settings.loading import write
from telemetry import node as declared

_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_REPORT_S = 0.5
_FOLDER_SHARE = 0.8  # of what is free in the arena's folder
_MEMORY_SHARE = 0.5  # of the memory that can be had: the folder counts as its own what the workers need
_FIRST_ATTEMPTS = 6  # the port for control was free when it was chosen; another process may hold it for a moment


@dataclass(frozen=True, slots=True)
class KVNodeSettings:
    """What the KV nodes of a cluster have in common."""

    cluster_id: str
    """Of this start."""
    cluster: str
    """Name of the cluster."""
    run_dir: str
    """Folder for sockets and logs, the same path on every host."""
    arena: ArenaPlan
    control_node_id: str
    """Ray node whose KV node holds leases and directory; "" when Redis does."""
    control_address: str
    """HOST:PORT for them; fixed beforehand so that a restarted process is found again."""
    kvstore: KVStoreConfig
    """The branch of the configuration."""
    secret: str = field(default="", repr=False)
    """Of what leaves a host's memory."""

    @property
    def namespace(self) -> str:
        """Ray namespace of the actors."""
        return _namespace(self.cluster_id)


@dataclass(frozen=True, slots=True)
class KVNode:
    """A host's KV node, ready."""

    node_id: str
    """Its name in the directory."""
    host_address: str
    """Where workers of the host reach it."""
    pid: int
    """Its process now."""
    num_slots: int
    """Slots of its arena: fewer than wanted where the arena's folder has no space for more."""


def _namespace(cluster_id: str) -> str:
    return f"switchyard-{cluster_id}"


def short_node_id(ray_node_id: str) -> str:
    """A host's name in the directory."""
    return ray_node_id[:12]


def slots_that_fit(arena: ArenaPlan) -> int:
    """Slots that folder and memory have space for, with some left: containers often get just 64 MiB of /dev/shm, and
    elsewhere it may be as large as the memory that all processes share. A container's own bound is its folder's."""
    in_folder = shutil.disk_usage(arena.folder).free * _FOLDER_SHARE
    in_memory = psutil.virtual_memory().available * _MEMORY_SHARE
    return num_slots_for(int(min(in_folder, in_memory)), arena.slot_bytes)


class KVNodeActor:
    """Runs the node process of the host that it is on."""

    def __init__(self, settings: KVNodeSettings) -> None:
        ray_node_id = ray.get_runtime_context().get_node_id()
        self._node_id = short_node_id(ray_node_id)
        run_dir = Path(settings.run_dir)
        remove_leftovers(run_dir.parent)
        hold_folder(run_dir)  # for as long as this process lives
        arena = Path(settings.arena.folder) / f"switchyard-{settings.cluster_id}-{self._node_id}"
        check_folder("kvstore.arena_dir", settings.arena.folder)
        record_arena(run_dir, self._node_id, arena)
        end_predecessor(arena)  # before looking how much space there is
        self._num_slots = min(settings.arena.num_slots, slots_that_fit(settings.arena))
        spec = node_spec(settings, self._node_id, arena, self._num_slots)
        if ray_node_id == settings.control_node_id:
            spec = dataclasses.replace(spec, control_address=settings.control_address)
        if settings.kvstore.peers:
            spec = dataclasses.replace(spec, peer_address=join_host_port(ray.util.get_node_ip_address(), 0))
        self._spec_file = run_dir / f"kv-{self._node_id}.json"
        write(self._spec_file, spec)

        def next_command(_: Ready | None) -> list[str]:
            return [sys.executable, "-P", "-m", "kvstore.node", "--spec", str(self._spec_file)]

        self._host_address = spec.host_address
        self._log = run_dir / f"kv-{self._node_id}.log"
        # A cluster that is being started fails with this error; a running cluster goes on.
        is_restarted = ray.get_runtime_context().was_current_actor_reconstructed
        attempts = sys.maxsize if is_restarted else _FIRST_ATTEMPTS
        self._process = SupervisedProcess("KV node", next_command, child_environment(), self._log, attempts)
        self._process.start()
        self._stopping = threading.Event()
        threading.Thread(target=self._report, args=(settings.cluster,), name="report", daemon=True).start()

    def describe(self) -> KVNode:
        """The node, once it is ready. Raises StartError."""
        self._process.wait_ready(_READY_TIMEOUT_S)
        return KVNode(self._node_id, self._host_address, self._process.pid or 0, self._num_slots)

    def _report(self, cluster: str) -> None:
        labels = dict(zip(declared.LABELS, (self._node_id,), strict=True))
        arena, disk = RayMetrics(declared.ARENA, labels), RayMetrics(declared.DISK, labels)
        with dial(self._host_address) as channel:
            get_stats = kvnode_pb2_grpc.KVNodeServiceStub(channel).GetStats
            while not self._stopping.wait(_REPORT_S):
                with contextlib.suppress(*NODE_ERRORS):  # it is starting, or was lost: its process is watched elsewhere
                    show_stats(arena, disk, call(get_stats, kvnode_pb2.GetStatsRequest(), cluster))

    def stop(self, keep_logs: bool) -> None:
        """End the process; it removes its files, and this the folder when nothing else is in it."""
        self._stopping.set()
        self._process.stop()
        self._spec_file.unlink(missing_ok=True)
        if not keep_logs:
            self._log.unlink(missing_ok=True)
            leave_folder(self._log.parent, self._node_id)


def show_stats(metrics: RayMetrics, disk_metrics: RayMetrics, stats: kvnode_pb2.GetStatsResponse) -> None:
    """Export a node's counters; those of a disk tier where it has one."""
    metrics.report(stats)
    if stats.HasField("disk"):
        disk_metrics.report(stats.disk)


def node_spec(settings: KVNodeSettings, node_id: str, arena: Path, num_slots: int) -> NodeSpec:
    """The spec of a host's node process, without directory and peers. It has the secret only if it needs it."""
    return NodeSpec(
        node_id,
        arena,
        settings.arena.slot_bytes,
        num_slots,
        host_address=f"unix:{settings.run_dir}/kv-{node_id}.sock",
        kvstore=settings.kvstore,
        secret=settings.secret if settings.kvstore.disk_bytes or settings.kvstore.peers else "",
        cluster=settings.cluster,
    )


def kv_node_on(ray_node_id: str, settings: KVNodeSettings) -> Any:
    """Handle of the KVNodeActor of a host, made if there is none."""
    return (
        ray.remote(KVNodeActor)
        .options(
            name=f"kv-node-{short_node_id(ray_node_id)}",
            namespace=settings.namespace,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=8,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=ray_node_id, soft=False),
        )
        .remote(settings)
    )


def describe(actor: Any) -> Any:
    """Reference to a KV node's KVNode, which survives a restart of its actor."""
    return actor.describe.options(max_task_retries=-1).remote()


def has_kv_nodes(cluster_id: str) -> bool:
    """Whether this Ray runs KV nodes of a cluster."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    return any(entry["namespace"] == _namespace(cluster_id) for entry in listed)


def stop_kv_nodes(cluster_id: str, keep_logs: bool) -> None:
    """End the KV nodes of all hosts of a cluster."""
    namespace = _namespace(cluster_id)
    listed = ray.util.list_named_actors(all_namespaces=True)
    names = [entry["name"] for entry in listed if entry["namespace"] == namespace]
    actors = [ray.get_actor(name, namespace=namespace) for name in names]
    if actors:
        ray.wait([actor.stop.remote(keep_logs) for actor in actors], num_returns=len(actors), timeout=_STOP_TIMEOUT_S)
    for actor in actors:
        ray.kill(actor)
