"""Completions of one text by the openai client, and kinds of options to ask with."""

from __future__ import annotations

import json
from typing import Any

import openai
from switchyard_client import Grammar

from tests.fake_model import MODEL_NAME

NUM_TOKENS = 40
TEXT = "def fibonacci(n):"
PENALISED: dict[str, Any] = {
    "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {260: 1.5},
    "banned_token_ids": (300,), "bad_words": ("return", "self"), "min_tokens": 5,
}  # fmt: skip
NUMBERS = {"type": "array", "minItems": 16, "items": {"type": "integer", "minimum": 0}}
ASSIGNMENTS = Grammar(regex="([a-z]+ = [0-9]{1,3};\n){20,}")
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, **PENALISED},
    {"temperature": 0.9, "min_p": 0.02, "top_k": 50, **PENALISED},
    {"temperature": 1.0, "typical_p": 0.9},
    {"temperature": 1.0, "ignore_eos": False, "grammar": Grammar(json_schema=json.dumps(NUMBERS))},
    {"temperature": 0.9, "ignore_eos": False, "grammar": ASSIGNMENTS, "frequency_penalty": 0.3},
]


def complete(client: openai.OpenAI, **options: Any) -> Any:
    """One completion of TEXT; options that the client does not know travel as they are."""
    known = {"temperature": 0, "max_tokens": NUM_TOKENS, "prompt": TEXT}
    extra = {name: options.pop(name) for name in tuple(options) if name not in OPENAI}
    return client.completions.create(model=MODEL_NAME, **{**known, **options}, extra_body={"ignore_eos": True, **extra})


def shaped(client: openai.OpenAI, **options: Any) -> Any:
    """A completion that ends where its form does."""
    return complete(client, **{"ignore_eos": False, "max_tokens": 200, "temperature": 1.0, "seed": 5, **options})


OPENAI = frozenset((
    "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "best_of", "echo", "logprobs", "stream",
    "presence_penalty", "frequency_penalty", "logit_bias", "stream_options",
))  # fmt: skip
