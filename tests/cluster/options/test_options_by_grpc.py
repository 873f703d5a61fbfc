"""Request options over gRPC on the real engine whose effect other tests see over HTTP or in an engine alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from switchyard_client import FinishReason

from router.service.text import TextCodec
from tests.cluster.deaths import prompt
from tests.cluster.options.completions import NUM_TOKENS, TEXT
from tests.fake_cluster import Answer, FakeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def ask(cluster: FakeCluster, codec: TextCodec) -> Ask:
    """The same prompt with these options, greedy if they do not say otherwise."""
    client, ids = cluster.client(), codec.encode(TEXT, True)
    return lambda **options: cluster.ask(client, ids, NUM_TOKENS, **{"ignore_eos": False, **options})


def test_limits_that_leave_one_token_are_greedy(ask: Ask) -> None:
    greedy, hot = ask().ids, {"temperature": 2.0, "seed": 3}
    assert ask(**hot).ids != greedy
    for limit in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert ask(**hot, **limit).ids == greedy


def test_allowed_and_banned_tokens(ask: Ask) -> None:
    some = tuple(sorted(set(ask().ids))[:2])
    assert set(ask(allowed_token_ids=some).ids) <= set(some)
    assert not set(ask(banned_token_ids=some).ids) & set(some)


def test_stops(ask: Ask, codec: TextCodec) -> None:
    plain = ask()
    index = next(i for i in range(4, len(plain.ids)) if plain.ids[i] not in plain.ids[:i])
    stop_id = plain.ids[index]
    stopped = ask(stop_token_ids=(stop_id,))
    assert stopped.text == codec.decode(plain.ids[:index])
    assert stopped.finished is not None
    assert stopped.finished.reason is FinishReason.STOP
    assert len(ask(stop_token_ids=(stop_id,), min_tokens=index + 2).ids) >= index + 2

    stop = plain.text[10:16]  # wherever tokens begin and end
    before = plain.text[: plain.text.index(stop)]
    assert ask(stop=(stop,)).text == before
    assert ask(stop=(stop,), include_stop_str_in_output=True).text == before + stop


def test_a_salt_parts_the_cache(cluster: FakeCluster) -> None:
    client, ids = cluster.client(), prompt(31, 90)

    def num_cached(salt: bytes) -> int:
        finished = cluster.ask(client, ids, 2, cache_salt=salt).finished
        assert finished is not None
        return finished.stats.num_cached_prompt_tokens

    assert [num_cached(salt) for salt in (b"", b"a", b"b")] == [0, 0, 0]
    assert [num_cached(salt) for salt in (b"", b"a", b"b")] == [80, 80, 80]
