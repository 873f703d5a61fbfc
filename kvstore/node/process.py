"""The KV node process of one host: `python -m kvstore.node --spec FILE`. FILE is the JSON or YAML of config.NodeSpec.

Owns the shared-memory arena and the disk tier behind it, and serves slots to the workers of this host; serves bytes to
other hosts when it has a peer_address, and the cluster's directory when it has a control_address. Prints one JSON line
when it is ready and stays up until SIGTERM, then removes its files, those on disk apart.
Knows nothing of engines, routers or who started it.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from switchyard.v1 import kvnode_pb2_grpc

from kvstore.config import CALLS_SUFFIX, NodeSpec
from kvstore.control.directory import MemoryDirectory
from kvstore.network.addresses import with_port
from kvstore.network.quick_calls import UNIX, CallServer
from kvstore.node.node_service import ClusterGuard, ControlServicer, KVNodeServicer
from kvstore.node.node_slots import NodeSlots
from kvstore.node.peer_server import PeerServer
from kvstore.node.slot_service import SlotService
from kvstore.tiers.disk.disk import DiskTier
from kvstore.tiers.host.arena import Arena, ArenaInUse, create_arena
from kvstore.tiers.host.slot_table import SlotTable
from kvstore.tiers.peers.transport import ReadableMemory
from settings.loading import SettingsError, load

_NUM_THREADS = 8
_LOOK_S = 0.5
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second process binds the same port, and calls go to either
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
)


class StartError(Exception):
    """The node cannot start; the message is one line for the operator."""


def run(spec: NodeSpec, stop: threading.Event, announce: Callable[[dict[str, object]], None]) -> None:
    """Serves until `stop` is set. Raises StartError."""
    try:
        owned = create_arena(spec.arena, spec.node_id, spec.slot_bytes, spec.num_slots)
    except (ArenaInUse, OSError) as error:
        raise StartError(f"arena {spec.arena}: {error}") from error
    with contextlib.ExitStack() as ending:
        ending.callback(owned.remove)
        slots = _open_slots(spec, owned.arena)
        ending.callback(slots.close)
        peer_address = ""
        if spec.peer_address:
            memory = _register_arena(owned.arena) if spec.kvstore.peer_transport == "nixl" else None
            if memory is not None:
                ending.callback(memory.close)
            peers = _serve_peers(spec, slots, memory)
            ending.callback(peers.close)
            peer_address = peers.address
        host_server, host_address, calls = _serve_slots(spec, slots, peer_address)
        ending.callback(calls.close)
        servers, control_address = [host_server], ""
        if spec.control_address:
            control_server, control_address = _serve_directory(spec)
            servers.append(control_server)
        for server in servers:
            server.start()
        ready = {"host_address": host_address, "control_address": control_address, "peer_address": peer_address}
        announce({**ready, "arena": str(spec.arena), "pid": os.getpid()})
        while not stop.wait(_LOOK_S):
            pass  # a signal that comes just before a wait begins does not end it: its handler runs after the wait
        for stopped in [server.stop(grace=0.5) for server in servers]:
            stopped.wait()
        if host_address.startswith(UNIX):
            Path(host_address.removeprefix(UNIX)).unlink(missing_ok=True)


# First generation and first epoch are wall time: those of two processes that follow each other never overlap.


def _open_slots(spec: NodeSpec, arena: Arena) -> NodeSlots:
    table = SlotTable(spec.num_slots, time.monotonic, first_generation=time.time_ns())
    store, disk = spec.kvstore, None
    if store.disk_bytes:
        try:
            disk = DiskTier(
                Path(store.disk_dir),
                store.disk_bytes,
                spec.slot_bytes,
                spec.secret,
                time.monotonic,
                compression=store.disk_compression,
            )
        except ValueError as error:
            raise StartError(str(error)) from error
    return NodeSlots(arena, table, disk, writes_through=store.disk_write == "through")


def _register_arena(arena: Arena) -> ReadableMemory:
    try:
        from kvstore.tiers.peers.nixl_transport import NixlMemory  # seconds, and a package that most nodes do without

        return NixlMemory(arena)
    except (ImportError, OSError) as error:
        raise StartError(f"kvstore.peer_transport: nixl: {error}") from error


def _serve_peers(spec: NodeSpec, slots: NodeSlots, memory: ReadableMemory | None) -> PeerServer:
    try:
        return PeerServer(spec.peer_address, slots, spec.secret, memory)
    except (OSError, ValueError) as error:
        raise StartError(f"cannot listen on {spec.peer_address}: {error}") from error


def _serve_slots(spec: NodeSpec, slots: NodeSlots, peer_address: str) -> tuple[grpc.Server, str, CallServer]:
    _remove_dead_socket(spec.host_address)
    server, address = _bind(spec.host_address, spec.cluster)
    servicer = KVNodeServicer(slots, spec.node_id, peer_address)
    call_address = address + CALLS_SUFFIX if address.startswith(UNIX) else with_port(address, 0)
    try:
        calls = SlotService(slots).serve(call_address)
    except OSError as error:
        raise StartError(f"cannot listen on {call_address}: {error}") from error
    servicer.call_address = calls.address
    kvnode_pb2_grpc.add_KVNodeServiceServicer_to_server(servicer, server)
    return server, address, calls


def _serve_directory(spec: NodeSpec) -> tuple[grpc.Server, str]:
    server, address = _bind(spec.control_address, spec.cluster)
    directory = MemoryDirectory(time.monotonic, first_epoch=time.time_ns() // 1_000_000)
    kvnode_pb2_grpc.add_ControlServiceServicer_to_server(ControlServicer(directory), server)
    return server, address


def _bind(address: str, cluster: str) -> tuple[grpc.Server, str]:
    """A server that is bound but not started, and its address with the port that it really got."""
    threads = ThreadPoolExecutor(_NUM_THREADS, "kv-node")
    server = grpc.server(threads, interceptors=[ClusterGuard(cluster)], options=_SERVER_OPTIONS)
    try:
        port = server.add_insecure_port(address)
        return server, address if address.startswith(UNIX) else with_port(address, port)
    except (RuntimeError, ValueError) as error:
        raise StartError(f"cannot listen on {address}: in use or not an address of this host") from error


def _remove_dead_socket(address: str) -> None:
    """Unlinks the socket that a killed node left; refuses when a process answers on it."""
    if not address.startswith(UNIX):
        return
    path = Path(address.removeprefix(UNIX))
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise StartError(f"another process listens on {path}")


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 stopped, 1 could not start, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m kvstore.node", description="The KV node process of one host.")
    parser.add_argument("--spec", required=True, help="JSON or YAML file of a NodeSpec")
    try:
        spec = load(NodeSpec, parser.parse_args(arguments).spec)
    except SettingsError as error:
        print(f"kvstore.node: {error}", file=sys.stderr)
        return 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not set() here: a handler runs between any two steps of this thread, which may hold the event's lock.
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    try:
        run(spec, stop, lambda ready: print(json.dumps(ready), flush=True))
    except StartError as error:
        print(f"kvstore.node: {error}", file=sys.stderr)
        return 1
    return 0
