"""Right answers through a whole cluster: text after the prompt's, chats as their template needs them, ends, defaults.

The model's vocabulary is SentencePiece's style: pieces that begin with U+2581 have a space before them. The fake
engine's tokens are known beforehand, so the tests say what each answer must be; transformers renders and encodes chats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from switchyard_client import GenerationRequest, SamplingParams, Tokens
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from router.service.text import TextCodec
from tests.cluster.deaths import Once
from tests.fake_cluster import FakeCluster
from tests.fake_model import MODEL_NAME, SIZES
from tests.fake_shape import Shape
from tests.forked import Prefork
from tests.router.chat_templates import QWEN3
from workers.runtime.fake.model import fake_completion

pytestmark = [pytest.mark.cluster]

ENDS = ("<|endoftext|>", "<|eot|>", "<|im_end|>", "</s>")  # two of config.json, the template's, the tokenizer's
SPECIAL = ("<s>", *ENDS, "<|im_start|>")
WORDS = ["\u2581the", "\u2581capital", "\u2581is", "\u2581Paris", "is", "ing", "\u4f60", "\u00e9"]
NUM_TOKENS = 40
DEFAULT_LIMIT = 300  # tokens of a chat that names no limit


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pieces")
    pieces = ["<unk>", "\u2581", *(chr(code) for code in range(33, 127)), "\n", *WORDS]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    config = {**SIZES, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": [ids["<|endoftext|>"], ids["<|eot|>"]]}
    generation = {"eos_token_id": None, "temperature": 0.0, "max_new_tokens": DEFAULT_LIMIT}
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": QWEN3}
    for name, content in (
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer_config),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def cluster(prefork: Prefork, model_dir: Path) -> Iterator[FakeCluster]:
    shape = Shape(prefill=1, decode=1, mixed=0, routers=2, model_dir=str(model_dir), step_s=0.003)
    with FakeCluster(prefork, shape) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: FakeCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http_urls[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(model_dir), clean_up_tokenization_spaces=False)


def tokens_after(oracle: PreTrainedTokenizerFast, prompt: Sequence[int], num_tokens: int, **sampling: Any) -> list[int]:
    """What the fake engine says, whatever may end it."""
    return fake_completion(prompt, num_tokens, len(oracle), **sampling)


def text_after(oracle: PreTrainedTokenizerFast, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Of the completion, in decoding all at once."""
    whole = oracle.decode([*prompt, *ids], skip_special_tokens=True)
    return whole[len(oracle.decode(prompt, skip_special_tokens=True)) :]


def prompt_before_a_space(oracle: PreTrainedTokenizerFast, minimum: int = 4) -> list[int]:
    """A prompt after which the first token has a space before it."""
    letters = oracle.convert_tokens_to_ids(["t", "h", "e"])
    for number in range(10_000):
        prompt = [letters[number // 3**i % 3] for i in range(minimum + 6)]
        first = oracle.convert_ids_to_tokens(tokens_after(oracle, prompt, 1))[0]
        if first.startswith("\u2581") and len(first) > 1:
            return prompt
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_first_space_is_there_and_stops_match_it(
    client: openai.OpenAI, oracle: PreTrainedTokenizerFast, is_stream: bool
) -> None:
    prompt = prompt_before_a_space(oracle)
    text = text_after(oracle, prompt, tokens_after(oracle, prompt, NUM_TOKENS))
    assert text.startswith(" ")

    def ask(stop: str | None) -> tuple[str, str | None]:
        answer = client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            stop=stop,
            stream=is_stream,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        chunks = list(answer) if is_stream else [answer]
        return "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason

    assert ask(None) == (text, "length")
    assert ask(text[:4]) == ("", "stop")


def test_the_text_goes_on_after_a_router_and_a_worker_died(
    cluster: FakeCluster, oracle: PreTrainedTokenizerFast, model_dir: Path
) -> None:
    for position, victim in ((0, "router-0"), (1, "router-0"), (20, "router-0"), (1, "decode-0")):
        prompt = prompt_before_a_space(oracle, 4 + position)

        def end(victim: str = victim) -> None:
            cluster.kill(victim)
            if victim in cluster.workers:
                cluster.restart(victim)

        answer = cluster.ask(cluster.client(), prompt, NUM_TOKENS, Once(position, end))
        assert answer.ids == tokens_after(oracle, prompt, NUM_TOKENS)
        assert answer.text == text_after(oracle, prompt, answer.ids)
        if victim in cluster.routers:
            cluster.start_router(victim)
        cluster.wait_complete()


CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "The weather "}, {"type": "text", "text": "in Paris?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"},
]


@pytest.mark.parametrize("is_thinking", [True, False])
def test_a_chat_reaches_the_model_as_transformers_renders_it(
    client: openai.OpenAI, oracle: PreTrainedTokenizerFast, is_thinking: bool
) -> None:
    copied = [dict(message) for message in MESSAGES]
    copied[1]["content"] = "The weather in Paris?"  # the template prints no parts
    rendered = oracle.apply_chat_template(
        copied, tokenize=False, add_generation_prompt=True, enable_thinking=is_thinking
    )
    assert "weather" in rendered.split("<tool_call>")[1]
    prompt = oracle.encode(rendered, add_special_tokens=False)
    options = {"enable_thinking": is_thinking}
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,
        max_tokens=8,
        max_completion_tokens=7,  # the newer name is the one that counts
        extra_body={"chat_template_kwargs": options, "ignore_eos": True, "return_token_ids": True},
    )
    ids = tokens_after(oracle, prompt, 7)  # greedy, which is this model's default
    assert (answer.choices[0].model_extra or {})["token_ids"] == ids
    assert answer.choices[0].message.content == text_after(oracle, prompt, ids)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def ending(oracle: PreTrainedTokenizerFast, question: str) -> tuple[list[int], list[int], str]:
    """A chat's prompt, the tokens before its end, and the token that ends it ("": its default limit does)."""
    messages = [{"role": "user", "content": question}]
    rendered = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = oracle.encode(rendered, add_special_tokens=False)
    ids = tokens_after(oracle, prompt, DEFAULT_LIMIT)
    ends = oracle.convert_tokens_to_ids(list(ENDS))
    at = next((index for index, token_id in enumerate(ids) if token_id in ends), len(ids))
    return prompt, ids[:at], oracle.convert_ids_to_tokens(ids[at]) if at < len(ids) else ""


def test_a_chat_ends_at_each_end_token_of_the_model(client: openai.OpenAI, oracle: PreTrainedTokenizerFast) -> None:
    questions = {ending(oracle, f"question {number}")[2]: f"question {number}" for number in range(120)}
    assert set(ENDS) <= set(questions)
    for end, question in questions.items():
        prompt, ids, _ = ending(oracle, question)
        for is_stream in (False, True):
            answer: Any = client.chat.completions.create(
                model=MODEL_NAME, messages=[{"role": "user", "content": question}], stream=is_stream
            )
            chunks = list(answer) if is_stream else [answer]
            said = [chunk.choices[0].delta if is_stream else chunk.choices[0].message for chunk in chunks]
            assert "".join(part.content or "" for part in said) == text_after(oracle, prompt, ids)
            assert chunks[-1].choices[0].finish_reason == ("stop" if end else "length")


def test_grpc_has_the_same_ends_and_defaults(
    cluster: FakeCluster, oracle: PreTrainedTokenizerFast, model_dir: Path
) -> None:
    prompt, ids, end = next(
        found for found in (ending(oracle, f"{number}") for number in range(100)) if found[2] == "</s>"
    )
    grpc = cluster.client()

    def ask(sampling: SamplingParams) -> list[int]:
        events = list(grpc.generate(GenerationRequest(tuple(prompt), sampling)))
        return [token_id for event in events if isinstance(event, Tokens) for token_id in event.ids]

    assert end == "</s>"
    assert ask(SamplingParams()) == ids
    assert ask(SamplingParams(ignore_eos=True, max_tokens=300)) == tokens_after(oracle, prompt, 300)
    sampled = ask(SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True))
    assert sampled == tokens_after(oracle, prompt, 20, temperature=1.0, seed=7)
    assert TextCodec(model_dir / "tokenizer.json").decode(ids) == oracle.decode(ids, skip_special_tokens=True)
