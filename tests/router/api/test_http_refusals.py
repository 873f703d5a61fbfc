"""What the HTTP API refuses, and which field it names."""

from __future__ import annotations

import json
from pathlib import Path

from tests.router.conftest import MODEL
from tests.router.fake_worker import CONTEXT_TOKENS, VOCAB_SIZE, FakeWorker
from tests.router.http_calls import BASE, served

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
    ({"banned_token_ids": [1] * (VOCAB_SIZE + 1)}, 400, "banned_token_ids"),
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
    ({"stop": 5}, 400, "stop"),
    ({"stop": ["a", 5]}, 400, "stop"),
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
                assert ".str:" not in response.json()["error"]["message"], "a field that there is not"
        assert (await client.post("/v1/completions", json=BASE)).status_code == 200
    assert len(worker.submits) == 1


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
            ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens: must be"),
            ({"messages": body["messages"] * 2049}, "messages: 2049 are more than the 2048 tokens"),
            ({"messages": [{"role": "assistant", "reasoning_content": 5}]}, "messages.0.reasoning_content"),
            ({"chat_template_kwargs": {"tools": 3}}, "chat_template_kwargs: must not have tools"),
            ({"chat_template_kwargs": {"add_generation_prompt": False}}, "must not have add_generation_prompt"),
            ({"functions": {}}, "functions: must be a list"),
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
