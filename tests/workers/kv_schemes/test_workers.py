"""Real workers with each way to keep keys and values: hand-off, swaps, and what must not be used. Bit for bit.

The fast suite has a scheme whose blocks have two tensors, and one with two packed forms behind the exact one; the
others meet the same faults in the slow one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from kvstore.config import KV_CACHE_DTYPES, KVStoreConfig
from kvstore.format.sealing import HEADER_BYTES
from kvstore.names import NAME_BYTES
from tests.cluster.faults.storages import ArenaStorage
from tests.cluster.faults.ways import FaultInjector, fragment_keys
from tests.processes import KVNode
from tests.workers.forked_worker import ALWAYS, prompt, start, worker
from tests.workers.kv_schemes.scheme_workers import BLOCK_SIZE, SchemeWorkers, mixed, scheme_spec
from tests.workers.tiny_llama import make_checkpoint, with_kv_channels
from tests.workers.worker_client import WorkerClient, disaggregate, wait_until

FAST = ("int8", "kivi8_4")
NUM_TOKENS = 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_kv_channels(make_checkpoint("gqa", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in KV_CACHE_DTYPES],
)
def workers(request: pytest.FixtureRequest, checkpoint: Path, shared_kv_node: KVNode) -> Iterator[SchemeWorkers]:
    with ExitStack() as stack:
        yield SchemeWorkers(checkpoint, shared_kv_node, request.param, stack)


@pytest.fixture(scope="module")
def other_node() -> Iterator[KVNode]:
    """For what must not find the blocks of the shared one."""
    node = KVNode(f"other-{uuid.uuid4().hex[:12]}", slot_bytes=64 * 1024, num_slots=512)
    yield node
    node.close()


def test_hand_off_and_prefix_hits_give_the_undisturbed_tokens(workers: SchemeWorkers) -> None:
    prompts = [prompt(length, seed=40) for length in (1, 16, 33, 77)]
    right = workers.undisturbed(prompts, NUM_TOKENS)
    for token_ids, expected in zip(prompts, right, strict=True):
        tokens, prefilled, decoded = disaggregate(workers.prefill, workers.decode, token_ids, NUM_TOKENS)
        assert tokens == expected
        assert decoded.num_computed_prompt_tokens == 0
        assert decoded.num_transferred_blocks == -(-len(token_ids) // BLOCK_SIZE)
    again, prefilled, _ = disaggregate(workers.prefill, workers.decode, prompts[-1], NUM_TOKENS)
    assert again == right[-1]
    assert prefilled.num_cached_prompt_tokens == 64


@pytest.mark.parametrize("fetch", ["always", "never"])
def test_swapped_requests_give_the_undisturbed_tokens_and_blocks(workers: SchemeWorkers, other_node, fetch) -> None:
    """What is published under a name has the same bytes whatever happened before: in chunks of another length, beside
    another request, swapped out and in, by decode steps rather than by a prefill. A scheme whose blocks depend on
    history would differ here, and must not publish any."""
    prompts = [prompt(60, seed=50), prompt(61, seed=51)]
    right = workers.undisturbed(prompts, 50)
    spec = scheme_spec(
        workers.checkpoint, "mixed", other_node, workers.kv_cache_dtype, num_blocks=9, chunk=7,
        kvstore=KVStoreConfig(prefix_fetch=fetch),
    )  # fmt: skip
    with worker(replace(spec, worker_id=f"swaps-{fetch}")) as client:
        for i, token_ids in enumerate(prompts):
            client.submit(f"r{i}", token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=50)
        for i in range(2):
            client.wait_finished(f"r{i}")
        assert [client.tokens[f"r{i}"] for i in range(2)] == right
        load = client.load()
    assert load.num_preemptions > 0
    assert (load.num_swaps > 0) == (fetch == "always")
    for i, (token_ids, tokens) in enumerate(zip(prompts, right, strict=True)):
        whole = [*token_ids, *tokens]
        whole = whole[: len(whole) // BLOCK_SIZE * BLOCK_SIZE]
        workers.prefill.submit(f"{fetch}{i}", whole, worker_pb2.REQUEST_ROLE_PREFILL)
        workers.prefill.wait_finished(f"{fetch}{i}")
        assert num_equal_fragments(workers, whole, other_node) >= 3 * 2 * len(workers.grids())


def num_equal_fragments(workers: SchemeWorkers, token_ids: Sequence[int], other_node: KVNode) -> int:
    """Of a prompt, that both nodes have."""
    found = 0
    arenas = []
    for node in (workers.node, other_node):
        arena = ArenaStorage(node.arena, node.slot_bytes, node.num_slots)
        arena.find()
        arenas.append(arena)
    for grid in workers.grids():
        for block in fragment_keys(workers.prefill.hello.kv_fingerprint, token_ids, BLOCK_SIZE, grid):
            for key in block:
                one, other = (arena.read(key) for arena in arenas)
                if one is not None and other is not None:
                    assert one[HEADER_BYTES:] == other[HEADER_BYTES:]
                    found += 1
    return found


def test_damaged_blocks_are_computed_again(workers: SchemeWorkers) -> None:
    """Damaged and stale ones: the kinds that tests.cluster.faults.injector knows, in turn. Of each form of blocks."""
    prompts = [prompt(95, seed=60 + i) for i in range(6)]
    grid, *nearer = workers.grids()
    right = workers.undisturbed(prompts, 8)
    before, num_damaged = num_rejected(workers.decode), 0
    with FaultInjector.of_arena(workers.node) as injector:
        for first_bad, (token_ids, expected) in enumerate(zip(prompts, right, strict=True)):
            blocks = published(workers, f"bad{first_bad}", token_ids, grid)
            bad = [key for block in blocks[first_bad:] for key in block]
            assert all(key[:NAME_BYTES] == block[0][:NAME_BYTES] for block in blocks for key in block)
            assert injector.damage(bad).total() == len(bad)
            num_damaged += len(bad)
            finished, tokens = decoded(workers, f"bad{first_bad}", token_ids)
            assert (finished.num_transferred_blocks, tokens) == (first_bad, expected)
        assert num_rejected(workers.decode) - before == num_damaged
        for level, form in enumerate(nearer):
            token_ids = prompt(95, seed=70 + level)
            (expected,) = workers.undisturbed([token_ids], 8)
            blocks = published(workers, f"form{level}", token_ids, form)
            assert injector.damage([key for block in blocks for key in block]).total() > 0
            before = num_rejected(workers.decode)
            finished, tokens = decoded(workers, f"form{level}", token_ids)
            assert tokens == expected
            assert finished.num_computed_prompt_tokens > 0
            assert num_rejected(workers.decode) > before


def num_rejected(client: WorkerClient) -> int:
    return sum(client.load().num_rejected_fragments.values())


def published(workers: SchemeWorkers, stream_id: str, token_ids: list[int], grid) -> list[list[bytes]]:
    """Keys of a prompt's fragments, which are in the node now, in one form."""
    workers.prefill.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_PREFILL)
    workers.prefill.wait_finished(stream_id)
    return fragment_keys(workers.prefill.hello.kv_fingerprint, token_ids, BLOCK_SIZE, grid)


def decoded(
    workers: SchemeWorkers, stream_id: str, token_ids: list[int]
) -> tuple[worker_pb2.RequestFinished, list[int]]:
    """How a stream that was prefilled before ends at the decode worker, and its tokens."""
    workers.decode.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_DECODE)
    workers.decode.continue_stream(stream_id, workers.prefill.tokens[stream_id])
    finished = workers.decode.wait_finished(stream_id)
    return finished, workers.prefill.tokens[stream_id] + workers.decode.tokens[stream_id]


@pytest.fixture(scope="module")
def exact_and_int8(checkpoint: Path, shared_kv_node: KVNode) -> Iterator[dict[str, SchemeWorkers]]:
    """Those that have other blocks."""
    with ExitStack() as stack:
        yield {name: SchemeWorkers(checkpoint, shared_kv_node, name, stack) for name in ("auto", "int8")}


def test_blocks_of_other_schemes_are_not_used(workers: SchemeWorkers, exact_and_int8) -> None:
    """Neither an exact worker takes any, nor this one an exact worker's; an exact one meets those of int8."""
    other = exact_and_int8["int8" if workers.kv_cache_dtype == "auto" else "auto"]
    first = 100 + 2 * KV_CACHE_DTYPES.index(workers.kv_cache_dtype)  # blocks of other tests stay in the node
    for seed, writing, reading in ((first, workers, other), (first + 1, other, workers)):
        token_ids = prompt(77, seed=seed)
        (right,) = reading.undisturbed([token_ids], 8)
        assert writing.mixed.hello.kv_fingerprint != reading.mixed.hello.kv_fingerprint
        before = reading.mixed.load().num_transferred_blocks
        mixed(writing.mixed, f"w{seed}", token_ids, 8)
        assert mixed(reading.mixed, f"r{seed}", token_ids, 8) == right
        assert reading.mixed.load().num_transferred_blocks == before


def test_late_blocks_are_not_waited_for(workers: SchemeWorkers) -> None:
    """Prefill says that it is through before the tiers have anything: what comes later is not used."""
    token_ids = prompt(77, seed=80)
    (right,) = workers.undisturbed([token_ids], 8)
    workers.decode.submit("late", token_ids, worker_pb2.REQUEST_ROLE_DECODE)
    workers.decode.continue_stream("late", [])
    workers.prefill.submit("late", token_ids, worker_pb2.REQUEST_ROLE_PREFILL)
    workers.decode.wait_finished("late")
    assert workers.decode.tokens["late"] == right


def is_published(workers: SchemeWorkers, client: WorkerClient, token_ids: list[int]) -> bool:
    """Whether the node has the last block of these in all forms but the first tokens'."""
    arena = ArenaStorage(workers.node.arena, workers.node.slot_bytes, workers.node.num_slots)
    arena.find()
    fingerprint = client.hello.kv_fingerprint
    blocks = [fragment_keys(fingerprint, token_ids, BLOCK_SIZE, grid)[-1] for grid in workers.grids(has_sinks=False)]
    return all(arena.read(key) is not None for block in blocks for key in block)


def test_a_stream_goes_on_elsewhere_when_its_worker_is_killed(workers: SchemeWorkers, tmp_path: Path) -> None:
    """As a router places it again: with what was sent as the prompt, on a worker that finds the blocks in the tier."""
    token_ids = prompt(40, seed=90)
    (right,) = workers.undisturbed([token_ids], 60)
    other = workers.mixed
    spec = replace(workers.spec("mixed", kvstore=ALWAYS), worker_id=f"dying-{workers.kv_cache_dtype}")
    server = start(spec, tmp_path)
    with WorkerClient(server.ready["address"]) as dying:
        dying.submit("s", token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=60, window_tokens=30)
        wait_until(lambda: len(dying.tokens["s"]) >= 30)
        wait_until(lambda: is_published(workers, other, [*token_ids, *dying.tokens["s"]][: 3 * BLOCK_SIZE]))
        server.kill()
        sent = dying.tokens["s"]
    other.submit("s", token_ids + sent, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=60, num_prompt_tokens=len(token_ids))
    finished = other.wait_finished("s")
    assert sent + other.tokens["s"] == right
    assert finished.num_transferred_blocks >= 3
