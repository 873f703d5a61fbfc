"""Embeddings through a whole cluster."""

from __future__ import annotations

import base64
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np
import openai
import pytest
import torch
from switchyard_client import (
    GenerationError,
)
from transformers import AutoModel

from router.service.text import TextCodec
from tests.cluster.deaths import prompt
from tests.cluster.options.completions import TEXT
from tests.fake_cluster import FakeCluster
from tests.fake_model import DEMO, MODEL_NAME

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_embeddings(cluster: FakeCluster, client: openai.OpenAI, codec: TextCodec) -> None:
    """By the openai client and by gRPC, as transformers has them, and through the death of a prefill worker."""
    texts = [TEXT, "import os", "def fib(n):"]
    model = AutoModel.from_pretrained(DEMO, dtype=torch.float32)

    def expected(text: str, pooling: str) -> list[float]:
        with torch.inference_mode():
            hidden = model(torch.tensor([codec.encode(text, True)])).last_hidden_state[0]
        chosen = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        return list((chosen / chosen.norm()).tolist())

    grpc = cluster.client()
    for pooling in ("last", "mean"):
        for encoding in ("float", "base64"):
            answer = client.embeddings.create(
                model=MODEL_NAME, input=texts, encoding_format=encoding, extra_body={"pooling": pooling}
            )
            assert [one.index for one in answer.data] == [0, 1, 2]
            assert answer.usage.prompt_tokens == sum(len(codec.encode(text, True)) for text in texts)
            for one, text in zip(answer.data, texts, strict=True):
                values = one.embedding
                if isinstance(values, str):
                    values = np.frombuffer(base64.b64decode(values), "<f4").tolist()
                assert values == pytest.approx(expected(text, pooling), abs=2e-4)
        assert grpc.embed(TEXT, pooling).values == pytest.approx(expected(TEXT, pooling), abs=2e-4)
    ids = tuple(codec.encode(TEXT, True))
    raw = grpc.embed(ids, is_raw=True)
    length = sum(value * value for value in raw.values) ** 0.5
    assert [value / length for value in raw.values] == pytest.approx(expected(TEXT, "last"), abs=2e-4)
    assert raw.num_prompt_tokens == len(ids)
    assert raw.worker_id.startswith("prefill-0")
    long_prompt = prompt(31, 700)
    whole = grpc.embed(long_prompt, "mean")
    name = whole.worker_id.partition(".")[0]
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(grpc.embed, long_prompt, "mean") for _ in range(8)]
        wait(jobs, return_when=FIRST_COMPLETED)
        cluster.kill(name)
        answers = [job.result() for job in jobs]
    assert any(answer.worker_id != whole.worker_id for answer in answers)
    for answer in answers:
        assert answer.values == pytest.approx(whole.values, abs=1e-5)
    cluster.start_worker(name)
    cluster.wait_complete()
    for options, param in (
        ({"input": []}, "input"), ({"input": ""}, "input"), ({"input": [[9999]]}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"), ({"extra_body": {"pooling": "max"}}, "pooling"),
        ({"input": "x " * 4000}, "input"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refusal:
            client.embeddings.create(**{"model": MODEL_NAME, "input": "x", **options})
        assert refusal.value.param == param
    with pytest.raises(GenerationError, match="prompt"):
        grpc.embed("")
