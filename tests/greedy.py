"""Prompts of several lengths, asked of a cluster at once, and the greedy tokens that transformers gives for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from switchyard_client import Finished, GenerationClient, GenerationRequest, SamplingParams, Tokens

from tests.workers.tiny_llama import generate_with_transformers

LENGTHS = (5, 40, 100, 150, 64, 33)
MAX_TOKENS = 24


def prompt(length: int) -> list[int]:
    """Other tokens for each length."""
    return torch.randint(1, 4000, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def expected(model: Path) -> list[list[int]]:
    """The right tokens."""
    return [generate_with_transformers(model, prompt(length), MAX_TOKENS) for length in LENGTHS]


def ask_all_at_once(target: str) -> list[tuple[list[int], Finished]]:
    """The prompts of all lengths: what came, and how it ended."""

    async def ask() -> list[tuple[list[int], Finished]]:
        async with GenerationClient(target) as client:
            return await asyncio.gather(*(_complete(client, prompt(n)) for n in LENGTHS))

    return asyncio.run(ask())


async def _complete(client: GenerationClient, token_ids: list[int]) -> tuple[list[int], Finished]:
    tokens: list[int] = []
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    async for event in client.generate_async(GenerationRequest(tuple(token_ids), sampling)):
        if isinstance(event, Tokens):
            assert event.first_position == len(tokens)
            tokens += event.ids
        elif isinstance(event, Finished):
            return tokens, event
    raise AssertionError("the stream ended without a Finished")
