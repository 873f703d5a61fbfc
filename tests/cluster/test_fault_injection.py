"""Damaged fragments, made by another process, in every tier: none is served, each is counted, and the tokens are right.

The fake engine's tokens depend on every byte of the cache, so a single bad byte that got through would show.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc, worker_pb2

from kvstore.config import CALLS_SUFFIX
from kvstore.connect import open_directory
from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import HEADER_BYTES
from kvstore.names import NAME_BYTES, block_names, root_name
from kvstore.tiers.disk.disk import DiskTier
from kvstore.tiers.host.slot_calls import SlotCalls
from kvstore.tiers.peers.peer_tier import PEER_LOCATION
from kvstore.tiers.redis.redis_tier import KEY_PREFIX, RedisTier
from tests.fake_cluster import VOCAB_SIZE, FakeCluster, expected
from tests.fault_injector import DiskStorage
from tests.forked import SECRET
from tests.kvstore.fragments import make_compressible, sealed_copy
from tests.processes import DEADLINE_S, REPOSITORY, KVNode, RedisServer, python_environment, wait_until
from tests.workers.test_disaggregation import spec_for
from tests.workers.test_disaggregation import worker as real_worker
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from tests.workers.worker_client import WorkerClient
from workers.kv.grid import FragmentGrid

pytestmark = [pytest.mark.cluster]

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
        command = [sys.executable, "-m", "tests.fault_injector", *arguments]
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


def damaged_kv_transfer(
    way: Way, prefill: WorkerClient, decode: WorkerClient, number: int, pick: random.Random
) -> Counter[str]:
    """Prefill, then damage from some block on, then decode: with the right tokens and none of the bad blocks."""
    stream_id = f"s{number}"
    prompt = [pick.randrange(VOCAB_SIZE) for _ in range(way.num_blocks * BLOCK_SIZE - 2)]
    prefill.submit(stream_id, prompt, worker_pb2.REQUEST_ROLE_PREFILL, NUM_TOKENS)
    assert prefill.wait_finished(stream_id).num_published_blocks == way.num_blocks
    blocks = fragment_keys(prefill.hello.kv_fingerprint, prompt, BLOCK_SIZE, GRID)
    way.wait_stored([key for block in blocks for key in block])
    first_bad = pick.choice((0, 0, 0, 1, 5, 12))
    keys = pick.sample(blocks[first_bad], pick.randrange(1, len(blocks[first_bad]) + 1))
    keys += [key for block in blocks[first_bad + 1 :] for key in block]
    pick.shuffle(keys)  # what is swapped comes from anywhere in the prompt
    damaged = way.damage(keys)
    decode.submit(stream_id, prompt, worker_pb2.REQUEST_ROLE_DECODE, NUM_TOKENS)
    decode.continue_stream(stream_id, prefill.tokens[stream_id])
    finished = decode.wait_finished(stream_id)
    assert finished.num_transferred_blocks <= first_bad
    assert finished.num_computed_prompt_tokens == len(prompt) - finished.num_transferred_blocks * BLOCK_SIZE
    assert prefill.tokens.pop(stream_id) + decode.tokens.pop(stream_id) == expected(prompt, NUM_TOKENS)
    return damaged + way.after(keys)


@pytest.mark.redis
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "num_faults",
    [4_000, pytest.param(200_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["some", "a fifth of a million"],
)
def test_no_damaged_fragment_is_served_and_each_is_counted(
    fake_cluster: MakeCluster, redis_server: RedisServer, name: str, num_faults: int
) -> None:
    shape = dict(WAYS[name].shape)
    if name == "redis":
        shape["tier"] = redis_server.url
    cluster = fake_cluster(prefill=1, decode=1, routers=0, sizes=SIZES, num_slots=6144, **shape)
    way = WAYS[name](cluster)
    pick = random.Random(num_faults)
    damaged: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    counted_before: Counter[str] = Counter()
    num_given_up = 0
    with way.injector, ExitStack() as stack:
        addresses = [cluster.workers[worker].ready["address"] for worker in ("prefill-0", "decode-0")]
        prefill, decode = (stack.enter_context(WorkerClient(address)) for address in addresses)
        for number in itertools.count():
            if damaged.total() >= num_faults:
                break
            damaged_now = damaged_kv_transfer(way, prefill, decode, number, pick)
            counted_now = way.counted(decode)
            if way.injector.num_gone:  # it was too slow for a deadline: of the rest, it is unknown what came
                num_given_up += 1
                assert num_given_up <= 3 + number / 2, "a machine too busy to tell anything, or a reader that gives up"
            else:
                damaged += damaged_now
                counted += counted_now - counted_before
            counted_before = counted_now
        assert not prefill.load().num_rejected_fragments
    assert set(damaged) == way.kinds
    assert max(damaged.values()) - min(damaged.values()) < 0.1 * damaged.total() / len(way.kinds), "shares differ"
    assert counted.total() == damaged.total(), f"{damaged} were damaged, {counted} were counted"
    assert set(counted) == way.reasons
    assert decode_transferred(cluster) > 0, "not one good block was used"
    cluster.wait_at_rest()


@pytest.mark.redis
@pytest.mark.parametrize("name", ["disk", "redis"])
@pytest.mark.parametrize(
    "num_faults",
    [1_600, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["some", "many"],
)
def test_no_damaged_compressed_fragment_is_given_back(
    redis_server: RedisServer, tmp_path: Path, name: str, num_faults: int
) -> None:
    """The tiers alone: what the fake engine makes does not shrink."""
    folder, prefix = tmp_path / "disk", KEY_PREFIX + FragmentAuthenticator(SECRET).key_id.encode() + b":"
    if name == "disk":
        disk = DiskTier(folder, 64 << 20, 16384, SECRET, time.monotonic, compression="zstd")
        wait_until(lambda: disk.is_up, "the disk tier is up")
        arguments = ("--disk", str(folder))
    else:
        tier = RedisTier(redis_server.url, SECRET, compression="zstd")
        arguments = ("--redis", redis_server.url, "--key-prefix", prefix.hex())
    damaged: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    with FaultInjector(*arguments) as injector:
        while damaged.total() < num_faults:
            fragments = make_compressible(500, 16_000)
            bad, good = fragments[:400], fragments[400:]
            keys = [fragment.key for fragment in fragments]
            if name == "disk":
                assert disk.write([sealed_copy(fragment) for fragment in fragments]) == 500
            else:
                assert tier.store(fragments) == [True] * 500
            damaged += injector.damage([fragment.key for fragment in bad])
            got = [disk.read(key) for key in keys] if name == "disk" else list(tier.load(keys))
            counted += Counter(found.reason for found in got[:400] if isinstance(found, Rejected))
            payloads = [found[HEADER_BYTES:] if name == "disk" else found for found in got[400:]]  # type: ignore[index]
            assert payloads == [fragment.payload for fragment in good]
            assert (disk.read(bad[0].key) if name == "disk" else next(tier.load([bad[0].key]))) is None  # and dropped
    (disk if name == "disk" else tier).close()
    assert set(damaged) == KINDS | {"forgery"}
    assert counted.total() == damaged.total(), f"{damaged} were damaged, {counted} were counted"
    assert set(counted) == REASONS


def decode_transferred(cluster: FakeCluster) -> int:
    """Blocks that verified and were used."""
    return int(cluster.load("decode-0").num_transferred_blocks)


def test_streams_are_right_while_the_arena_is_being_damaged(fake_cluster: MakeCluster) -> None:
    """Through routers, the damage at any moment: while a fragment is written, waits, or is read."""
    num_streams, num_rounds = 8, 6
    cluster = fake_cluster(sizes=SIZES, num_slots=4096, step_s=0.001, engine={"max_num_batched_tokens": 32})
    with WorkerClient(cluster.workers["decode-0"].ready["address"]) as worker:
        fingerprint = worker.hello.kv_fingerprint
    clients = [cluster.client(number % 2) for number in range(num_streams)]
    pick = random.Random(1)
    damaged: Counter[str] = Counter()
    with ThreadPoolExecutor(num_streams) as threads, FaultInjector.of_arena(cluster.node) as injector:
        for _ in range(num_rounds):
            prompts = [[pick.randrange(VOCAB_SIZE) for _ in range(100)] for _ in clients]
            keys = [
                key
                for prompt in prompts
                for block in fragment_keys(fingerprint, prompt, BLOCK_SIZE, GRID)
                for key in block
            ]
            answers = [threads.submit(cluster.ask, c, p, 24) for c, p in zip(clients, prompts, strict=True)]
            while not all(answer.done() for answer in answers):
                damaged += injector.damage(pick.sample(keys, 200))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.result().ids == expected(prompt, 24)
    counted = sum((Counter(dict(cluster.load(name).num_rejected_fragments)) for name in cluster.workers), Counter())
    assert damaged.total() > 1000
    assert counted.total() > 0
    cluster.wait_at_rest()


def test_the_real_engine_takes_no_damaged_fragment_either(tmp_path: Path, shared_kv_node: KVNode) -> None:
    """Prefill on one rank, decode on two; a rank counts what it refused itself, so rank 0 has half of it."""
    num_blocks, num_layers, num_prompts = 6, 3, 8
    checkpoint = make_checkpoint("gqa", tmp_path)
    grid, mine = FragmentGrid(range(num_layers), 1, 0, 2), FragmentGrid(range(num_layers), 1, 0, 1)
    pick = random.Random(2)
    prompts = [[pick.randrange(97) for _ in range(16 * num_blocks - 1)] for _ in range(num_prompts)]
    specs = [spec_for(checkpoint, "prefill", shared_kv_node), spec_for(checkpoint, "decode", shared_kv_node, tp=2)]
    damaged_of_mine = 0
    with ExitStack() as stack:
        prefill, decode = (stack.enter_context(real_worker(spec)) for spec in specs)
        injector = stack.enter_context(FaultInjector.of_arena(shared_kv_node))
        right = [generate_with_transformers(checkpoint, prompt, 8) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            stream_id = f"s{number}"
            prefill.submit(stream_id, prompt, worker_pb2.REQUEST_ROLE_PREFILL)
            prefill.wait_finished(stream_id)
            blocks = fragment_keys(prefill.hello.kv_fingerprint, prompt, 16, grid)
            first_bad = number % num_blocks
            bad = [key for block in blocks[first_bad:] for key in block]
            assert injector.damage(bad).total() == len(bad)
            damaged_of_mine += sum(key in bad for block in blocks for key in mine.keys(block[0][:NAME_BYTES]))
            decode.submit(stream_id, prompt, worker_pb2.REQUEST_ROLE_DECODE)
            decode.continue_stream(stream_id, prefill.tokens[stream_id])
            assert decode.wait_finished(stream_id).num_transferred_blocks == first_bad
            assert prefill.tokens[stream_id] + decode.tokens[stream_id] == right[number]
        assert sum(decode.load().num_rejected_fragments.values()) == damaged_of_mine > 50
