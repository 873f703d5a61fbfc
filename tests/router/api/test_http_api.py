"""The HTTP API over real sockets, with fake workers behind it: the openai client, httpx, and raw bytes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from router.sampling import sampling_params
from router.service.text import TextCodec
from tests.router.api.asking import PROMPT
from tests.router.conftest import MODEL, pair, until
from tests.router.fake_worker import FakeWorker, expected_tokens
from tests.router.http_calls import BASE, TEXT, decoded, served, served_to_openai, sse


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
