"""A cluster of the demo model on the real engine, and its clients."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from router.service.text import TextCodec
from tests.fake_cluster import FakeCluster
from tests.fake_model import DEMO
from tests.fake_shape import Shape
from tests.forked import Prefork


@pytest.fixture(scope="module")
def cluster(prefork: Prefork) -> Iterator[FakeCluster]:
    engine = {"runner": "torch", "batch_invariant": True, "max_num_seqs": 32}
    patient = {"worker_silence_s": 5.0}  # a worker that computes on busy cores is not lost
    shape = Shape(prefill=1, model_dir=str(DEMO), block_size=16, engine=engine, router=patient)
    with FakeCluster(prefork, shape) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: FakeCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http_urls[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(DEMO / "tokenizer.json")
