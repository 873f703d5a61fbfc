"""Request options through a whole cluster with the real engine: by gRPC, by the openai client, through a death."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
import torch
from switchyard_client import (
    Finished,
    GenerationError,
    GenerationRequest,
    Grammar,
    PromptTokens,
    SamplingParams,
    Started,
    Tokens,
)
from transformers import AutoModel

from router.service.text import TextCodec
from tests.cluster.test_kill_at_every_token import Once, busy, prompt
from tests.fake_cluster import DEMO, MODEL_NAME, FakeCluster, Shape
from tests.forked import Prefork

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

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


@pytest.fixture(scope="module")
def cluster(prefork: Prefork) -> Iterator[FakeCluster]:
    engine = {"runner": "torch", "batch_invariant": True, "max_num_seqs": 32}
    with FakeCluster(prefork, Shape(prefill=1, model_dir=str(DEMO), block_size=16, engine=engine)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: FakeCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http_urls[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(DEMO / "tokenizer.json")


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

    def many(n: int, best_of: int = 0) -> list[list[int]]:
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
        ((requests, 0, 500), "best_of"),
        ((requests, 100, 0), "n"),
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


def test_embeddings(cluster: FakeCluster, client: openai.OpenAI, codec: TextCodec) -> None:
    """By the openai client and by gRPC, as transformers has them, and through the death of a prefill worker."""
    texts = [TEXT, "import os", "def fib(n):"]
    model = AutoModel.from_pretrained(DEMO, dtype=torch.float32)

    def expected(text: str, pooling: str) -> list[float]:
        with torch.inference_mode():
            hidden = model(torch.tensor([codec.encode(text, True)])).last_hidden_state[0]
        chosen = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        return list((chosen / chosen.norm()).tolist())

    grpc = cluster.client()
    for pooling in ("last", "mean"):
        for encoding in ("float", "base64"):
            answer = client.embeddings.create(
                model=MODEL_NAME, input=texts, encoding_format=encoding, extra_body={"pooling": pooling}
            )
            assert [one.index for one in answer.data] == [0, 1, 2]
            assert answer.usage.prompt_tokens == sum(len(codec.encode(text, True)) for text in texts)
            for one, text in zip(answer.data, texts, strict=True):
                values = one.embedding
                if isinstance(values, str):
                    values = np.frombuffer(base64.b64decode(values), "<f4").tolist()
                assert values == pytest.approx(expected(text, pooling), abs=2e-4)
        assert grpc.embed(TEXT, pooling).values == pytest.approx(expected(TEXT, pooling), abs=2e-4)
    ids = tuple(codec.encode(TEXT, True))
    raw = grpc.embed(ids, is_raw=True)
    length = sum(value * value for value in raw.values) ** 0.5
    assert [value / length for value in raw.values] == pytest.approx(expected(TEXT, "last"), abs=2e-4)
    assert raw.num_prompt_tokens == len(ids)
    assert raw.worker_id.startswith("prefill-0")
    long_prompt = prompt(31, 1500)
    whole = grpc.embed(long_prompt, "mean")
    name = whole.worker_id.partition(".")[0]
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(grpc.embed, long_prompt, "mean") for _ in range(8)]
        wait(jobs, return_when=FIRST_COMPLETED)
        cluster.kill(name)
        answers = [job.result() for job in jobs]
    assert any(answer.worker_id != whole.worker_id for answer in answers)
    for answer in answers:
        assert answer.values == pytest.approx(whole.values, abs=1e-5)
    cluster.start_worker(name)
    cluster.wait_complete()
    for options, param in (
        ({"input": []}, "input"), ({"input": ""}, "input"), ({"input": [[9999]]}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"), ({"extra_body": {"pooling": "max"}}, "pooling"),
        ({"input": "x " * 4000}, "input"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refusal:
            client.embeddings.create(**{"model": MODEL_NAME, "input": "x", **options})
        assert refusal.value.param == param
    with pytest.raises(GenerationError, match="prompt"):
        grpc.embed("")


def test_a_salt_parts_the_cache(cluster: FakeCluster, client: openai.OpenAI) -> None:
    ids = prompt(12, 90)

    def num_cached(**options: object) -> int:
        usage = complete(client, prompt=ids, max_tokens=2, **options).usage
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert [num_cached(), num_cached(cache_salt="a"), num_cached(cache_salt="b")] == [0, 0, 0]
    assert num_cached() == num_cached(cache_salt="a") == num_cached(cache_salt="b") == 80


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chats_answer_in_the_form_that_response_format_asks_for(client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 200}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = client.chat.completions.create(**ask, n=4, seed=1, logprobs=True, top_logprobs=2, response_format=schema)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 4
    people = [json.loads(choice.message.content) for choice in answer.choices]
    assert len({json.dumps(person) for person in people}) > 1
    for person, choice in zip(people, answer.choices, strict=True):
        jsonschema.validate(person, PERSON)
        assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
    chunks = client.chat.completions.create(**ask, seed=1, stream=True, response_format=schema)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.choices[0].message.content
    whole = client.chat.completions.create(
        **{**ask, "max_tokens": 500}, seed=4, response_format={"type": "json_object"}
    )
    if whole.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(whole.choices[0].message.content), dict)
    else:
        assert whole.choices[0].message.content.startswith("{")
    plain = client.chat.completions.create(**ask, seed=1, response_format={"type": "text"})
    assert plain.choices[0].message.content == client.chat.completions.create(**ask, seed=1).choices[0].message.content


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"structured_outputs": {"regex": "[a-c]{3,9}"}}, "[a-c]{3,9}"),
        ({"guided_choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"structured_outputs": {"choice": ["left", "right"]}, "temperature": 0}, "left|right"),
        ({"guided_grammar": 'root ::= "(" [0-9]+ ("+" [0-9])* ")"'}, r"\([0-9]+(\+[0-9])*\)"),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: /x{2,4}/'}}, "ax{2,4}"),
    ],
)
def test_other_forms(client: openai.OpenAI, options: dict[str, Any], form: str) -> None:
    choice = shaped(client, **options).choices[0]
    assert re.fullmatch(form, choice.text)
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "param", "reason"),
    [
        ({"guided_json": {"not": {}}}, "guided_json", "not"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "must not be empty"),
        ({"structured_outputs": {"json": {"type": "colour"}}}, "structured_outputs.json", "colour"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.choice",
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {"jsonn": {}}}, "structured_outputs", "jsonn"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "cannot be combined with guided_json"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "is not possible with a grammar"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "is not possible with a grammar"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is needed"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format", "schema"),
    ],
)
def test_forms_that_cannot_be_held_to_are_refused_by_field(
    client: openai.OpenAI, options: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        shaped(client, **options)
    assert refusal.value.param == param
    assert refusal.value.message.count(param) >= 1
    assert reason in str(refusal.value)
    assert shaped(client, guided_regex="a{3}").choices[0].text == "aaa"


def test_a_dead_end_is_the_clients_error(client: openai.OpenAI, codec: TextCodec) -> None:
    banned = [token_id for token_id in range(4096) if "z" in codec.decode([token_id])]
    with pytest.raises(openai.BadRequestError, match="no token is left") as refusal:
        shaped(client, guided_regex="aaz", banned_token_ids=banned)
    assert refusal.value.param == "guided_regex"
    assert shaped(client, guided_regex="aaz").choices[0].text == "aaz"
