"""Who is in: leases come and go, the directory goes away, strangers answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.identity import ServedModel, tokenizer_digest
from kvstore.control.directory import DirectoryUnavailable, LeasedWorker, WorkerRecord
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import MODEL, WEIGHTS, Cluster, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens


def go_away(cluster: Cluster) -> Callable[[], None]:
    """The directory stops answering; call the result and it is back."""
    answer = cluster.directory.workers

    def refuse() -> list[LeasedWorker]:
        raise DirectoryUnavailable("nobody there")

    cluster.directory.workers = refuse

    def come_back() -> None:
        cluster.directory.workers = answer

    return come_back


async def test_a_worker_that_withdraws_finishes_its_streams_and_gets_no_more(model_dir: Path) -> None:
    leaving, staying = FakeWorker("a", "mixed"), FakeWorker("b", "mixed")
    leaving.step_s = 0.005
    async with running_cluster(model_dir, leaving) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=60)))
        await until(lambda: leaving.num_sent >= 5, "it runs")
        await cluster.add(staying)
        cluster.directory.withdraw("a")
        await cluster.loses(leaving)
        assert (await collect(cluster.grpc_address, request()))[3].stats.decode_worker_id == "b"
        _, ids, _, finished = await answer
        assert ids == expected_tokens(PROMPT, 60)
        assert (finished.stats.decode_worker_id, finished.stats.num_replacements) == ("a", 0)
        await until(lambda: "a" not in cluster.router._membership._members, "its connection was closed")
        cluster.lease(leaving)
        await cluster.sees(leaving)


async def test_known_workers_stay_while_the_directory_is_away(model_dir: Path) -> None:
    worker, late = FakeWorker("a", "mixed"), FakeWorker("b", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        come_back = go_away(cluster)
        await until(lambda: not cluster.router.readiness().directory_is_up, "it was noticed")
        assert cluster.router.readiness().is_ready
        assert cluster.router.readiness().is_degraded
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
        come_back()
        await cluster.add(late)
        assert not cluster.router.readiness().is_degraded


@pytest.mark.parametrize("how", ["another worker", "no block size"])
async def test_strangers_are_not_used(model_dir: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger, good = FakeWorker("a", "mixed"), FakeWorker("b", "mixed")
    if how == "another worker":
        stranger.hello_worker_id = "c"
    else:
        monkeypatch.setattr("tests.router.fake_worker.BLOCK_SIZE", 0)
    async with running_cluster(model_dir) as cluster:
        await stranger.start()
        cluster.workers.append(stranger)
        cluster.lease(stranger)
        await until(lambda: stranger.num_connections >= 2, "it was tried twice")
        assert not cluster.router.readiness().is_ready
        monkeypatch.undo()
        await cluster.add(good)
        assert (await collect(cluster.grpc_address, request()))[3].stats.decode_worker_id == "b"


@pytest.mark.parametrize("field", ["cluster", "model", "weights", "tokenizer"])
async def test_a_worker_that_serves_something_else_is_named_and_not_used(model_dir: Path, field: str) -> None:
    stranger, good = FakeWorker("a", "mixed"), FakeWorker("b", "mixed")
    async with running_cluster(model_dir) as cluster:
        ours = ServedModel("", MODEL, WEIGHTS, tokenizer_digest(model_dir))
        stranger.served = dataclasses.replace(ours, **{field: "another"}).message()
        await stranger.start()
        cluster.workers.append(stranger)
        cluster.lease(stranger)
        await until(lambda: bool(cluster.router.readiness().workers_refused), "it is refused")
        state = cluster.router.readiness()
        assert not state.is_ready
        (refused,) = state.workers_refused
        assert (refused.worker_id, refused.address) == ("a", stranger.address)
        mine = getattr(ours, field) or "none"
        assert refused.reason == f"it serves something else: {field}: another there, {mine} here"
        await cluster.add(good)
        assert cluster.router.readiness().is_degraded
        assert (await collect(cluster.grpc_address, request()))[3].stats.decode_worker_id == "b"
        stranger.served = None  # its operator has mended it
        await cluster.sees(stranger, good)
        assert not cluster.router.readiness().workers_refused


async def test_a_worker_that_moved_is_found_at_its_new_address(model_dir: Path) -> None:
    worker = FakeWorker("a", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        await worker.kill()
        await cluster.loses(worker)
        worker.address = ""
        await worker.start()
        cluster.directory.withdraw("a")
        cluster.lease(worker)
        await cluster.sees(worker)
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_worker_that_registered_anew_is_dialled_anew_and_its_streams_go_elsewhere(model_dir: Path) -> None:
    clock = Clock()
    hung, other = FakeWorker("a", "mixed"), FakeWorker("b", "mixed")
    hung.step_s = 0.005
    async with running_cluster(model_dir, hung, clock=clock) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=100)))
        await until(lambda: hung.num_sent >= 5, "it runs")
        await cluster.add(other)
        old_connection = cluster.router._dispatcher.connections["a"]
        clock.now_s += 2000
        cluster.lease(other)
        clock.now_s += 2000  # the lease of the first one ran out
        await cluster.loses(hung)
        assert hung.num_live == 1, "its stream runs on while the directory names no other epoch"
        hung.lease_epoch = cluster.lease(hung)
        _, ids, _, finished = await answer
        assert ids == expected_tokens(PROMPT, 100)
        assert (finished.stats.decode_worker_id, finished.stats.num_replacements) == ("b", 1)
        await cluster.sees(hung, other)
        connection = cluster.router._dispatcher.connections["a"]
        assert connection is not old_connection
        assert (old_connection.is_up, connection.lease_epoch, hung.num_connections) == (False, hung.lease_epoch, 2)


async def test_nothing_goes_back_to_an_older_epoch(model_dir: Path) -> None:
    worker, impostor = FakeWorker("a", "mixed"), FakeWorker("a", "mixed")
    await impostor.start()
    async with running_cluster(model_dir, worker) as cluster:
        connection = cluster.router._dispatcher.connections["a"]
        record = WorkerRecord("a", impostor.address, "mixed", "mixed", "node-0")
        num_polls = 0

        def forgetful() -> list[LeasedWorker]:
            nonlocal num_polls
            num_polls += 1
            return [LeasedWorker(record, connection.lease_epoch - 1)]

        cluster.directory.workers = forgetful
        await until(lambda: num_polls >= 3, "the router read it twice")
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
        assert cluster.router._dispatcher.connections["a"] is connection
        assert (worker.num_connections, impostor.num_connections) == (1, 0)
    await impostor.kill()


async def test_a_worker_that_goes_by_an_older_lease_is_not_used(model_dir: Path) -> None:
    worker = FakeWorker("a", "mixed")
    async with running_cluster(model_dir) as cluster:
        await worker.start()
        cluster.workers.append(worker)
        cluster.lease(worker)
        cluster.directory.withdraw("a")
        epoch = cluster.lease(worker)
        worker.lease_epoch = epoch - 1
        await until(lambda: worker.num_connections >= 2, "it was tried twice")
        assert not cluster.router.readiness().is_ready
        worker.lease_epoch = epoch
        await cluster.sees(worker)


async def test_a_worker_may_know_its_new_epoch_before_the_directory_is_asked(model_dir: Path) -> None:
    worker = FakeWorker("a", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        come_back = go_away(cluster)
        await until(lambda: not cluster.router.readiness().directory_is_up, "it was noticed")
        await worker.kill()
        cluster.directory.withdraw("a")
        worker.lease_epoch = cluster.lease(worker)
        await worker.start()
        await until(lambda: worker.num_connections == 2, "it was dialled again")
        await cluster.sees(worker)
        come_back()
        await until(lambda: cluster.router.readiness().directory_is_up, "it was noticed")
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
        assert worker.num_connections == 2


async def test_a_malformed_batch_breaks_the_connection_and_not_the_stream(model_dir: Path) -> None:
    worker = FakeWorker("a", "mixed")
    worker.step_s = 0.005
    async with running_cluster(model_dir, worker) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=60)))
        await until(lambda: worker.num_sent >= 5, "it runs")
        connection = cluster.router._dispatcher.connections["a"]
        from switchyard.v1 import worker_pb2

        broken = worker_pb2.TokenBatch(stream_ids=["x"], epochs=[1], stream_index=[3], positions=[0], token_ids=[1])
        take = connection._take

        def take_broken_once(message: worker_pb2.ConnectResponse) -> None:
            connection._take = take
            take(worker_pb2.ConnectResponse(tokens=broken))

        connection._take = take_broken_once
        _, ids, _, finished = await answer
    assert ids == expected_tokens(PROMPT, 60)
    assert finished.stats.num_replacements == 1
