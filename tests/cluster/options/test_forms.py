"""Structured output through a whole cluster: JSON schemas, regular expressions, choices and grammars."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from router.service.text import TextCodec
from tests.cluster.options.completions import shaped
from tests.fake_model import MODEL_NAME

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


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
