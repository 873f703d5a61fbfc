"""A router that follows its workers' block events, and misses some of them."""

from __future__ import annotations

from pathlib import Path

from router.fleet.fleet import name_blocks
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import Cluster, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens
from workers.server.block_events import BlockFeed

LONG = tuple((7 * i) % 4000 for i in range(320))  # twenty blocks


def talking(worker_id: str) -> FakeWorker:
    """A worker that tells which blocks it holds."""
    worker = FakeWorker(worker_id, "mixed")
    worker.held = {}
    return worker


def long_names(cluster: Cluster) -> list[bytes]:
    """Of the long prompt's blocks."""
    (names,) = name_blocks(cluster.router._dispatcher.fleet.layouts, LONG, b"").values()
    return list(names)


def num_cached(cluster: Cluster) -> dict[str, int]:
    """Tokens of the long prompt by worker, as the next placement will see them."""
    fleet = cluster.router._dispatcher.fleet
    names = name_blocks(fleet.layouts, LONG, b"")
    return {view.worker_id: view.num_cached_tokens for view in fleet.views(names)}


def metric(cluster: Cluster, line: str) -> float:
    """The value of a sample, as the router's page shows it."""
    text = cluster.router._metrics.text().decode()
    (found,) = [each for each in text.splitlines() if each.startswith(line + " ")]
    return float(found.rpartition(" ")[2])


async def test_a_prompt_goes_where_a_worker_says_its_blocks_are(model_dir: Path) -> None:
    workers = [talking(f"w{i}") for i in range(4)]
    workers[0].held = {bytes([i % 256, i // 256]) * 8: None for i in range(5000)}  # a snapshot in parts
    async with running_cluster(model_dir, *workers) as cluster:
        names = long_names(cluster)
        fleet = cluster.router._dispatcher.fleet
        await until(lambda: fleet.num_reported_blocks("w0") == 5000, "the snapshot came")
        workers[2].hold(names)
        await until(lambda: num_cached(cluster)["w2"] == 320, "the block events came")
        answer = await collect(cluster.grpc_address, request(LONG))
        assert answer[3].stats.decode_worker_id == "w2"
        workers[2].evict(names[1:])
        workers[3].hold(names[:10])
        await until(lambda: num_cached(cluster)["w2"] == 16, "the eviction was reported")
        assert (await collect(cluster.grpc_address, request(LONG)))[3].stats.decode_worker_id == "w3"
        assert metric(cluster, "switchyard_block_snapshots_total") == 4
        assert metric(cluster, "switchyard_block_gaps_total") == 0
        labels = '{pool="mixed",role="mixed",worker="w3"}'
        assert metric(cluster, "switchyard_worker_known_blocks" + labels) == 10


async def test_what_was_missed_is_noticed_and_asked_for(model_dir: Path) -> None:
    worker = talking("a")
    async with running_cluster(model_dir, worker, FakeWorker("b", "mixed")) as cluster:
        names = long_names(cluster)
        fleet = cluster.router._dispatcher.fleet
        await until(lambda: fleet.num_reported_blocks("a") == 0, "an empty snapshot came")
        assert fleet.num_reported_blocks("b") is None
        worker.num_block_events_to_drop = 1
        worker.hold(names[:4])
        await until(lambda: worker.num_block_events_to_drop == 0, "it was lost")
        assert num_cached(cluster)["a"] == 0
        worker.hold(names[4:8])
        await until(lambda: num_cached(cluster)["a"] == 128, "what was lost came with a snapshot")
        assert worker.num_watches == 2
        assert metric(cluster, "switchyard_block_gaps_total") == 1
        assert metric(cluster, "switchyard_block_snapshots_total") == 2
        worker.evict(names[:8])
        await until(lambda: num_cached(cluster)["a"] == 0, "and the changes go on from there")


async def test_a_worker_that_cannot_tell_is_guessed_at(model_dir: Path) -> None:
    workers = [FakeWorker(f"w{i}", "mixed") for i in range(4)]
    async with running_cluster(model_dir, *workers) as cluster:
        answers = [await collect(cluster.grpc_address, request(LONG)) for _ in range(4)]
        assert len({answer[3].stats.decode_worker_id for answer in answers}) == 1
        assert b"known_blocks{" not in cluster.router._metrics.text()


async def test_streams_run_on_while_the_blocks_are_reported_anew(model_dir: Path) -> None:
    worker = talking("a")
    async with running_cluster(model_dir, worker) as cluster:
        worker.num_block_events_to_drop = 10**9
        for number in range(20):
            worker.hold([bytes([number]) * 16])
            assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
        assert (worker.num_connections, worker.num_live) == (1, 0)


async def test_what_another_process_says_at_the_address_does_not_count(model_dir: Path) -> None:
    worker = talking("a")
    worker.held = {bytes(16): None}
    worker._feed = BlockFeed("somebody else", worker._follow_blocks)
    async with running_cluster(model_dir, worker) as cluster:
        await until(lambda: worker.num_watches >= 2, "it was asked again")
        assert cluster.router._dispatcher.fleet.num_reported_blocks("a") is None
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
