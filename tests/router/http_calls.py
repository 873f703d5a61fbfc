"""A router with fake workers, and HTTP clients that ask it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from router.service.text import TextCodec
from tests.router.conftest import MODEL, Cluster, config_with, pair, running_cluster
from tests.router.fake_worker import FakeWorker, expected_tokens

TEXT = "def fibonacci(n):"
BASE = {"model": MODEL, "prompt": TEXT, "max_tokens": 12, "temperature": 0}


@asynccontextmanager
async def served(
    model_dir: Path, *workers: FakeWorker, **changes: object
) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    async with (
        running_cluster(model_dir, *workers, config=config_with(**changes)) as cluster,
        httpx.AsyncClient(base_url=cluster.http_url, timeout=20) as client,
    ):
        yield cluster, client


@asynccontextmanager
async def served_to_openai(model_dir: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running_cluster(model_dir, *pair()) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def decoded(model_dir: Path, prompt: Any, num_tokens: int) -> str:
    codec = TextCodec(model_dir / "tokenizer.json")
    ids = codec.encode(prompt, True) if isinstance(prompt, str) else prompt
    return codec.decode(expected_tokens(ids, num_tokens))


async def sse(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """All data lines of a streamed answer, parsed; "[DONE]" as it is."""
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
