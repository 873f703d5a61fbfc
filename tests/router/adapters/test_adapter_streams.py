"""Streams with adapters through failures: the bytes that one began with compute it to its end, or none do."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from switchyard.v1 import generation_pb2, worker_pb2
from switchyard_client import GenerationError

from checkpoint.adapters.directory import adapter_digest
from kvstore.connect import open_journal
from kvstore.control.adapter_registry import AdapterRegistry, MemoryAdapterRegistry
from router.placement.residency import by_rendezvous
from router.service.text import TextCodec
from tests.router.adapters.lora_files import write_adapter
from tests.router.adapters.test_api import known, worker
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import MODEL, Adapters, Cluster, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens
from tests.router.test_resume import NUM_TOKENS, Reader, message

ORDER = dataclasses.replace(request(), model="a")
FAILED = worker_pb2.REQUEST_OUTCOME_ADAPTER_FAILED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "root" / "sql")
    return tmp_path / "root"


@asynccontextmanager
async def loaded(model_dir: Path, root: Path, *workers: FakeWorker) -> AsyncIterator[tuple[Cluster, bytes]]:
    """A cluster that serves the adapter `a`, and its digest."""
    async with running_cluster(model_dir, *workers, adapters=known(root)) as cluster:
        await cluster.router._adapters.load("a", "sql")
        yield cluster, adapter_digest(root / "sql")


def home_first(workers: list[FakeWorker], digest: bytes) -> list[FakeWorker]:
    order = by_rendezvous(digest, [one.worker_id for one in workers])
    return sorted(workers, key=lambda one: order.index(one.worker_id))


@pytest.mark.parametrize("die_after", [0, 1, 7])
async def test_a_worker_that_dies_is_replaced_with_the_same_adapter(
    model_dir: Path, root: Path, die_after: int
) -> None:
    workers = [worker(number) for number in range(3)]
    async with loaded(model_dir, root, *workers) as (cluster, digest):
        home, next_home, other = home_first(workers, digest)
        home.step_s, home.die_after = 0.002, die_after
        _, ids, _, finished = await collect(cluster.grpc_address, ORDER)
        assert ids == expected_tokens(PROMPT, 20, digest)
        assert finished.stats.decode_worker_id == next_home.worker_id
        assert [submit.adapter.digest for submit in next_home.submits] == [digest]
        assert not other.submits


async def test_files_that_are_others_now_are_not_read_for_a_stream_that_began_before(
    model_dir: Path, root: Path
) -> None:
    workers = [worker(number) for number in range(3)]
    async with loaded(model_dir, root, *workers) as (cluster, digest):
        home, next_home, holder = home_first(workers, digest)
        home.step_s = 0.02
        answer = asyncio.create_task(collect(cluster.grpc_address, ORDER))
        await until(lambda: home.num_sent > 2, "it runs")
        shutil.rmtree(root / "sql")
        write_adapter(root / "sql", seed=7)
        await cluster.router._adapters.load("a", "sql", in_place=True)
        holder.holds_adapters(on_host=[digest])
        fleet = cluster.router._dispatcher.fleet
        await until(lambda: any(view.holds_adapter for view in fleet.views({}, digest)), "it said that it has it")
        await home.kill()
        _, ids, _, finished = await answer
        assert ids == expected_tokens(PROMPT, 20, digest)
        assert finished.stats.decode_worker_id == holder.worker_id
        assert not next_home.submits


async def test_a_stream_whose_digest_nobody_has_any_more_fails_clearly(model_dir: Path, root: Path) -> None:
    workers = [worker(number) for number in range(2)]
    async with loaded(model_dir, root, *workers) as (cluster, digest):
        home, other = home_first(workers, digest)
        home.step_s = 0.02
        cluster.router._dispatcher.config = dataclasses.replace(cluster.spec.config, replacement_wait_s=0.05)
        answer = asyncio.create_task(collect(cluster.grpc_address, ORDER))
        await until(lambda: home.num_sent > 2, "it runs")
        write_adapter(root / "sql", seed=7)
        await cluster.router._adapters.load("a", "sql", in_place=True)
        await home.kill()
        with pytest.raises(
            GenerationError, match=r"no worker holds adapter .*, and the files at its path have another digest"
        ) as failed:
            await answer
        assert failed.value.status == "UNAVAILABLE"
        assert not other.submits


async def test_a_worker_that_cannot_load_it_is_left_for_one_that_can(model_dir: Path, root: Path) -> None:
    workers = [worker(number) for number in range(2)]
    async with loaded(model_dir, root, *workers) as (cluster, digest):
        home, other = home_first(workers, digest)
        home.refuse_with = worker_pb2.RequestFinished(outcome=FAILED, error="/adapters/sql: missing")
        _, ids, _, finished = await collect(cluster.grpc_address, ORDER)
        assert ids == expected_tokens(PROMPT, 20, digest)
        assert finished.stats.decode_worker_id == other.worker_id


async def test_what_two_workers_cannot_load_is_not_tried_on_a_third(model_dir: Path, root: Path) -> None:
    workers = [worker(number) for number in range(3)]
    for one in workers:
        one.refuse_with = worker_pb2.RequestFinished(outcome=FAILED, error="/adapters/sql: missing")
    async with loaded(model_dir, root, *workers) as (cluster, _):
        with pytest.raises(GenerationError, match=r"could not be loaded on .*: /adapters/sql: missing") as failed:
            await collect(cluster.grpc_address, ORDER, resume_within_s=0)
        assert failed.value.status == "UNAVAILABLE"
        assert sum(len(one.submits) for one in workers) == 2


async def test_what_no_worker_can_serve_is_the_request_s_fault(model_dir: Path, root: Path) -> None:
    one = worker()
    one.refuse_with = worker_pb2.RequestFinished(
        outcome=FAILED, error="sql: rank 4 is no rank", is_invalid_request=True
    )
    async with loaded(model_dir, root, one) as (cluster, _), httpx.AsyncClient(base_url=cluster.http_url) as client:
        answer = await client.post("/v1/completions", json={"model": "a", "prompt": "x"})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"], error["message"]) == (
            "model",
            "adapter_refused",
            "sql: rank 4 is no rank",
        )
        assert len(one.submits) == 1
        vector = await client.post("/v1/embeddings", json={"model": "a", "input": "x"})
        assert (vector.status_code, vector.json()["error"]["code"]) == (400, "adapter_refused")
        assert one.submits[-1].adapter.name == "a"


async def test_requests_wait_for_a_worker_that_takes_adapters(model_dir: Path, root: Path) -> None:
    plain = FakeWorker("mixed-0", "mixed")  # has not said yet that it takes adapters, as after its hello
    async with loaded(model_dir, root, plain) as (cluster, digest):
        answer = asyncio.create_task(collect(cluster.grpc_address, ORDER))
        _, ids, _, _ = await collect(cluster.grpc_address, request())
        assert ids == expected_tokens(PROMPT, 20)
        assert not answer.done()
        plain.holds_adapters()
        await cluster.add(worker(1))
        assert (await answer)[1] == expected_tokens(PROMPT, 20, digest)


# -- resumption


@asynccontextmanager
async def two_routers(
    model_dir: Path, root: Path, tmp_path: Path, others: Adapters | None = None
) -> AsyncIterator[tuple[Cluster, Cluster]]:
    """As in test_resume, with one registry, the adapter `a` and a journal."""
    registry: AdapterRegistry = MemoryAdapterRegistry()
    mine = known(root, registry)
    slow = worker()
    slow.step_s = 0.02

    url = f"file://{tmp_path}/streams.journal"
    async with (
        running_cluster(model_dir, slow, journal=open_journal(url, ""), adapters=mine) as first,
        running_cluster(model_dir, worker(1), journal=open_journal(url, ""), adapters=others or mine) as second,
    ):
        await first.router._adapters.load("a", "sql")
        yield first, second


def of_adapter() -> generation_pb2.GenerateRequest:
    made = message()
    made.model = "a"
    return made


async def test_another_router_goes_on_with_the_bytes_that_it_began_with(
    model_dir: Path, root: Path, tmp_path: Path
) -> None:
    async with two_routers(model_dir, root, tmp_path) as (first, second):
        digest = adapter_digest(root / "sql")
        reader = Reader()
        await reader.read(first.stub().Generate(of_adapter()), up_to=4)
        write_adapter(root / "law", seed=3)
        await first.router._adapters.load("a", "law", in_place=True)
        await second.router._adapters.find("a")
        await reader.read(second.stub().Resume(reader.resumption()))
        assert reader.ids == expected_tokens(PROMPT, NUM_TOKENS, digest)
        resumed = second.workers[0].submits[-1].adapter
        assert (resumed.name, resumed.digest, resumed.path) == ("a", digest, str(root / "sql"))


async def test_a_stream_is_resumed_though_its_adapter_was_unloaded(model_dir: Path, root: Path, tmp_path: Path) -> None:
    body = {"model": "a", "prompt": list(PROMPT), "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    async with (
        two_routers(model_dir, root, tmp_path) as (first, second),
        httpx.AsyncClient(timeout=20) as client,
    ):
        digest = adapter_digest(root / "sql")
        last = text = ""
        async with client.stream("POST", f"{first.http_url}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    last = line[4:]
                if last.endswith("/4"):
                    break
        await first.router._adapters.unload("a")
        await until(lambda: not second.router._adapters.served, "the other router knows")
        fresh = await client.post(f"{second.http_url}/v1/completions", json=body)
        assert fresh.status_code == 404
        url, headers = f"{second.http_url}/v1/completions", {"Last-Event-ID": last}
        wrong = await client.post(url, json={**body, "model": MODEL}, headers=headers)
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")
        rest = await client.post(url, json=body, headers=headers)
        assert rest.status_code == 200
        text = "".join(
            httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
            for line in rest.text.splitlines()
            if line.startswith("data: {")
        )
        whole = TextCodec(model_dir / "tokenizer.json").decode(expected_tokens(PROMPT, NUM_TOKENS, digest))
        assert text
        assert whole.endswith(text)


async def test_a_router_without_adapters_does_not_go_on_with_another_answer(
    model_dir: Path, root: Path, tmp_path: Path
) -> None:
    async with two_routers(model_dir, root, tmp_path, others=Adapters()) as (first, second):
        reader = Reader()
        await reader.read(first.stub().Generate(of_adapter()), up_to=4)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reader.read(second.stub().Resume(reader.resumption()))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert "was begun with an adapter, and none are served here" in (refused.value.details() or "")
        assert not second.workers[0].submits
