"""The three workloads of the peer table, and what a figure is. Pure: knows neither engines nor processes.

    single   one prompt of 512 tokens, 128 new ones: TTFT, and tokens per second after the first
    batch    16 prompts of 64 to 512 tokens at once, 64 new ones each: output tokens per second
    prefix   8 prompts one after the other that share their first 1,024 tokens and have 32 of their own, 16 new ones
             each: mean TTFT of all but the first, which fills the cache

A workload is a list of calls; the prompts of one call are sent together, and a call begins when the one before it has
ended. All prompts are token ids of a seeded generator, other ones in each round, so that no round finds the prefixes of
an earlier one in a cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

FIRST_ID = 300  # ids below may mean bytes or the end of text
_SINGLE_PROMPT, _SINGLE_NEW = 512, 128
_BATCH_SIZE, _BATCH_NEW = 16, 64
_BATCH_SHORTEST, _BATCH_LONGEST = 64, 512
_PREFIX_REQUESTS, _PREFIX_SHARED, _PREFIX_OWN, _PREFIX_NEW = 8, 1024, 32, 16
_STEP_PROMPT, _STEP_NEW = 1, 65
_WARM_UP_NEW = 4

CONTEXT_TOKENS = 2048
"""Enough for every request."""


@dataclass(frozen=True, slots=True)
class Call:
    """Prompts that are sent together."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int  # new ones of each prompt, whatever the model says


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt's answer; times in seconds since its call began."""

    first_s: float
    end_s: float
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Quantity:
    """One column of the table."""

    name: str
    title: str
    unit: str
    more_is_better: bool


TTFT = Quantity("single.ttft", "TTFT, 512 tokens", "s", False)
DECODE = Quantity("single.decode", "decode, one stream", "tokens/s", True)
BATCH = Quantity("batch.output", "16 requests", "tokens/s", True)
PREFIX = Quantity("prefix.warm_ttft", "TTFT, warm prefix of 1,024", "s", False)
QUANTITIES = {quantity.name: quantity for quantity in (TTFT, DECODE, BATCH, PREFIX)}


def calls_of(workload: str, vocab_size: int, seed: int) -> list[Call]:
    """Of `single`, `batch` or `prefix`; equal for equal arguments."""
    rng = random.Random(f"{workload} {vocab_size} {seed}")  # a text: hash() of a tuple would differ by process

    def ids(count: int) -> list[int]:
        return [rng.randrange(FIRST_ID, vocab_size) for _ in range(count)]

    match workload:
        case "single":
            return [Call([ids(_SINGLE_PROMPT)], _SINGLE_NEW)]
        case "batch":
            step = (_BATCH_LONGEST - _BATCH_SHORTEST) / (_BATCH_SIZE - 1)
            return [Call([ids(round(_BATCH_SHORTEST + step * i)) for i in range(_BATCH_SIZE)], _BATCH_NEW)]
        case "prefix":
            shared = ids(_PREFIX_SHARED)
            return [Call([shared + ids(_PREFIX_OWN)], _PREFIX_NEW) for _ in range(_PREFIX_REQUESTS)]
    raise ValueError(f"no workload {workload!r}")


def warm_up(vocab_size: int) -> list[Call]:
    """Smaller calls of both kinds: some engines compile for sizes that they have not seen."""
    single, batch = calls_of("single", vocab_size, -1) + calls_of("batch", vocab_size, -1)
    quarters = [prompt[: len(prompt) // 4] for prompt in batch.prompts]
    return [Call(single.prompts, _WARM_UP_NEW), Call(quarters, _WARM_UP_NEW)]


def step_call(vocab_size: int, seed: int) -> Call:
    """One stream on a prompt of one token: every step is a decode step, on a short context."""
    rng = random.Random(f"step {vocab_size} {seed}")
    return Call([[rng.randrange(FIRST_ID, vocab_size) for _ in range(_STEP_PROMPT)]], _STEP_NEW)


def prompt_call(vocab_size: int, seed: int) -> Call:
    """A prompt as long as that of `single`, and one token: a TTFT."""
    rng = random.Random(f"prompt {vocab_size} {seed}")
    return Call([[rng.randrange(FIRST_ID, vocab_size) for _ in range(_SINGLE_PROMPT)]], 1)


def check(call: Call, completions: Sequence[Completion]) -> None:
    """Raises ValueError when an engine did other work than it was given."""
    lengths = [len(completion.token_ids) for completion in completions]
    if lengths != [call.max_tokens] * len(call.prompts):
        raise ValueError(f"{len(call.prompts)} times {call.max_tokens} tokens were asked for, {lengths} came")


def figures_of(workload: str, answers: Sequence[Sequence[Completion]]) -> dict[str, float]:
    """By the names of QUANTITIES. answers: of each call, in order."""
    match workload:
        case "single":
            ((one,),) = answers
            return {TTFT.name: one.first_s, DECODE.name: (len(one.token_ids) - 1) / (one.end_s - one.first_s)}
        case "batch":
            (together,) = answers
            num_tokens = sum(len(one.token_ids) for one in together)
            return {BATCH.name: num_tokens / max(one.end_s for one in together)}
        case "prefix":
            return {PREFIX.name: fmean(one.first_s for (one,) in answers[1:])}
    raise ValueError(f"no workload {workload!r}")
