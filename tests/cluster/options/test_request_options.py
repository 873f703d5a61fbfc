"""Request options through a whole cluster with the real engine: by gRPC, by the openai client, through a death."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from router.service.text import TextCodec
from tests.cluster.deaths import Once, busy, prompt
from tests.cluster.options.completions import KINDS, NUM_TOKENS, NUMBERS, TEXT, complete
from tests.fake_cluster import FakeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_a_death(cluster: FakeCluster) -> None:
    grpc = cluster.client()
    alone = [cluster.ask(grpc, prompt(i), NUM_TOKENS, seed=7 + i, **kind).ids for i, kind in enumerate(KINDS)]
    assert alone[1] != cluster.ask(grpc, prompt(1), NUM_TOKENS, seed=8, **KINDS[0]).ids
    with ThreadPoolExecutor(32) as threads:
        jobs = [
            threads.submit(cluster.ask, grpc, prompt(i), NUM_TOKENS, seed=7 + i, **KINDS[i])
            for _ in range(6)
            for i in range(len(KINDS))
        ]
        assert [job.result().ids for job in jobs] == alone * 6
    for i, kind in enumerate(KINDS):
        killed: list[str] = []

        def kill(killed: list[str] = killed) -> None:
            killed.append(busy(cluster, "decode"))
            cluster.kill(killed[0])

        answer = cluster.ask(grpc, prompt(i), NUM_TOKENS, Once(9 + i, kill), seed=7 + i, **kind)
        assert answer.ids == alone[i]
        assert answer.finished is not None
        assert answer.finished.stats.num_replacements == 1
        cluster.start_worker(killed[0])
        cluster.wait_complete()
    answer = cluster.ask(grpc, prompt(2), NUM_TOKENS, Once(11, lambda: cluster.kill("router-0")), seed=9, **KINDS[2])
    assert answer.ids == alone[2]
    cluster.start_router("router-0")
    cluster.wait_complete()


def test_http_and_grpc_agree(cluster: FakeCluster, client: openai.OpenAI, codec: TextCodec) -> None:
    ids = codec.encode(TEXT, True)
    for kind in KINDS:
        options = dict(kind)
        if "logit_bias" in options:
            options["logit_bias"] = {str(key): value for key, value in options["logit_bias"].items()}
        if "grammar" in options:
            grammar = options.pop("grammar")
            options |= {"guided_regex": grammar.regex} if grammar.regex else {"guided_json": NUMBERS}
        text = complete(client, seed=4, **options).choices[0].text
        assert text == codec.decode(cluster.ask(cluster.client(), ids, NUM_TOKENS, seed=4, **kind).ids)


def test_bad_words_and_bans_do_not_come(client: openai.OpenAI, codec: TextCodec) -> None:
    plain = complete(client).choices[0].text
    assert "self" in plain
    ids = complete(client, bad_words=["self"], return_token_ids=True).choices[0].model_extra["token_ids"]
    for spelled in (codec.encode("self", False), codec.encode(" self", False)):
        assert all(ids[i : i + len(spelled)] != spelled for i in range(len(ids)))
    first = codec.encode(plain, False)[0]
    banned = complete(client, logit_bias={str(first): -100}).choices[0].text
    assert banned.startswith(codec.decode([first])) is False
    only = complete(client, allowed_token_ids=[first]).choices[0].text
    assert only == codec.decode([first] * NUM_TOKENS)


def test_stop_texts(client: openai.OpenAI, codec: TextCodec) -> None:
    plain = complete(client).choices[0].text
    stop = plain[10:16]  # wherever tokens begin and end
    before = plain[: plain.index(stop)]
    assert complete(client, stop=stop).choices[0].text == before
    shown = complete(client, stop=[stop], include_stop_str_in_output=True).choices[0]
    assert (shown.text, shown.finish_reason) == (before + stop, "stop")
    pieces = [chunk.choices[0].text for chunk in complete(client, stop=stop, stream=True)]
    assert "".join(pieces) == before
    held_off = complete(client, stop=stop, min_tokens=NUM_TOKENS).choices[0]
    assert (held_off.text, held_off.finish_reason) == (plain, "length")


def test_a_salt_parts_the_cache(cluster: FakeCluster, client: openai.OpenAI) -> None:
    ids = prompt(12, 90)

    def num_cached(**options: object) -> int:
        usage = complete(client, prompt=ids, max_tokens=2, **options).usage
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert [num_cached(), num_cached(cache_salt="a"), num_cached(cache_salt="b")] == [0, 0, 0]
    assert num_cached() == num_cached(cache_salt="a") == num_cached(cache_salt="b") == 80


def test_a_suffix_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        complete(client, suffix="return")
