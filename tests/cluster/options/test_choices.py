"""Several choices of a prompt: seeds that count up, one prompt's cache, and the best of many."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from switchyard_client import (
    Finished,
    GenerationError,
    GenerationRequest,
    PromptTokens,
    SamplingParams,
    Started,
    Tokens,
)

from router.service.text import TextCodec
from tests.cluster.deaths import prompt
from tests.cluster.options.completions import NUM_TOKENS, TEXT, complete
from tests.fake_cluster import FakeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_choices_have_seeds_that_count_up_and_share_their_prompt(
    cluster: FakeCluster, client: openai.OpenAI, codec: TextCodec
) -> None:
    ids = [*codec.encode(TEXT, True), *prompt(11, 70)]
    alone = [cluster.ask(cluster.client(), ids, NUM_TOKENS, temperature=0.9, seed=50 + i, logprobs=0) for i in range(4)]
    salted = {"prompt": ids, "temperature": 0.9, "seed": 50, "cache_salt": "mine"}
    answer = complete(client, n=4, return_token_ids=True, **salted)
    assert [choice.model_extra["token_ids"] for choice in answer.choices] == [one.ids for one in alone]
    costs = answer.model_extra["switchyard"]
    assert costs[0]["num_cached_prompt_tokens"] == 0
    whole_blocks = (len(ids) - 1) // 16 * 16
    for one in costs[1:]:
        assert one["num_computed_prompt_tokens"] <= len(ids) - whole_blocks
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 4 * NUM_TOKENS)
    streamed: list[list[int]] = [[] for _ in range(4)]
    for chunk in complete(client, n=4, return_token_ids=True, stream=True, **salted):
        for choice in chunk.choices:
            streamed[choice.index] += choice.model_extra["token_ids"]
    assert streamed == [one.ids for one in alone]
    means = [sum(one.logprob for one in answer.logprobs) / NUM_TOKENS for answer in alone]
    best = sorted(range(4), key=lambda i: -means[i])[:2]
    shown = complete(client, n=2, best_of=4, return_token_ids=True, **salted).choices
    assert [choice.model_extra["token_ids"] for choice in shown] == [alone[i].ids for i in best]
    assert [choice.index for choice in shown] == [0, 1]
    assert shown[0].logprobs is None


def test_many_choices_of_many_prompts_in_one_call(cluster: FakeCluster) -> None:
    grpc = cluster.client()
    options: dict[str, Any] = {"temperature": 0.9, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    requests = [GenerationRequest(tuple(prompt(i, 40)), SamplingParams(seed=70 + i, **options)) for i in (1, 2)]
    alone = [
        [cluster.ask(grpc, prompt(i, 40), 12, seed=70 + i + j, temperature=0.9, logprobs=0) for j in range(3)]
        for i in (1, 2)
    ]

    def many(n: int, best_of: int | None = None) -> list[list[int]]:
        ids: dict[int, list[int]] = {}
        ends: list[int] = []
        for index, event in grpc.generate_many(requests, n, best_of):
            if isinstance(event, Started):
                assert ids.setdefault(index, []) == []
            elif isinstance(event, Tokens):
                assert event.first_position == len(ids[index])
                ids[index] += event.ids
            elif isinstance(event, Finished):
                ends.append(index)
        assert sorted(ends) == sorted(ids) == list(range(2 * n))
        return [ids[index] for index in range(2 * n)]

    assert many(3) == [one.ids for answers in alone for one in answers]
    best = [sorted(answers, key=lambda one: -sum(each.logprob for each in one.logprobs))[:2] for answers in alone]
    assert many(2, 3) == [one.ids for answers in best for one in answers]
    for bad, param in (
        ((requests, 0), "n"),
        ((requests, 1, 0), "best_of"),
        ((requests, 1, 500), "best_of"),
        ((requests, 100), "n"),
        ((requests, 3, 2), "best_of"),
        (([],), "requests"),
    ):
        with pytest.raises(GenerationError, match=param):
            list(grpc.generate_many(*bad))
    plain = [GenerationRequest(one.prompt, SamplingParams(max_tokens=3, prompt_logprobs=1)) for one in requests]
    scored: dict[int, int] = {}
    for index, event in grpc.generate_many(plain, 1, 2):
        if isinstance(event, PromptTokens):
            scored[index] = scored.get(index, 0) + len(event.ids)
        elif isinstance(event, Tokens):
            assert not event.logprobs, "nobody asked for them"
    assert scored == {0: 40, 1: 40}
    broken = [requests[0], GenerationRequest((1,), SamplingParams(top_p=7.0))]
    with pytest.raises(GenerationError, match="top_p"):
        list(grpc.generate_many(broken))
