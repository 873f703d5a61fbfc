"""A router whose only worker says a given text, as a model of some family would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import openai
from tokenizers import AddedToken, Tokenizer

from kvstore.connect import open_journal
from router.parsers.families import family_of
from router.service.text import TextCodec
from tests.router.conftest import DEMO, Cluster, running_cluster
from tests.router.fake_worker import CONTEXT_TOKENS, FakeWorker

ARGUMENTS = '{"city": "Köln"}'

MakeModel = Callable[[str], Path]
"""From a chat template."""


def write_model(directory: Path, template: str) -> Path:
    """A model directory with this chat template, in whose vocabulary its family's markers are special tokens."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    family = family_of(template)
    markers = (*(family.calls.markers if family.calls else ()), *(family.reasoning or ()))
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"max_position_embeddings": CONTEXT_TOKENS, "vocab_size": tokenizer.get_vocab_size()}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


@asynccontextmanager
async def saying(directory: Path, text: str) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeWorker, Cluster]]:
    """A client of a router whose only worker answers with this text."""
    worker = FakeWorker("mixed-0", "mixed")
    worker.answer = TextCodec(directory / "tokenizer.json").encode(text, add_special_tokens=False)
    worker.step_s = 0.002  # events of one token, not of all
    async with (
        running_cluster(directory, worker, journal=open_journal(f"file://{directory}/streams.journal", "")) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, worker, cluster
