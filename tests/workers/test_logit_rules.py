"""Penalties, bias, bans and filters against their definitions, written out one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.chi_square import p_value
from workers.parallel import ParallelGroups, Shard
from workers.sampling.logit_rules import ChosenRows, LogitRules
from workers.sampling.params import NO_TOKEN, SamplingParams, SamplingRows
from workers.sampling.sampler import sample

VOCAB = 53
ALONE = ParallelGroups(Shard(), torch.device("cpu"))
PROMPT, COMPLETION = [3, 9, 9, 40, 52], [7, 9, 7, 7, 0]
RULES = SamplingParams(
    temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2, min_tokens=6, seed=5,
    logit_bias={7: -3.0, 11: 2.5, 52: 50.0}, allowed_token_ids=[0, 3, 5, 7, 9, 11, 12, 40, 52],
    banned_token_ids=[12], banned_sequences=[[40], [7, 0, 11], [0, 3], [9, 0, 5]],
)  # fmt: skip
STOP_IDS = [9, 50]


def processed(logits: list[float], prompt: list[int], completion: list[int], s: SamplingParams) -> list[float]:
    """One row, by the definitions."""
    out = []
    for token_id, logit in enumerate(logits):
        logit += s.logit_bias.get(token_id, 0.0)
        if s.allowed_token_ids and token_id not in s.allowed_token_ids:
            logit = -math.inf
        if token_id in s.banned_token_ids:
            logit = -math.inf
        for *before, last in s.banned_sequences:
            if token_id == last and completion[len(completion) - len(before) :] == before:
                logit = -math.inf
        if len(completion) < s.min_tokens and token_id in STOP_IDS:
            logit = -math.inf
        if token_id in prompt or token_id in completion:
            logit = logit / s.repetition_penalty if logit > 0 else logit * s.repetition_penalty
        if token_id in completion:
            logit -= s.presence_penalty + s.frequency_penalty * completion.count(token_id)
        out.append(logit)
    return out


def at_rows(rows: list[int], positions: list[int], drafts: list[list[int]]) -> ChosenRows:
    """drafts: that precede each row; a token that does not count stands before each run."""
    token_ids, batch_rows = [], []
    for i, before in enumerate(drafts):
        if i and before and drafts[i - 1] == before[:-1]:
            token_ids.append(before[-1])
        else:
            token_ids += [99, *before]
        batch_rows.append(len(token_ids) - 1)
    return ChosenRows(
        np.array(rows), np.array(positions), np.array([len(d) for d in drafts]),
        torch.tensor(batch_rows), torch.tensor(token_ids),
    )  # fmt: skip


def random_logits(num_rows: int) -> Tensor:
    return 2 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_logits_are_changed_as_defined(num_shards: int) -> None:
    """Of two rows with rules and one without, in both halves of the vocabulary, as tokens come one after the other."""
    other = SamplingParams(frequency_penalty=1.5)
    history, known = [*PROMPT, *COMPLETION], {2: list(COMPLETION), 0: [1]}
    share = -(-VOCAB // num_shards)
    parts = [LogitRules(4, rank * share, share, torch.device("cpu")) for rank in range(num_shards)]
    for rules in parts:
        rules.take(2, RULES, len(PROMPT), history, STOP_IDS)
        rules.take(0, other, 2, [8, 8, 1], ())
    has_rules = np.array([True, False, True])
    for tokens in ([11, 1, 3], [7, 2, 1], [9, 4, 1], [3, 0, 2]):
        chosen = at_rows([2, 1, 0], [len(known[2]), 4, len(known[0])], [[], [], []])
        logits = random_logits(3)
        padded = torch.nn.functional.pad(logits, (0, share * num_shards - VOCAB))
        shares = zip(parts, padded.split(share, 1), strict=True)
        found = torch.cat([rules.apply(part.clone(), has_rules, chosen) for rules, part in shares], dim=1)[:, :VOCAB]
        expected = torch.stack([
            torch.tensor(processed(logits[0].tolist(), PROMPT, known[2], RULES)),
            logits[1],
            torch.tensor(processed(logits[2].tolist(), [8, 8], known[0], other)),
        ])  # fmt: skip
        torch.testing.assert_close(found, expected)
        for rules in parts:
            rules.note(torch.tensor(tokens), has_rules, chosen)
        known[2].append(tokens[0])
        known[0].append(tokens[2])


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_drafts_count_once_they_are_chosen(num_right: int) -> None:
    drafts = [7, 0, 11]
    chosen = [*drafts[:num_right], 9, 1, 1, 1][:4]  # what follows a wrong draft stands for nothing
    rules = LogitRules(2, 0, VOCAB, torch.device("cpu"))
    rules.take(1, RULES, len(PROMPT), [*PROMPT, *COMPLETION], STOP_IDS)
    logits, runs = random_logits(4), [drafts[:count] for count in range(4)]
    rows = at_rows([1] * 4, [5, 6, 7, 8], runs)
    found = rules.apply(logits.clone(), np.ones(4, np.bool_), rows)
    expected = [processed(logits[i].tolist(), PROMPT, [*COMPLETION, *runs[i]], RULES) for i in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected))
    rules.note(torch.tensor(chosen), np.ones(4, np.bool_), rows)
    known = [*COMPLETION, *chosen[: num_right + 1]]
    found = rules.apply(logits[:1].clone(), np.ones(1, np.bool_), at_rows([1], [len(known)], [[]]))
    torch.testing.assert_close(found[0], torch.tensor(processed(logits[0].tolist(), PROMPT, known, RULES)))


def test_a_row_that_is_taken_again_begins_anew() -> None:
    rules = LogitRules(1, 0, VOCAB, torch.device("cpu"))
    rules.take(0, RULES, len(PROMPT), [*PROMPT, *COMPLETION], STOP_IDS)
    rules.take(0, SamplingParams(presence_penalty=1.0), 1, [4, 6], ())
    logits = random_logits(1)
    found = rules.apply(logits.clone(), np.ones(1, np.bool_), at_rows([0], [1], [[]]))
    expected = processed(logits[0].tolist(), [4], [6], SamplingParams(presence_penalty=1.0))
    torch.testing.assert_close(found[0], torch.tensor(expected))


# ------------------------------------------------------------------------------------------------------- distributions
def distribution(logits: list[float], s: SamplingParams) -> list[float]:
    """What sampling must follow: typical_p, then top_k, top_p and min_p, one after the other."""
    weights = [math.exp(logit / s.temperature) for logit in logits]
    p = [weight / sum(weights) for weight in weights]

    def renormalised(kept: set[int]) -> list[float]:
        total = sum(p[i] for i in kept)
        return [p[i] / total if i in kept else 0.0 for i in range(len(p))]

    def first_of(order: list[int], share: float) -> set[int]:
        kept: set[int] = set()
        while sum(p[i] for i in kept) < share - 1e-12:
            kept.add(order[len(kept)])
        return kept

    if s.typical_p < 1:
        entropy = -sum(x * math.log(x) for x in p)
        p = renormalised(first_of(sorted(range(len(p)), key=lambda i: abs(-math.log(p[i]) - entropy)), s.typical_p))
    by_size = sorted(range(len(p)), key=lambda i: -p[i])
    if s.top_k:
        p = renormalised(set(by_size[: s.top_k]))
    if s.top_p < 1:
        p = renormalised(first_of(by_size, s.top_p))
    if s.min_p > 0:
        p = renormalised({i for i, x in enumerate(p) if x >= s.min_p * max(p)})
    return p


SHAPES = [
    {},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.12},
    {"typical_p": 0.6},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"typical_p": 0.7, "top_k": 9, "top_p": 0.9},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(shape) or "plain")
@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_samples_follow_the_exact_distribution(shape: dict[str, float], temperature: float) -> None:
    """Four thousand positions of one seed, sixty-four at a time."""
    s = SamplingParams(temperature=temperature, seed=20261129, **shape)
    logits = random_logits(1)[0]
    rows = SamplingRows.greedy(64)
    for row in range(64):
        rows.put(row, s)
    counts = [0] * VOCAB
    for first in range(0, 4096, 64):
        positions = np.arange(first, first + 64)
        for token in sample(logits.expand(64, VOCAB), rows, positions, ALONE, VOCAB).tolist():
            counts[token] += 1
    assert p_value(counts, distribution(logits.tolist(), s)) > 0.001


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Greedy, plain and filtered rows, few candidates and many, alone and together."""
    logits = 3 * torch.randn(12, 3000, generator=torch.Generator().manual_seed(4))
    logits[7] = torch.randn(3000).round()  # thousands of ties
    logits[8] = float("nan")
    params = [
        SamplingParams(temperature=(0.0, 0.7, 1.0, 3.0)[i % 4], seed=i, **SHAPES[i % len(SHAPES)]) for i in range(12)
    ]
    params[9] = SamplingParams(temperature=9.0, top_p=0.99)  # a nucleus of more than 1,024 tokens
    params[11] = SamplingParams(temperature=1.0, top_k=2000, top_p=0.999)
    rows = SamplingRows.greedy(12)
    for row, s in enumerate(params):
        rows.put(row, s)
    positions = np.arange(12)
    together = sample(logits, rows, positions, ALONE, 3000).tolist()
    alone = [
        int(sample(logits[i : i + 1], rows.of(slice(i, i + 1)), positions[i : i + 1], ALONE, 3000)) for i in range(12)
    ]
    assert together == alone
    assert together[8] == NO_TOKEN
