"""/tokenize and /detokenize over real sockets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.config import ROOT
from router.service.text import TextCodec
from tests.router.conftest import MODEL, pair
from tests.router.http_calls import served

TEXT = "def fibonacci(n):\n    return 1"


async def post(client: httpx.AsyncClient, path: str, **body: object) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_a_text_becomes_its_tokens_and_again_the_text(model_dir: Path) -> None:
    codec = TextCodec(model_dir / "tokenizer.json")
    async with served(model_dir, *pair()) as (_, client):
        found = await post(client, "/tokenize", model=MODEL, prompt=TEXT, return_token_strs=True)
        assert found["tokens"] == codec.encode(TEXT, True)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] > 0
        assert [codec.id_of(text) for text in found["token_strs"]] == found["tokens"]
        assert await post(client, "/detokenize", model=MODEL, tokens=found["tokens"]) == {"prompt": TEXT}
        assert await post(client, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "another"}, "model"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/detokenize", {"tokens": "7"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_cannot_be_meant_is_refused_by_field(
    model_dir: Path, path: str, body: dict[str, Any], param: str
) -> None:
    async with served(model_dir, *pair()) as (_, client):
        answer = await client.post(path, content=json.dumps(body))
        assert answer.status_code == (404 if param == "model" else 400)
        assert answer.json()["error"]["param"] == param


async def test_a_chat_is_what_the_template_makes_of_it() -> None:
    """The demo model's own: what the user says is a comment above the code."""
    demo = ROOT / "models" / "demo"
    codec = TextCodec(demo / "tokenizer.json")
    messages = [{"role": "user", "content": "Add\ntwo numbers."}]
    async with served(demo, *pair()) as (_, client):
        found = await post(client, "/tokenize", messages=messages)
        assert codec.decode(found["tokens"]) == "# Add\n# two numbers.\n"
