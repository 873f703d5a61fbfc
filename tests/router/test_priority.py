"""A request's priority, and whose share it uses: from both APIs to every worker that the request comes to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from switchyard.v1 import generation_pb2
from switchyard_client import GenerationClient, GenerationError

from router.api.tenancy import tenant_salt
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import MODEL, pair, running_cluster
from tests.router.fake_worker import FakeWorker, expected_tokens
from tests.router.test_resume import MINE, TOKENS, Reader, journal_url, message, two_routers

__all__ = ["journal_url"]  # a fixture


async def test_both_apis_give_it_to_the_workers(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    completion = {"model": MODEL, "prompt": list(PROMPT), "max_tokens": 3, "priority": -7, "n": 2}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "priority": 5}
    async with running_cluster(model_dir, worker) as cluster:
        await collect(cluster.grpc_address, replace(request(), priority=1000))
        await collect(cluster.grpc_address, request())
        async with httpx.AsyncClient(trust_env=False) as http:
            for path, body in (("completions", completion), ("chat/completions", chat)):
                answer = await http.post(f"{cluster.http_url}/v1/{path}", json=body)
                assert answer.status_code == 200, answer.text
    assert [submit.priority for submit in worker.submits] == [1000, 0, -7, -7, 5]


@pytest.mark.parametrize("priority", [-1001, 1001, 2**31, 2**70])
async def test_one_out_of_range_is_refused_by_name(model_dir: Path, priority: int) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        async with GenerationClient(cluster.grpc_address) as client:
            with pytest.raises(GenerationError) as refused:
                async for _ in client.generate_async(replace(request(), priority=priority)):
                    pass
        assert refused.value.status == "INVALID_ARGUMENT"
        async with httpx.AsyncClient(trust_env=False) as http:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "priority": priority}
            answer = await http.post(f"{cluster.http_url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"
    assert f"must be in [-1000, 1000], not {priority}" in answer.json()["error"]["message"]
    if abs(priority) < 2**31:  # beyond it the client has no message to send
        assert f"priority: must be in [-1000, 1000], not {priority}" in str(refused.value)
    assert worker.submits == []


async def test_what_is_no_number_is_refused_by_name(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir, worker) as cluster, httpx.AsyncClient(trust_env=False) as http:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "priority": "high"}
        answer = await http.post(f"{cluster.http_url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


async def test_prefill_and_decode_workers_get_the_same(model_dir: Path) -> None:
    prefill, decode = pair()
    async with running_cluster(model_dir, prefill, decode) as cluster:
        await collect(cluster.grpc_address, replace(request(), priority=-3))
    assert [submit.priority for submit in prefill.submits + decode.submits] == [-3, -3]


async def test_it_is_kept_when_a_worker_dies(model_dir: Path) -> None:
    prefill, first = pair()
    first.die_after, first.step_s = 2, 0.002
    second = FakeWorker("mixed-1", "mixed")
    async with running_cluster(model_dir, prefill, first) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, replace(request(max_tokens=6), priority=-3)))
        await cluster.loses(first)
        await cluster.add(second)
        _, ids, _, _ = await answer
    assert ids == expected_tokens(PROMPT, 6)
    assert [submit.priority for submit in second.submits] == [-3]


async def test_it_and_the_tenant_are_kept_when_a_router_dies(model_dir: Path, journal_url: str) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.02
    order: generation_pb2.GenerateRequest = message()
    order.priority, order.cache_salt = -3, b"mine alone"
    async with two_routers(model_dir, journal_url, worker) as (first, second):
        reader = Reader()
        await reader.read(first.stub().Generate(order, metadata=MINE), up_to=4)
        await reader.read(second.stub().Resume(reader.resumption(), metadata=MINE))
    assert reader.ids == TOKENS
    (submit,) = second.workers[0].submits
    assert (submit.priority, submit.tenant) == (-3, tenant_salt("a key"))


async def test_a_share_is_the_credentials_whatever_salts_its_requests_have(model_dir: Path) -> None:
    """A client that changed its cache_salt with each request would be a new tenant each time."""
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        for salt in (b"", b"1", b"2"):
            async with GenerationClient(cluster.grpc_address, api_key="a") as client:
                assert [event async for event in client.generate_async(replace(request(), cache_salt=salt))]
    assert {submit.tenant for submit in worker.submits} == {tenant_salt("a")}
    assert len({submit.tenant_salt for submit in worker.submits}) == 3
