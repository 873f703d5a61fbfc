"""Damaged fragments, made by another process, in every tier: none is served, each is counted, and the tokens are right.

The fake engine's tokens depend on every byte of the cache, so a single bad byte that got through would show.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import HEADER_BYTES
from kvstore.names import NAME_BYTES
from kvstore.tiers.disk.disk import DiskTier
from kvstore.tiers.redis.redis_tier import KEY_PREFIX, RedisTier
from tests.cluster.faults.ways import (
    BLOCK_SIZE,
    GRID,
    KINDS,
    NUM_TOKENS,
    REASONS,
    SIZES,
    WAYS,
    FaultInjector,
    MakeCluster,
    Way,
    fragment_keys,
)
from tests.fake_cluster import FakeCluster
from tests.fake_model import VOCAB_SIZE, expected
from tests.forked import SECRET
from tests.kvstore.fragments import make_compressible, sealed_copy
from tests.processes import KVNode, RedisServer, wait_until
from tests.workers.forked_worker import spec_for
from tests.workers.forked_worker import worker as real_worker
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from tests.workers.worker_client import WorkerClient
from workers.kv.grid import FragmentGrid

pytestmark = [pytest.mark.cluster]


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
