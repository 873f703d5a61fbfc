"""Logprobs of tokens and of prompts through a whole cluster, also when a worker or router dies."""

from __future__ import annotations

import openai
import pytest

from router.service.text import TextCodec
from tests.cluster.deaths import Once, busy, prompt
from tests.cluster.options.completions import KINDS, NUM_TOKENS, TEXT, complete
from tests.fake_cluster import FakeCluster
from tests.fake_model import MODEL_NAME

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", [0, 2])
def test_logprobs_come_whole_through_deaths(cluster: FakeCluster, kind: int) -> None:
    grpc, options = cluster.client(), {"seed": 3, "logprobs": 4, **KINDS[kind]}
    whole = cluster.ask(grpc, prompt(5), NUM_TOKENS, **options)
    assert len(whole.logprobs) == len(whole.ids) == NUM_TOKENS
    for token_id, one in zip(whole.ids, whole.logprobs, strict=True):
        assert list(one.top_logprobs) == sorted(one.top_logprobs, reverse=True)
        assert len(one.top_ids) == 4
        if token_id in one.top_ids:
            assert one.logprob == one.top_logprobs[one.top_ids.index(token_id)]
        assert kind or one.top_ids[0] == token_id
    killed: list[str] = []

    def kill() -> None:
        killed.append(busy(cluster, "decode"))
        cluster.kill(killed[0])

    assert cluster.ask(grpc, prompt(5), NUM_TOKENS, Once(13, kill), **options).logprobs == whole.logprobs
    cluster.start_worker(killed[0])
    cluster.wait_complete()
    again = cluster.ask(grpc, prompt(5), NUM_TOKENS, Once(17, lambda: cluster.kill("router-0")), **options)
    assert (again.ids, again.logprobs) == (whole.ids, whole.logprobs)
    cluster.start_router("router-0")
    cluster.wait_complete()


def test_completions_have_openais_logprobs(cluster: FakeCluster, client: openai.OpenAI, codec: TextCodec) -> None:
    expected = cluster.ask(cluster.client(), codec.encode(TEXT, True), NUM_TOKENS, logprobs=3)
    whole = complete(client, logprobs=3).choices[0]
    tokens = [codec.bytes_alone(token_id).decode(errors="replace") for token_id in expected.ids]
    assert whole.logprobs.tokens == tokens
    assert whole.logprobs.token_logprobs == [one.logprob for one in expected.logprobs]
    assert whole.logprobs.text_offset == [len("".join(tokens[:i])) for i in range(NUM_TOKENS)]
    for top, one in zip(whole.logprobs.top_logprobs, expected.logprobs, strict=True):
        assert sorted(top.values(), reverse=True)[:3] == sorted(one.top_logprobs, reverse=True)
    parts = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in parts if part for x in getattr(part, name)] == getattr(whole.logprobs, name)
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs == [None] * NUM_TOKENS


def test_logprobs_of_the_prompt(cluster: FakeCluster, client: openai.OpenAI, codec: TextCodec) -> None:
    """Through a prefill worker that dies with them, by gRPC, by echo and in vLLM's field."""
    ids, grpc = [*codec.encode(TEXT, True), *prompt(21, 300)], cluster.client()
    known = cluster.ask(grpc, ids, 3)
    answer = cluster.ask(grpc, ids, 3, prompt_logprobs=2, logprobs=1)
    assert (answer.prompt_ids, answer.ids) == (ids, known.ids)
    assert answer.prompt_logprobs[0] is None
    assert all(one is not None and one.logprob < 0 and len(one.top_ids) == 2 for one in answer.prompt_logprobs[1:])
    scored = cluster.ask(grpc, [*ids, *answer.ids], 1, prompt_logprobs=1)
    for one, again in zip(answer.logprobs, scored.prompt_logprobs[len(ids) :], strict=True):
        assert again is not None
        assert again.logprob == pytest.approx(one.logprob, abs=1e-3)
        assert again.top_ids == one.top_ids
    whole = complete(client, prompt=ids, max_tokens=2, n=2, echo=True, logprobs=2)
    streamed = list(complete(client, prompt=ids, max_tokens=2, n=2, echo=True, logprobs=2, stream=True))
    for choice in whole.choices:
        assert choice.text == codec.decode(ids) + codec.decode(known.ids[:2])
        assert choice.logprobs.token_logprobs[: len(ids)] == [one and one.logprob for one in answer.prompt_logprobs]
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(ids) + 2
        assert choice.logprobs.top_logprobs[0] is None
        parts = [c for chunk in streamed for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for part in parts if part.logprobs for x in getattr(part.logprobs, name)] == getattr(
                choice.logprobs, name
            )
    field = complete(client, prompt=ids, max_tokens=1, prompt_logprobs=1).choices[0].model_extra["prompt_logprobs"]
    assert field[0] is None
    assert [entry[str(i)]["logprob"] for entry, i in zip(field[1:], ids[1:], strict=True)] == [
        one.logprob for one in answer.prompt_logprobs[1:] if one is not None
    ]
    chat = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "hi"}], max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens
    for options, param in (
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            complete(client, **options)
        assert refusal.value.param == param
