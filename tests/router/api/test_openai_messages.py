"""Every role and content form of OpenAI's chats, as chat templates get them; wrong forms are refused by path."""

from __future__ import annotations

from typing import Any

import pytest

from router.api.chat.messages import checked_messages
from router.errors import InvalidRequest
from router.service.chat import ChatTemplate
from tests.router import chat_templates

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "Hi."}


def test_what_templates_know_is_left_as_it_is() -> None:
    messages = [
        {"role": "system", "content": "s", "name": "n"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "r"}]},
        {"role": "narrator", "anything": {"a": 1}},
    ]
    assert checked_messages(messages) == messages


def test_no_calls_are_no_field() -> None:
    empty = {"role": "assistant", "content": "x", "tool_calls": []}
    assert checked_messages([empty]) == [{"role": "assistant", "content": "x"}]


def test_refusals_are_text() -> None:
    parts = [{"type": "text", "text": "No: "}, {"type": "refusal", "refusal": "never"}]
    (message,) = checked_messages([{"role": "assistant", "content": parts}])
    assert message["content"] == [{"type": "text", "text": "No: "}, {"type": "text", "text": "never"}]
    (message,) = checked_messages([{"role": "assistant", "content": None, "refusal": "never"}])
    assert message["content"] == "never"


def test_deprecated_function_calls_are_tool_calls() -> None:
    function = {"name": "f", "arguments": "{}"}
    messages = [
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "function", "name": "other", "content": "3"},
    ]
    first, one, second, two, three = checked_messages(messages)
    assert "function_call" not in first
    assert first["tool_calls"] == [{"id": one["tool_call_id"], "type": "function", "function": function}]
    assert second["tool_calls"][0]["id"] == two["tool_call_id"] != one["tool_call_id"]
    assert [one["role"], two["role"], three["role"]] == ["tool"] * 3
    assert three["tool_call_id"] not in (one["tool_call_id"], two["tool_call_id"])
    prompt = ChatTemplate(chat_templates.MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}).render([USER, first, one])
    assert f'"call_id": "{one["tool_call_id"]}"' in prompt  # whose ids must have nine letters


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": 1}, "tool_call_id"),
        ({"role": "function", "content": "x"}, "name"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
        ({"role": "assistant", "refusal": []}, "refusal"),
        ({"role": "assistant", "audio": {"id": "x"}}, "audio"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [1]}, "tool_calls.0"),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "tool_calls.0.id"),
        ({"role": "assistant", "tool_calls": [CALL, {**CALL, "id": None}]}, "tool_calls.1.id"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool_calls.0.function"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {}}]}, "tool_calls.0.function.name"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]},
            "tool_calls.0.function.arguments",
        ),
        ({"role": "assistant", "function_call": {"name": "f"}}, "function_call.arguments"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "content.1.type"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "content.0.type"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "content.0.type"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, "content.0.refusal"),
    ],
)
def test_wrong_forms_are_refused_by_path(message: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked_messages([USER, message])
    assert refusal.value.param == f"messages.1.{path}"
    assert refusal.value.message.startswith(f"messages.1.{path}: ")


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("name", "has_role"),
    [("qwen3", False), ("llama31", False), ("mistral", False), ("plain", False), ("trained", False), ("harmony", True)],
)
def test_a_developer_is_a_system_where_the_template_does_not_know_one(name: str, has_role: bool) -> None:
    source = {**chat_templates.ALL, "harmony": chat_templates.HARMONY}[name]
    template = ChatTemplate(source, SPECIAL)
    asked = template.render([{"role": "developer", "content": "Be brief."}, USER])
    if not has_role:
        assert asked == template.render([{"role": "system", "content": "Be brief."}, USER])
    assert "Be brief." in asked
    assert ("developer" in asked) is has_role


def test_a_developer_stays_one_where_no_system_shows() -> None:
    source = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    assert ChatTemplate(source, {}).render(messages) == "[developer]Be brief.[user]Hi."


def test_templates_that_show_tools_are_told_apart() -> None:
    shown = {name for name, source in chat_templates.ALL.items() if ChatTemplate(source, SPECIAL).shows_tools}
    assert shown == set()
    for source in (chat_templates.HERMES, chat_templates.MISTRAL_WITH_TOOLS, chat_templates.HARMONY):
        assert ChatTemplate(source, SPECIAL).shows_tools
