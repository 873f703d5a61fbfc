"""Request options over gRPC on the real engine whose effect other tests see over HTTP or in an engine alone."""

from __future__ import annotations

import pytest
from switchyard_client import (
    Finished,
    FinishReason,
    GenerationClient,
    GenerationRequest,
    SamplingParams,
    Started,
    Tokens,
)

from router.service.text import TextCodec
from tests.cluster.deaths import prompt
from tests.cluster.options.completions import NUM_TOKENS, TEXT
from tests.fake_cluster import FakeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


class Answer:
    """One stream to its end."""

    def __init__(self, client: GenerationClient, request: GenerationRequest) -> None:
        self.ids: list[int] = []
        self.text = ""
        for event in client.generate(request):
            if isinstance(event, Tokens):
                self.ids += event.ids
                self.text += event.text
            elif isinstance(event, Finished):
                self.reason, self.stats = event.reason, event.stats
            else:
                assert isinstance(event, Started)


@pytest.fixture(scope="module")
def grpc(cluster: FakeCluster) -> GenerationClient:
    return cluster.client()


def ask(grpc: GenerationClient, **options: object) -> Answer:
    return Answer(
        grpc, GenerationRequest(TEXT, SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 0.0} | options))
    )


def test_limits_that_leave_one_token_are_greedy(grpc: GenerationClient) -> None:
    greedy, hot = ask(grpc).ids, {"temperature": 2.0, "seed": 3}
    assert ask(grpc, **hot).ids != greedy
    for limit in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert ask(grpc, **hot, **limit).ids == greedy


def test_allowed_and_banned_tokens(grpc: GenerationClient) -> None:
    greedy = ask(grpc).ids
    allowed = sorted(set(greedy))[:2]
    assert set(ask(grpc, allowed_token_ids=tuple(allowed)).ids) <= set(allowed)
    assert not set(ask(grpc, banned_token_ids=tuple(allowed)).ids) & set(allowed)


def test_stops(grpc: GenerationClient, codec: TextCodec) -> None:
    plain = ask(grpc)
    index = next(i for i in range(4, len(plain.ids)) if plain.ids[i] not in plain.ids[:i])
    stopped = ask(grpc, stop_token_ids=(plain.ids[index],))
    assert stopped.text == codec.decode(plain.ids[:index])
    assert stopped.reason is FinishReason.STOP
    later = ask(grpc, stop_token_ids=(plain.ids[index],), min_tokens=index + 2)
    assert len(later.ids) >= index + 2

    stop = plain.text[10:16]
    before = plain.text[: plain.text.index(stop)]
    assert ask(grpc, stop=(stop,)).text == before
    assert ask(grpc, stop=(stop,), include_stop_str_in_output=True).text == before + stop


def test_a_salt_parts_the_cache(grpc: GenerationClient) -> None:
    ids, sampling = tuple(prompt(31, 90)), SamplingParams(max_tokens=2, temperature=0.0)

    def num_cached(salt: bytes) -> int:
        return Answer(grpc, GenerationRequest(ids, sampling, cache_salt=salt)).stats.num_cached_prompt_tokens

    assert [num_cached(salt) for salt in (b"", b"a", b"b")] == [0, 0, 0]
    assert [num_cached(salt) for salt in (b"", b"a", b"b")] == [80, 80, 80]
