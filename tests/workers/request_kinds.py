"""Requests of all kinds of sampling options, for tests in which each must get the tokens that it gets alone."""

from __future__ import annotations

import json
from dataclasses import replace

from grammars.grammar import Grammar, GrammarKind
from tests.workers.tiny_llama import END_ID
from workers.sampling.params import SamplingParams

MAX_TOKENS = 36
BASE = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
PENALISED = replace(
    BASE, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4, logit_bias={5: 3.0, 60: -2.0},
    banned_token_ids=[17], banned_sequences=[[5, 9], [44]], min_tokens=4, stop_token_ids=frozenset({96}),
)  # fmt: skip
RECORD = Grammar(GrammarKind.JSON_SCHEMA, json.dumps({
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"type": "integer"}},
    "required": ["name", "n"], "additionalProperties": False,
}))  # fmt: skip
FORMED = replace(BASE, ignore_eos=False, stop_token_ids=frozenset({END_ID}), grammar=RECORD)
KINDS = [
    BASE,
    PENALISED,
    replace(PENALISED, temperature=0.9, top_p=0.95, top_k=40, min_p=0.02),
    replace(PENALISED, temperature=1.2, typical_p=0.9),
    replace(BASE, temperature=1.0),
    replace(BASE, temperature=0.8, frequency_penalty=2.0, allowed_token_ids=list(range(3, 95))),
    replace(FORMED, temperature=1.0),
    replace(FORMED, temperature=0.9, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.4, banned_token_ids=[17]),
    replace(FORMED, grammar=Grammar(GrammarKind.REGEX, "([a-f]{2}-){1,5}x")),
]


def prompt(number: int) -> list[int]:
    return [(7 * number + 3 * i * i) % 97 for i in range(3 + number % 9)]


def options(number: int) -> SamplingParams:
    return replace(KINDS[number % len(KINDS)], seed=1000 + number)
