"""Chat prompts against transformers' apply_chat_template, and what is found out about a template at load."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from router.errors import InvalidRequest
from router.service.chat import ChatTemplate
from tests.router import chat_templates
from tests.router.chat_templates import ALL

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {
    "id": "abcd12345",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln", "n": 1.0}'},
}
PLAIN = [
    {"role": "user", "content": "Hi & <hi>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "é?"},
]
WITH_TOOLS = [
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "function_call": None},
    {"role": "tool", "tool_call_id": "abcd12345", "name": "weather", "content": '{"rain": true}'},
]
REASONED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "reasoning": "Ones are added."},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4", "tool_calls": [CALL], "reasoning_content": "Twos."},
]


def expected(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """What transformers renders. Its callers hold arguments as objects, as its documentation asks for."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL, chat_template=template)
    copied = copy.deepcopy(messages)
    for message in copied:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return tokenizer.apply_chat_template(copied, tokenize=False, add_generation_prompt=True, **options)


CHATS = {"plain": PLAIN, "with_tools": WITH_TOOLS, "reasoned": REASONED}
RENDERED = [pair for pair in itertools.product(ALL, CHATS) if pair != ("mistral", "reasoned")]  # roles must alternate


@pytest.mark.parametrize(("name", "chat"), RENDERED)
def test_prompts_equal_those_of_transformers(name: str, chat: str) -> None:
    messages = CHATS[chat]
    before = copy.deepcopy(messages)
    rendered = ChatTemplate(ALL[name], SPECIAL).render(messages)
    assert rendered == expected(ALL[name], messages)
    assert messages == before
    assert "None" not in rendered


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("qwen3", [{"role": "system", "content": "Be brief."}, *PLAIN]),
        ("llama31", [{"role": "system", "content": "Be brief."}, *PLAIN]),
        ("mistral", [{"role": "system", "content": "Be brief."}, *PLAIN]),
        ("trained", [{"role": "critic", "content": "é", "name": "Ann", "mood": {"x": [1, None]}}, {"role": "stop"}]),
        ("parts", [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    ],
)
def test_other_prompts_equal_those_of_transformers(name: str, messages: list[dict[str, Any]]) -> None:
    assert ChatTemplate(ALL[name], SPECIAL).render(messages) == expected(ALL[name], messages)


@pytest.mark.parametrize("is_thinking", [True, False])
def test_options_reach_the_template(is_thinking: bool) -> None:
    options = {"enable_thinking": is_thinking, "bos_token": "<other>"}
    rendered = ChatTemplate(chat_templates.QWEN3, SPECIAL).render(PLAIN, options)
    assert rendered == expected(chat_templates.QWEN3, PLAIN, **options)
    assert rendered.endswith("</think>\n\n") is not is_thinking
    assert ChatTemplate(chat_templates.LLAMA31, SPECIAL).render(PLAIN, {"date_string": "today"}) == expected(
        chat_templates.LLAMA31, PLAIN, date_string="today"
    )


def test_parts_are_joined_for_templates_that_would_print_the_list() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined = [{"role": "user", "content": "ab"}]
    for name in ("plain", "qwen3", "llama31", "mistral", "trained"):
        assert ChatTemplate(ALL[name], SPECIAL).render(parts) == expected(ALL[name], joined), name
    assert "[a][b]" in ChatTemplate(chat_templates.PARTS, SPECIAL).render(parts)


def test_a_template_that_looks_for_parts_alone_gets_parts() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}"
    source += "{{ part.text }}{% endif %}{% endfor %}{% endfor %}"  # loses a plain text, letter by letter
    template = ChatTemplate(source, {})
    assert template.render([{"role": "user", "content": "hello"}]) == "[user]hello"
    assert template.render([{"role": "user", "content": [{"type": "text", "text": "hello"}]}]) == "[user]hello"
    assert template.render([{"role": "user", "content": None}]) == "[user]"


def test_roles_differ_in_what_they_take() -> None:
    source = "{% for m in messages %}{% if m.role == 'user' and m.content is not string %}{{ m.content[0].text }}"
    source += "{{ m.content[1].text }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": role, "content": content} for role in ("system", "user", "nobody")]
    assert ChatTemplate(source, {}).render(messages) == "ab;ab;ab;"


def test_null_and_absent_content_never_shows_as_none() -> None:
    messages = [{"role": "user", "content": None}, {"role": "other", "content": None}, {"role": "assistant"}]
    assert ChatTemplate(chat_templates.PLAIN, {}).render(messages) == "[user]\n[other]\n[assistant]\n[assistant]"
    adding = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}"  # fails on anything but text
    assert ChatTemplate(adding, {}).render(messages) == "<><><>"
    asking = "{% for m in messages %}{{ 'null' if m.content is none else m.content }};{% endfor %}"
    assert ChatTemplate(asking, {}).render([{"role": "user", "content": None}]) == "null;"


@pytest.mark.parametrize(
    ("printing", "shown"),
    [
        ("{{ c.arguments }}", '{"a": "b"}'),
        ("{{ c.arguments | tojson }}", '{"a": "b"}'),
        ("{% for k, v in c.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "a=b"),
        ("{{ c.arguments if c.arguments is string else c.arguments | tojson }}", '{"a": "b"}'),
        ("{{ c | tojson }}", '{"name": "f", "arguments": {"a": "b"}}'),
    ],
)
def test_arguments_are_printed_once_encoded(printing: str, shown: str) -> None:
    source = "{% for m in messages %}{% for t in m.tool_calls or [] %}{% set c = t.function %}" + printing
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert ChatTemplate(source + "{% endfor %}{% endfor %}", {}).render(messages) == shown


def test_arguments_that_are_no_json_stay_text() -> None:
    source = "{% for m in messages %}{% for t in m.tool_calls or [] %}{{ t.function.arguments | tojson }}"
    source += "{% endfor %}{% endfor %}"
    calls = [{"function": {"arguments": '{"a'}}, {"function": "f"}, "call", {"function": {"arguments": {"b": 1}}}]
    template = ChatTemplate(source, {})
    for call, shown in zip(calls, ('"{\\"a"', "", "", '{"b": 1}'), strict=True):
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            assert template.render([message]) == shown
        except InvalidRequest:
            assert shown == ""  # the template's own refusal
    assert template.render([{"role": "assistant", "tool_calls": None}]) == ""


def test_what_a_template_refuses_is_a_refusal_in_its_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(chat_templates.MISTRAL, SPECIAL).render([{"role": "user", "content": "a"}] * 2)
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        expected(chat_templates.MISTRAL, [{"role": "user", "content": "a"}] * 2)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("qwen3", "<|im_end|>\n"),
        ("llama31", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("trained", "<|end|>"),
        ("plain", "\n"),
    ],
)
def test_what_follows_an_answer(name: str, end: str) -> None:
    assert ChatTemplate(ALL[name], SPECIAL).after_answer().startswith(end)


def test_a_template_that_has_no_answers_has_no_end() -> None:
    assert ChatTemplate("{{ messages[0].content }}", {}).after_answer() == ""
    assert ChatTemplate("{{ raise_exception('no') }}", {}).after_answer() == ""


def test_times_are_there() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') | int > 2000 }}", {}).render(PLAIN) == "True"
