"""The HTTP API over real sockets, with fake workers behind it: the openai client, httpx, and raw bytes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.sampling import sampling_params
from router.service.text import TextCodec
from telemetry import worker as worker_metrics
from tests.router.conftest import MODEL, Cluster, config_with, pair, running_cluster, until
from tests.router.fake_worker import CONTEXT_TOKENS, VOCAB_SIZE, FakeWorker, expected_tokens
from tests.router.test_grpc_api import PROMPT

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


async def test_the_openai_client_completes_and_streams(model_dir: Path) -> None:
    async with served_to_openai(model_dir) as client:
        whole = await client.completions.create(**BASE, seed=3)
        assert whole.choices[0].text == decoded(model_dir, TEXT, 12)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 12)
        stream = await client.completions.create(**BASE, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_the_openai_client_chats(model_dir: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    prompt = "[user]hello\n[assistant]"
    expected = decoded(model_dir, prompt, 9)
    async with served_to_openai(model_dir) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=9)
        assert whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content == expected
        stream = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, stream=True)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "length"


async def test_token_id_prompts_and_several_prompts_at_once(model_dir: Path) -> None:
    async with served(model_dir, *pair()) as (_, client):
        answer = (
            await client.post("/v1/completions", json={**BASE, "prompt": PROMPT, "return_token_ids": True})
        ).json()
        assert answer["choices"][0]["token_ids"] == expected_tokens(PROMPT, 12)
        prompts = [TEXT, "class A:", "import os"]
        answer = (await client.post("/v1/completions", json={**BASE, "prompt": prompts})).json()
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [decoded(model_dir, prompt, 12) for prompt in prompts]
        assert answer["usage"]["completion_tokens"] == 36
        chunks = await sse(client, "/v1/completions", {**BASE, "prompt": prompts, "stream": True})
        for index, text in enumerate(texts):
            mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in mine) == text
            assert [choice["finish_reason"] for choice in mine][-1] == "length"
        assert chunks[-1] == "[DONE]"


async def test_stop_texts_and_seed(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    whole = decoded(model_dir, TEXT, 100)
    stop = whole[40:46]
    async with served(model_dir, worker) as (_, client):
        body = {**BASE, "max_tokens": 100, "stop": [stop], "seed": 2**64 - 1, "ignore_eos": True}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert worker.submits[0].sampling.seed == 2**64 - 1
    assert worker.submits[0].sampling.ignore_eos


async def test_the_cost_of_a_request_is_reported(model_dir: Path) -> None:
    async with served(model_dir, *pair()) as (_, client):
        answer = (await client.post("/v1/completions", json=BASE)).json()
        chunks = await sse(
            client, "/v1/completions", {**BASE, "stream": True, "stream_options": {"include_usage": True}}
        )
    for cost in (answer["switchyard"][0], chunks[-2]["switchyard"][0]):
        assert cost["num_transferred_blocks"] == 1
        assert cost["num_recomputed_prompt_tokens"] == 0
        assert cost["prefill_worker_id"] == "prefill-0"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_disconnects_stops_its_stream(model_dir: Path, is_stream: bool) -> None:
    prefill, decode = pair()
    decode.step_s = 0.01
    async with served(model_dir, prefill, decode) as (_, client):
        body = {**BASE, "max_tokens": 1500, "stream": is_stream}
        post = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: decode.num_sent >= 3, "it runs")
        post.cancel()
        left_s = time.monotonic()
        await until(lambda: decode.num_live == 0, "the worker got the cancel")
        assert time.monotonic() - left_s < 1.0  # the contract: a second
        assert decode.num_sent < 1000


async def test_a_failure_in_mid_stream_is_reported_in_the_stream(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.die_after = 5
    async with served(model_dir, worker, replacement_wait_s=0.05, new_request_wait_s=0.05) as (_, client):
        chunks = await sse(client, "/v1/completions", {**BASE, "max_tokens": 500, "stream": True})
        assert chunks[-1]["error"]["code"] == "no_worker"
        answer = await client.post("/v1/completions", json=BASE, timeout=20)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1


BAD = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": ["a", 1]}, 400, "prompt"),
    ({"prompt": [[1], []]}, 400, "prompt"),
    ({"prompt": [VOCAB_SIZE]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [2**70]}, 400, "prompt"),
    ({"prompt": [1] * CONTEXT_TOKENS}, 400, "prompt"),
    ({"prompt": "word " * 20_000}, 400, "prompt"),
    ({"prompt": "x" * 5_000_000}, 413, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": 2**70}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"temperature": 1e300}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"seed": 2**64}, 400, "seed"),
    ({"seed": -1}, 400, "seed"),
    ({"n": 0}, 400, "n"),
    ({"n": 10_000}, 400, "n"),
    ({"n": 3, "best_of": 2}, 400, "best_of"),
    ({"best_of": 0}, 400, "best_of"),
    ({"n": 65, "prompt": ["a", "b"]}, 400, "n"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"deadline_s": 0}, 400, "deadline_s"),
    ({"cache_salt": ""}, 400, "cache_salt"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": 10_000}, 400, "logprobs"),
    ({"logprobs": -1}, 400, "logprobs"),
    ({"logprobs": "5"}, 400, "logprobs"),
    ({"echo": "yes"}, 400, "echo"),
    ({"logit_bias": {"five": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, 400, "logit_bias"),
    ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
    ({"presence_penalty": float("nan")}, 400, "presence_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"typical_p": 0}, 400, "typical_p"),
    ({"min_tokens": 13}, 400, "min_tokens"),
    ({"min_tokens": -1}, 400, "min_tokens"),
    ({"bad_words": [""]}, 400, "bad_words"),
    ({"bad_words": ["x" * 200]}, 400, "bad_words"),
    ({"bad_words": "x"}, 400, "bad_words"),
    ({"allowed_token_ids": [VOCAB_SIZE]}, 400, "allowed_token_ids"),
    ({"allowed_token_ids": [5, 6], "banned_token_ids": [6], "banned_sequences": [[9, 5]]}, 400, "allowed_token_ids"),
    ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2}, 400, "allowed_token_ids"),
    ({"banned_token_ids": list(range(VOCAB_SIZE))}, 400, "banned_token_ids"),
    ({"banned_sequences": [[]]}, 400, "banned_sequences"),
    ({"banned_sequences": [[1] * 33]}, 400, "banned_sequences"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop_token_ids": [VOCAB_SIZE]}, 400, "stop_token_ids"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"colour": "red"}, 400, "colour"),
    ({"model": "nobody"}, 404, "model"),
]


async def test_bad_completions_are_refused_by_name(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with served(model_dir, worker) as (_, client):
        for change, status, param in BAD:
            for is_stream in (False, True):
                content = json.dumps({**BASE, "stream": is_stream, **change}).encode()
                if is_stream and param == "stream_options":
                    continue
                response = await client.post("/v1/completions", content=content)
                assert (response.status_code, response.json()["error"]["param"]) == (status, param), param
                assert "\n" not in response.json()["error"]["message"]
        assert (await client.post("/v1/completions", json=BASE)).status_code == 200
    assert len(worker.submits) == 1


async def test_each_prompt_has_its_choices_with_seeds_and_indices(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    prompts = [[5, 6, 7], [8, 9]]
    async with served(model_dir, worker) as (_, client):
        body = {**BASE, "prompt": prompts, "n": 3, "seed": 2**64 - 2, "echo": True}
        answer = (await client.post("/v1/completions", json=body)).json()
        chunks = await sse(client, "/v1/completions", {**body, "stream": True})
        texts = await client.post("/v1/completions", json={**BASE, "prompt": [TEXT, "import"], "n": 1})
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "n": 2}
        assert (await client.post("/v1/chat/completions", json={**chat, "n": 0})).status_code == 400
    codec = TextCodec(model_dir / "tokenizer.json")
    expected = [codec.decode(p) + decoded(model_dir, p, 12) for p in prompts for _ in range(3)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 6 * 12
    assert sorted(one.sampling.seed for one in worker.submits[:6]) == [0] * 2 + [2**64 - 2] * 2 + [2**64 - 1] * 2
    streamed = [""] * 6
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == expected
    assert [choice["text"] for choice in texts.json()["choices"]] == [
        decoded(model_dir, TEXT, 12), decoded(model_dir, "import", 12)
    ]  # fmt: skip


async def test_a_request_past_its_deadline_is_given_up(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.prefill_s = 60.0
    async with served(model_dir, worker) as (_, client):
        answer = await client.post("/v1/completions", json={**BASE, "deadline_s": 0.2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        await until(lambda: worker.num_live == 0, "the worker lets it go")


async def test_every_option_reaches_the_worker(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    options = {
        "min_p": 0.25, "typical_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.5,
        "logit_bias": {"7": -100, "8": 1.5}, "allowed_token_ids": [5, 7, 8], "banned_token_ids": [9],
        "bad_words": ["fib"], "banned_sequences": [[1, 2]], "min_tokens": 3, "include_stop_str_in_output": True,
        "stop": "zzz",
    }  # fmt: skip
    codec = TextCodec(model_dir / "tokenizer.json")
    async with served(model_dir, worker) as (_, client):
        assert (await client.post("/v1/completions", json={**BASE, **options})).status_code == 200
    sent = sampling_params(worker.submits[0].sampling)
    spelled = [tuple(codec.encode(text, False)) for text in ("fib", " fib")]
    assert sent.banned_sequences == ((1, 2), *spelled)
    assert sent.logit_bias == {7: -100, 8: 1.5}
    for name in options.keys() - {"banned_sequences", "logit_bias", "stop"}:
        value = options[name]
        assert getattr(sent, name) == (tuple(value) if isinstance(value, list) else value), name


async def test_bad_bodies_are_refused(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        for content, words in (
            (b'{"prompt": "\xff\xfe"}', "not valid UTF-8 at byte 12"),
            (b"{", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b"[]", "must be a JSON object"),
            (b"", "not valid JSON"),
            (b'{"prompt": "a"}', "model: Field required"),
        ):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
        assert (await client.post("/v1/completions", content=b"x" * (20 * 2**20))).status_code == 413
        assert (await client.get("/v1/completions")).status_code == 405
        assert (await client.get("/nothing")).json()["error"]["type"] == "invalid_request_error"
        assert (await client.post("/v1/completions", json=BASE)).status_code == 200


async def test_bad_chats_are_refused(model_dir: Path) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        for change, words in (
            ({"messages": [{"role": "villain", "content": "boo"}]}, "no villains"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text"),
            ({"messages": "hello"}, "messages"),
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"response_format": {"type": "yaml"}}, "response_format.type"),
            ({"max_completion_tokens": 0, "max_tokens": None}, "max_tokens"),
        ):
            response = await client.post("/v1/chat/completions", json={**body, **change})
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
        parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
        whole = await client.post("/v1/chat/completions", json=body)
        in_parts = await client.post("/v1/chat/completions", json={**body, "messages": parts})
        assert whole.json()["choices"] == in_parts.json()["choices"]


async def test_a_model_without_a_chat_template_says_so(model_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    async with served(tmp_path, FakeWorker("mixed-0", "mixed")) as (_, client):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "has no chat template" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "messages"


async def test_readiness_names_pools_and_tiers_that_are_down(model_dir: Path) -> None:
    prefill, decode = pair()
    async with served(model_dir) as (cluster, client):
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        await cluster.add(prefill)
        assert (await client.get("/readyz")).status_code == 503
        decode.load.tier_is_up["host"] = True
        decode.load.tier_is_up["redis"] = False
        decode.load.tier_problems["redis"] = "WRONGPASS"
        await cluster.add(decode)
        await until(lambda: "decode-0" in cluster.router._dispatcher.loads, "its load came")
        response = await client.get("/readyz")
        state = response.json()
        assert response.status_code == 200
        assert (state["is_ready"], state["is_degraded"]) == (True, True)
        assert state["pools"]["prefill"] == {"role": "prefill", "num_workers": 1}
        assert state["tiers_down"] == [{"tier": "redis", "worker_id": "decode-0", "reason": "WRONGPASS"}]


async def test_metrics_count_requests_and_show_workers(model_dir: Path) -> None:
    prefill, decode = pair()
    decode.load = _busy_load()
    async with served(model_dir, prefill, decode) as (cluster, client):
        await until(lambda: "decode-0" in cluster.router._dispatcher.loads, "its load came")
        await client.post("/v1/completions", json=BASE)
        await client.post("/v1/completions", json={**BASE, "max_tokens": 0})
        text = (await client.get("/metrics")).text
    labels = {"pool": "decode", "role": "decode", "worker": "decode-0"}

    def worker(name: str, **more: str) -> str:
        pairs = sorted({**labels, **more}.items())
        return f"switchyard_worker_{name}{{{','.join(f'{key}={chr(34)}{value}{chr(34)}' for key, value in pairs)}}}"

    for line in (
        'switchyard_requests_total{outcome="length"} 1.0',
        'switchyard_requests_total{outcome="invalid_request"} 1.0',
        'switchyard_placements_total{kind="prefill_decode"} 1.0',
        "switchyard_output_tokens_total 12.0",
        "switchyard_prompt_tokens_total 9.0",
        "switchyard_time_to_first_token_seconds_count 1.0",
        "switchyard_time_per_output_token_seconds_count 1.0",
        "switchyard_queue_seconds_count 1.0",
        "switchyard_kv_transfer_seconds_count 1.0",
        "switchyard_kv_transfer_relay_seconds_count 1.0",
        "switchyard_inflight_requests 0.0",
        "switchyard_directory_up 1.0",
        f"{worker('up')} 1.0",
        f"{worker('running_requests')} 3.0",
        f"{worker('recomputed_prompt_tokens_total')} 17.0",
        f"{worker('transferred_blocks_total')} 5.0",
        f"{worker('rejected_fragments_total', reason='checksum')} 2.0",
        f"{worker('tier_up', tier='redis')} 0.0",
    ):
        assert f"\n{line}\n" in text, line
    for declared in worker_metrics.ROUTER_METRICS:
        assert f"# TYPE {declared.name} " in text, "each metric that the documents promise is there"


def _busy_load() -> Any:
    from switchyard.v1 import worker_pb2

    load = worker_pb2.WorkerLoad(
        num_running=3, num_free_blocks=900, num_recomputed_prompt_tokens=17, num_transferred_blocks=5
    )
    load.num_rejected_fragments["checksum"] = 2
    load.tier_is_up["redis"] = False
    return load
