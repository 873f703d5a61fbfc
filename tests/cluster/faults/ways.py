"""How fragments get from prefill to decode, and the process that damages them on each of these ways."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grpc
from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvstore.config import CALLS_SUFFIX
from kvstore.connect import open_directory
from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.names import NAME_BYTES, block_names, root_name
from kvstore.tiers.host.slot_calls import SlotCalls
from kvstore.tiers.peers.peer_tier import PEER_LOCATION
from kvstore.tiers.redis.redis_tier import KEY_PREFIX
from tests.cluster.faults.storages import DiskStorage
from tests.fake_cluster import FakeCluster
from tests.forked import SECRET
from tests.processes import DEADLINE_S, REPOSITORY, KVNode, python_environment, wait_until
from tests.workers.worker_client import WorkerClient
from workers.kv.grid import FragmentGrid

MakeCluster = Callable[..., FakeCluster]
LAYERS, HEADS, BLOCK_SIZE = 8, 4, 4
GRID = FragmentGrid(range(LAYERS), 1, 0, HEADS)
SIZES = {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "num_attention_heads": HEADS}
NUM_TOKENS = 3
NUM_BLOCKS = 64  # the last one short; as many as one step pulls
KINDS = {"flip", "swap", "stale", "truncation", "layout"}
MEMORY_REASONS = {"checksum", "stale", "layout"}  # in memory, what is missing is zeros
REASONS = MEMORY_REASONS | {"truncated", "forged"}


class FaultInjector:
    """The process that does the damage; a context manager."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.cluster.faults.injector", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_environment(), cwd=REPOSITORY
        )
        self.port = self._answer().get("port", 0)
        self.num_gone = 0
        """Readers on the wire that went away between the last two calls of damage(); late ones are of no concern."""

    @classmethod
    def of_arena(cls, node: KVNode) -> FaultInjector:
        """Of a host's shared memory."""
        shape = ("--slot-bytes", str(node.slot_bytes), "--num-slots", str(node.num_slots))
        return cls("--arena", str(node.arena), *shape)

    def damage(self, keys: Sequence[bytes]) -> Counter[str]:
        """How many fragments of these have which kind of fault now."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"keys": [key.hex() for key in keys]}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.num_gone = answer.get("num_gone", 0)
        return Counter(answer["damaged"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fault injector ended"
        return dict(json.loads(line))

    def __enter__(self) -> FaultInjector:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._process.stdout.close()


def fragment_keys(fingerprint: bytes, prompt: Sequence[int], block_size: int, grid: FragmentGrid) -> list[list[bytes]]:
    """Keys of a prompt's fragments, block by block."""
    names = block_names(root_name(fingerprint, b""), prompt, block_size, with_tail=True)
    return [grid.keys(name) for name in names]


class Way:
    """How fragments get from prefill to decode, and what does the damage on it. This one: through a host's memory."""

    shape: ClassVar[dict[str, object]] = {}
    kinds = KINDS
    reasons = MEMORY_REASONS
    num_blocks = NUM_BLOCKS

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.injector = self.make_injector()

    def make_injector(self) -> FaultInjector:
        """The process."""
        return FaultInjector.of_arena(self.cluster.node)

    def wait_stored(self, keys: Sequence[bytes]) -> None:
        """Until the fragments are where they are to be damaged and found."""

    def damage(self, keys: Sequence[bytes]) -> Counter[str]:
        """Have it done; how many have which kind of fault."""
        damaged = self.injector.damage(keys)
        assert damaged.total() == len(keys)
        return damaged

    def after(self, keys: Sequence[bytes]) -> Counter[str]:
        """When they were asked for; what was damaged since."""
        return Counter()

    def counted(self, decode: WorkerClient) -> Counter[str]:
        """How many were refused for which reason, since the start."""
        return Counter(dict(decode.load().num_rejected_fragments))


class RedisWay(Way):
    """Through the shared tier."""

    shape: ClassVar[dict[str, object]] = {"uses_arena": False}
    kinds = KINDS | {"forgery"}
    reasons = REASONS

    def make_injector(self) -> FaultInjector:
        """The process."""
        prefix = KEY_PREFIX + FragmentAuthenticator(SECRET).key_id.encode() + b":"
        return FaultInjector("--redis", self.cluster.shape.tier, "--key-prefix", prefix.hex())


class DiskWay(Way):
    """Through the disk behind a host's memory. The node counts, for it is the one that reads."""

    shape: ClassVar[dict[str, object]] = {"disk_bytes": 64 << 20}
    kinds = KINDS | {"forgery"}
    reasons = REASONS
    num_blocks = 16  # what a lookup reads from the disk it reads within a second, or does without

    def make_injector(self) -> FaultInjector:
        """The process."""
        self._node = kvnode_pb2_grpc.KVNodeServiceStub(grpc.insecure_channel(self.cluster.node.host_address))
        self._calls = SlotCalls(self.cluster.node.host_address + CALLS_SUFFIX)
        self._folder = Path(f"{self.cluster.folder}/disk-0")
        self._num_damaged = 0
        return FaultInjector("--disk", str(self._folder))

    def wait_stored(self, keys: Sequence[bytes]) -> None:
        """On the disk, and no longer in memory."""
        storage = DiskStorage(self._folder)
        wait_until(lambda: storage.find(keys), "the disk has them")
        self._drop(keys)

    def damage(self, keys: Sequence[bytes]) -> Counter[str]:
        """Have it done; how many have which kind of fault."""
        damaged = super().damage(keys)
        self._num_damaged += damaged.total()
        return damaged

    def after(self, keys: Sequence[bytes]) -> Counter[str]:
        """Ask for what the worker's lookup did not wait for."""
        wait_until(lambda: self._has_read(keys), "the node has read all of them")
        return Counter()

    def _has_read(self, keys: Sequence[bytes]) -> bool:
        if sum(self._disk().rejected.values()) >= self._num_damaged:
            return True
        self._drop(keys)  # what the worker computed is in memory again
        self._calls.lookup(kvnode_pb2.LookupRequest(keys=keys))
        return False

    def _drop(self, keys: Sequence[bytes]) -> None:
        found = self._calls.lookup(kvnode_pb2.LookupRequest(keys=keys))
        self._calls.drop(kvnode_pb2.DropRequest(keys=keys, generations=found.generations))

    def _disk(self) -> kvnode_pb2.DiskStats:
        return self._node.GetStats(kvnode_pb2.GetStatsRequest()).disk

    def counted(self, decode: WorkerClient) -> Counter[str]:
        """By the node; the worker never sees them."""
        assert not decode.load().num_rejected_fragments
        return Counter(dict(self._disk().rejected))


class PeerWay(Way):
    """Out of another host's memory."""

    shape: ClassVar[dict[str, object]] = {"hosts": 2, "peers": True}

    def wait_stored(self, keys: Sequence[bytes]) -> None:
        """Announced."""
        names = [key[:NAME_BYTES] for key in keys]
        directory = open_directory(self.cluster.control_url, "")
        wait_until(lambda: all(directory.locate(names)), "the directory knows the blocks")
        directory.close()


class WireWay(PeerWay):
    """On the wire from another host. Prefill announces nothing: the test publishes the proxy as location."""

    shape: ClassVar[dict[str, object]] = {**PeerWay.shape, "silent": ("prefill-0",)}
    reasons = MEMORY_REASONS | {"truncated"}

    def make_injector(self) -> FaultInjector:
        """The proxy."""
        return FaultInjector("--wire", str(self.cluster.node.options["peer_address"]))

    def wait_stored(self, keys: Sequence[bytes]) -> None:
        """Announced, as if it was at the proxy."""
        directory = open_directory(self.cluster.control_url, "")
        names = dict.fromkeys(key[:NAME_BYTES] for key in keys)
        directory.publish(list(names), f"{PEER_LOCATION}127.0.0.1:{self.injector.port}")
        directory.close()

    def damage(self, keys: Sequence[bytes]) -> Counter[str]:
        """Whenever they pass from now on."""
        return self.injector.damage(keys)

    def after(self, keys: Sequence[bytes]) -> Counter[str]:
        """What was done on the wire."""
        return self.injector.damage([])


WAYS = {"host": Way, "redis": RedisWay, "disk": DiskWay, "peer": PeerWay, "wire": WireWay}
