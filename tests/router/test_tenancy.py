"""The salt of a caller: from its credential, the same on both APIs, and nothing else."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from switchyard_client import GenerationClient

from router.api.tenancy import tenant_salt
from tests.router.api.asking import PROMPT, request
from tests.router.conftest import MODEL, running_cluster
from tests.router.fake_worker import FakeWorker


def test_a_credential_is_one_tenant_however_it_is_written() -> None:
    assert tenant_salt("Bearer a") == tenant_salt("bearer a ") == tenant_salt("a") != tenant_salt("Bearer b")
    assert tenant_salt("") == tenant_salt("Bearer ") == b""
    assert b"a-long-key" not in tenant_salt("Bearer a-long-key")


@pytest.mark.parametrize("api_key", ["", "a", "b"])
async def test_both_apis_give_the_workers_the_same_salt(model_dir: Path, api_key: str) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    completion = {"model": MODEL, "prompt": list(PROMPT), "max_tokens": 3, "user": "somebody"}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    async with running_cluster(model_dir, worker) as cluster:
        async with GenerationClient(cluster.grpc_address, api_key=api_key) as client:
            assert [event async for event in client.generate_async(request())]
        async with httpx.AsyncClient(trust_env=False) as http:
            for path, body in (("completions", completion), ("chat/completions", chat)):
                answer = await http.post(f"{cluster.http_url}/v1/{path}", json=body, headers=headers)
                assert answer.status_code == 200, answer.text
    assert len(worker.submits) == 3
    assert {submit.tenant_salt for submit in worker.submits} == {tenant_salt(api_key)}
