"""A queued request's blocks are brought to its host while it waits, for all ranks: by the counters of real workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from costs.transfer import NEVER_FETCH
from kvstore.config import KVStoreConfig
from kvstore.connect import open_directory
from kvstore.names import block_names, root_name
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.prefetch import Prefetcher
from tests.fake_model import expected, write_fake_model
from tests.forked import Prefork, Server
from tests.kvstore.fragments import SECRET
from tests.processes import KVNode, RedisServer
from tests.workers.engine.fake_runner import make_engine, make_request
from tests.workers.forked_worker import BLOCK_SIZE, prompt, spec_for, worker
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint
from tests.workers.worker_client import WorkerClient, wait_until
from workers.config import EngineConfig, WorkerSpec
from workers.engine.prefetch import QueuePrefetch
from workers.engine.request import RequestRole
from workers.engine.scheduler import Scheduler
from workers.model.registry import load_config

MIXED = worker_pb2.REQUEST_ROLE_MIXED
NUM_BLOCKS = 4  # of the prompt that is prefetched


# --------------------------------------------------------------------------------------------------- which, and when


def pulls(scheduler: Scheduler, max_requests: int = 8, known: frozenset[str] = frozenset()) -> dict[str, int]:
    return {request_id: len(names) for request_id, names in scheduler.queued_pulls(max_requests, known)}


def test_queued_requests_whose_blocks_were_located() -> None:
    engine, _ = make_engine(max_num_seqs=1, num_blocks=32)
    scheduler = engine.scheduler
    engine.submit(make_request("running", 6, max_tokens=8))
    engine.step()
    for name, start in (("located", 10), ("asked", 20), ("nowhere", 30)):
        request = make_request(name, 14, start=start)
        request.awaits_lookup = True
        engine.submit(request)
    assert pulls(scheduler) == {}
    scheduler.kv_available("located", 2)
    scheduler.kv_available("nowhere", 0)
    assert pulls(scheduler) == {"located": 2, "nowhere": 0}
    assert pulls(scheduler, max_requests=0) == {}
    assert pulls(scheduler, known=frozenset({"located", "nowhere"})) == {}
    engine.cancel("running")
    engine.step()
    assert scheduler.requests["located"] not in scheduler.waiting
    assert pulls(scheduler) == {"nowhere": 0}


def test_blocks_that_the_device_has_are_not_among_them() -> None:
    engine, _ = make_engine(max_num_seqs=1, num_blocks=32)
    engine.submit(make_request("before", 8, max_tokens=1, start=10))
    engine.step()
    engine.submit(make_request("running", 6, max_tokens=8))
    engine.step()
    engine.submit(make_request("next", 18, start=10))
    engine.scheduler.kv_available("next", 4)
    ((_, names),) = engine.scheduler.queued_pulls(8, ())
    assert names == engine.scheduler.requests["next"].block_names[2:4]


@pytest.mark.parametrize("role", [RequestRole.MIXED, RequestRole.DECODE])
def test_when_the_device_has_all_of_them_the_request_is_named_once_without_blocks(role: RequestRole) -> None:
    engine, _ = make_engine(max_num_seqs=1, num_blocks=32)
    engine.submit(make_request("before", 8, max_tokens=1, start=10))
    engine.step()
    engine.submit(make_request("running", 6, max_tokens=8))
    engine.step()
    engine.submit(make_request("next", 8, role=role, start=10))
    if role is RequestRole.DECODE:
        engine.continue_request("next", [7])
    engine.scheduler.kv_available("next", 2)
    assert pulls(engine.scheduler) == {"next": 0}
    assert pulls(engine.scheduler, known=frozenset({"next"})) == {}


@pytest.fixture
def prefetcher() -> Iterator[Prefetcher]:
    """Of a host whose node is away: it does nothing but keep what is wanted."""
    host = HostTier("unix:/nonexistent/node.sock")
    prefetcher = Prefetcher(host, (), lambda name: [name * 2])
    yield prefetcher
    prefetcher.close()
    host.close()


def test_the_prefetcher_is_called_once_for_each_request_and_for_its_end(prefetcher: Prefetcher) -> None:
    engine, _ = make_engine(max_num_seqs=1, num_blocks=32)
    scheduler, queue = engine.scheduler, QueuePrefetch(prefetcher)
    engine.submit(make_request("running", 6, max_tokens=8))
    engine.step()
    for name, start in (("admitted", 10), ("cancelled", 20), ("waits", 30)):
        engine.submit(make_request(name, 14, start=start))
        scheduler.kv_available(name, 2)
    queue.note(scheduler)
    jobs = dict(prefetcher._jobs)
    assert list(jobs) == ["admitted", "cancelled", "waits"]
    queue.note(scheduler)
    assert dict(prefetcher._jobs) == jobs
    engine.cancel("cancelled")
    engine.submit(make_request("cancelled", 14, start=40))  # another one of this name
    queue.note(scheduler)
    assert jobs["cancelled"].is_over
    assert list(prefetcher._jobs) == ["admitted", "waits"]
    engine.cancel("running")
    engine.step()
    queue.note(scheduler)
    assert jobs["admitted"].is_over
    assert not jobs["waits"].is_over
    assert list(prefetcher._jobs) == ["waits"]


@pytest.mark.parametrize(("role", "num_names"), [(RequestRole.MIXED, 0), (RequestRole.DECODE, 4)])
def test_what_is_cheaper_to_compute_is_named_once_without_blocks(role: RequestRole, num_names: int) -> None:
    """A decode request computes nothing, and pulls what prefill has published when that is through: the tail too."""
    engine, _ = make_engine(max_num_seqs=1, num_blocks=32, transfer_cost=NEVER_FETCH)
    engine.submit(make_request("running", 6, max_tokens=8))
    engine.step()
    engine.submit(make_request("next", 14, role=role, start=10))
    if role is RequestRole.DECODE:
        assert pulls(engine.scheduler) == {}
        engine.continue_request("next", [7])
    engine.scheduler.kv_available("next", 3)
    assert pulls(engine.scheduler) == {"next": num_names}


# ------------------------------------------------------------------------------------------------------- real workers


Start = Callable[[WorkerSpec], AbstractContextManager[WorkerClient]]


@pytest.fixture(scope="module")
def prefork() -> Iterator[Prefork]:
    process = Prefork()
    yield process
    process.close()


@pytest.fixture
def single_rank(prefork: Prefork, tmp_path: Path) -> Start:
    """Forks a worker of one rank, in less than the time that a new process takes."""

    @contextmanager
    def start(spec: WorkerSpec) -> Iterator[WorkerClient]:
        server = Server(prefork, "worker", spec.worker_id, tmp_path)
        server.start(dataclasses.asdict(spec))
        try:
            with WorkerClient(server.wait_ready()["address"]) as client:
                yield client
        finally:
            server.terminate()

    return start


@contextmanager
def queued_behind(client: WorkerClient, count: int, length: int, max_tokens: int) -> Iterator[None]:
    """Within, requests that end only afterwards hold the one row of the batch."""
    names = [f"before-{i}" for i in range(count)]
    for i, name in enumerate(names):
        client.submit(name, prompt(length, seed=50 + i), MIXED, max_tokens=max_tokens)
    wait_until(lambda: client.load().num_running == 1)
    yield
    for name in names:
        client.send(cancel=worker_pb2.Cancel(stream_id=name))


def write_back(single_rank: Start, spec: WorkerSpec, token_ids: list[int]) -> None:
    """Another worker, of no host, has computed the prompt's blocks; they are in the shared tier."""
    elsewhere = dataclasses.replace(spec, worker_id="elsewhere", host_address="", node_id="elsewhere")
    engine = dataclasses.replace(spec.engine, tp=1)
    with single_rank(dataclasses.replace(elsewhere, engine=engine)) as client:
        client.submit("first", token_ids, MIXED, max_tokens=2)
        client.wait_finished("first")
        names = block_names(root_name(client.kv_fingerprint(), b""), token_ids, BLOCK_SIZE, with_tail=False)
        directory = open_directory(spec.control, "")
        wait_until(lambda: all(directory.locate(names)))
        directory.close()


@pytest.mark.redis
def test_a_queued_request_finds_its_blocks_in_the_host_tier(
    tmp_path: Path, shared_kv_node: KVNode, redis_server: RedisServer, single_rank: Start
) -> None:
    model_dir = write_fake_model(tmp_path / "model")
    engine = EngineConfig(
        str(model_dir), runner="fake", dtype="float32", block_size=BLOCK_SIZE, num_blocks=64, max_num_seqs=1,
        fake_step_s=0.02,
    )  # fmt: skip
    spec = WorkerSpec(
        "mixed-0", "mixed", "mixed", engine, node_id=shared_kv_node.node_id, host_address=shared_kv_node.host_address,
        kvstore=KVStoreConfig(tier=redis_server.url, prefix_fetch="always"), tier_secret=SECRET,
        control=shared_kv_node.control_url,
    )  # fmt: skip
    token_ids = prompt(NUM_BLOCKS * BLOCK_SIZE + 5, seed=9)
    write_back(single_rank, spec, token_ids)
    num_fragments = NUM_BLOCKS * load_config(model_dir).cache_specs[0].num_kv_heads
    with single_rank(spec) as client:
        with queued_behind(client, 2, 5, 400):
            client.submit("queued", token_ids, MIXED)
            wait_until(lambda: client.load().num_prefetched_fragments["redis"] == num_fragments)
            assert client.load().num_waiting >= 1
        finished = client.wait_finished("queued")
        load = client.load()
        assert client.tokens["queued"] == expected(token_ids, 8)
        assert finished.num_transferred_blocks == NUM_BLOCKS
        assert load.pulled_bytes["host"] == load.prefetched_bytes["redis"] > 0
        assert load.pulled_bytes["redis"] == 0
        assert load.num_useless_prefetched_fragments == 0


@pytest.mark.redis
def test_what_one_rank_prefetched_serves_the_others(
    tmp_path: Path, shared_kv_node: KVNode, redis_server: RedisServer, single_rank: Start
) -> None:
    """Redis is gone when the request is admitted, so each rank has its heads from the host tier or not at all."""
    checkpoint = make_checkpoint("gqa", tmp_path)
    options = {"kvstore": KVStoreConfig(tier=redis_server.url, prefix_fetch="always"), "tier_secret": SECRET}
    spec = spec_for(checkpoint, "mixed", shared_kv_node, tp=2, **options)
    spec = dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, max_num_seqs=1))
    token_ids = prompt(NUM_BLOCKS * BLOCK_SIZE + 5, seed=10)
    write_back(single_rank, spec, token_ids)
    specs = load_config(checkpoint).cache_specs
    num_fragments = NUM_BLOCKS * sum(spec.num_kv_heads for spec in specs)
    with worker(spec) as client:
        with queued_behind(client, 6, 5, 200):
            client.submit("queued", token_ids, MIXED)
            wait_until(lambda: client.load().num_prefetched_fragments["redis"] == num_fragments)
            redis_server.kill()
        finished = client.wait_finished("queued")
        assert client.tokens["queued"] == generate_with_transformers(checkpoint, token_ids, 8)
        assert finished.num_transferred_blocks == NUM_BLOCKS
        assert finished.num_computed_prompt_tokens == 5
    redis_server.start()
