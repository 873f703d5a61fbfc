"""Damaged fragments, made by another process, in every tier: none is served, each is counted, and the tokens are right.

The fake engine's tokens depend on every byte of the cache, so a single bad byte that got through would show.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from kvstore.authenticity import FragmentAuthenticator
from kvstore.names import NAME_BYTES, block_names, root_name
from kvstore.redis_tier import KEY_PREFIX
from tests.fake_cluster import VOCAB_SIZE, FakeCluster, expected
from tests.processes import DEADLINE_S, REPOSITORY, KVNode, RedisServer, python_environment
from tests.workers.test_disaggregation import spec_for
from tests.workers.test_disaggregation import worker as real_worker
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from tests.workers.worker_client import WorkerClient
from workers.kv_transfer import FragmentGrid

pytestmark = [pytest.mark.cluster]

MakeCluster = Callable[..., FakeCluster]
SECRET = "of the tests"
LAYERS, HEADS, BLOCK_SIZE = 8, 4, 4
GRID = FragmentGrid(0, LAYERS, 1, 0, HEADS)
SIZES = {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "num_attention_heads": HEADS}
PROMPT_TOKENS, NUM_TOKENS = 254, 3  # 64 blocks, the last one short: as many as one step pulls
NUM_BLOCKS = -(-PROMPT_TOKENS // BLOCK_SIZE)
KINDS = {"flip", "swap", "stale", "truncation", "layout"}
REASONS = {"host": {"checksum", "stale", "layout"}, "redis": {"checksum", "stale", "truncated", "layout", "forged"}}


class FaultInjector:
    """The process that does the damage; a context manager."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.fault_injector", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_environment(), cwd=REPOSITORY
        )
        self._answer()

    @classmethod
    def of_arena(cls, node: KVNode) -> FaultInjector:
        """Of a host's shared memory."""
        shape = ("--slot-bytes", str(node.slot_bytes), "--num-slots", str(node.num_slots))
        return cls("--arena", str(node.arena), *shape)

    @classmethod
    def of_redis(cls, url: str) -> FaultInjector:
        """Of the shared tier."""
        prefix = KEY_PREFIX + FragmentAuthenticator(SECRET).key_id.encode() + b":"
        return cls("--redis", url, "--key-prefix", prefix.hex())

    def damage(self, keys: Sequence[bytes]) -> Counter[str]:
        """How many fragments of these have which kind of fault now."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"keys": [key.hex() for key in keys]}) + "\n")
        self._process.stdin.flush()
        return Counter(self._answer()["damaged"])

    def _answer(self) -> dict[str, dict[str, int]]:
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


@contextmanager
def pair(cluster: FakeCluster) -> Iterator[tuple[WorkerClient, WorkerClient]]:
    """Connections to the prefill and the decode worker of a cluster without routers."""
    with ExitStack() as stack:
        addresses = [cluster.workers[name].ready["address"] for name in ("prefill-0", "decode-0")]
        prefill, decode = (stack.enter_context(WorkerClient(address)) for address in addresses)
        yield prefill, decode


def fragment_keys(fingerprint: bytes, prompt: Sequence[int], block_size: int, grid: FragmentGrid) -> list[list[bytes]]:
    """Keys of a prompt's fragments, block by block."""
    names = block_names(root_name(fingerprint, b""), prompt, block_size, with_tail=True)
    return [grid.keys(name) for name in names]


def damaged_hand_off(
    prefill: WorkerClient, decode: WorkerClient, injector: FaultInjector, prompt: list[int], pick: random.Random
) -> Counter[str]:
    """Prefill, then damage from some block on, then decode: with the right tokens and none of the bad blocks."""
    stream_id = f"s{prompt[:6]}"
    prefill.submit(stream_id, prompt, worker_pb2.REQUEST_ROLE_PREFILL, NUM_TOKENS)
    assert prefill.wait_finished(stream_id).num_published_blocks == NUM_BLOCKS
    blocks = fragment_keys(prefill.hello.kv_fingerprint, prompt, BLOCK_SIZE, GRID)
    first_bad = pick.choice((0, 0, 0, 1, 5, 20))
    some = pick.sample(blocks[first_bad], pick.randrange(1, len(blocks[first_bad]) + 1))
    rest = [key for block in blocks[first_bad + 1 :] for key in block]
    pick.shuffle(rest)  # what is swapped comes from anywhere in the prompt
    damaged = injector.damage([*some, *rest])
    assert damaged.total() == len(some) + len(rest)
    decode.submit(stream_id, prompt, worker_pb2.REQUEST_ROLE_DECODE, NUM_TOKENS)
    decode.continue_stream(stream_id, prefill.tokens[stream_id])
    finished = decode.wait_finished(stream_id)
    assert finished.num_transferred_blocks == first_bad
    assert finished.num_computed_prompt_tokens == PROMPT_TOKENS - first_bad * BLOCK_SIZE
    assert prefill.tokens.pop(stream_id) + decode.tokens.pop(stream_id) == expected(prompt, NUM_TOKENS)
    return damaged


def bombard(cluster: FakeCluster, injector: FaultInjector, num_faults: int) -> tuple[Counter[str], Counter[str]]:
    """At least so many faults; how many of which kind, and how many the decode worker counted for which reason."""
    pick = random.Random(num_faults)
    damaged: Counter[str] = Counter()
    with pair(cluster) as (prefill, decode):
        while damaged.total() < num_faults:
            prompt = [pick.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
            damaged += damaged_hand_off(prefill, decode, injector, prompt, pick)
        counted = Counter(dict(decode.load().num_rejected_fragments))
        assert not prefill.load().num_rejected_fragments
    return damaged, counted


@pytest.mark.redis
@pytest.mark.parametrize("tier", ["host", "redis"])
@pytest.mark.parametrize(
    "num_faults",
    [10_000, pytest.param(500_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["some", "half a million"],
)
def test_no_damaged_fragment_is_served_and_each_is_counted(
    fake_cluster: MakeCluster, redis_server: RedisServer, tier: str, num_faults: int
) -> None:
    options = {} if tier == "host" else {"tier": redis_server.url, "uses_arena": False}
    cluster = fake_cluster(prefill=1, decode=1, routers=0, sizes=SIZES, num_slots=6144, **options)
    injector = FaultInjector.of_arena(cluster.node) if tier == "host" else FaultInjector.of_redis(redis_server.url)
    with injector:
        damaged, counted = bombard(cluster, injector, num_faults)
    assert damaged.total() >= num_faults
    assert set(damaged) == (KINDS if tier == "host" else KINDS | {"forgery"})
    assert max(damaged.values()) - min(damaged.values()) < 0.05 * damaged.total(), "the shares are not equal"
    assert counted.total() == damaged.total(), f"{damaged} were damaged, {counted} were counted"
    assert set(counted) == REASONS[tier]
    cluster.wait_at_rest()


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
    num_blocks, num_layers, num_prompts = 6, 3, 12
    checkpoint = make_checkpoint("gqa", tmp_path)
    grid, mine = FragmentGrid(0, num_layers, 1, 0, 2), FragmentGrid(0, num_layers, 1, 0, 1)
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
        assert sum(decode.load().num_rejected_fragments.values()) == damaged_of_mine > 100
